"""The registry of decoders, and what a description consists of."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from qattn._modules import import_all


@dataclass(frozen=True)
class Architecture:
    """A decoder: what it does around its attention, and its tensors in GGUF files, ``{}`` being the layer's number.

        x = embeddings[token] · embedding_scale                     # for each layer:
        h = x + norm(attention(norm(x, attention_norm)), attention_post_norm)
        y = h + norm(down(activation(gate(n)) · up(n)), feed_forward_post_norm)     # n = norm(h, feed_forward_norm)
        logits = cap · tanh(output(norm(x, output_norm)) / cap)

    Norms are RMS norms.  Where there is no post-norm, scale or cap, nothing happens.  Matrices, which are given without
    an ending, have a ``.weight`` and may have a ``.bias``.
    """

    name: str
    activation: Literal["silu", "gelu"] = "silu"
    scales_embeddings: bool = False
    """By the square root of the hidden size."""
    caps_logits: bool = False
    """With the cap ``final_logit_softcapping``, if the file has one."""
    embeddings: str = "token_embd.weight"
    attention_norm: str = "blk.{}.attn_norm.weight"
    attention_post_norm: str | None = None
    feed_forward_norm: str = "blk.{}.ffn_norm.weight"
    gate: str | None = "blk.{}.ffn_gate"
    """None: the rows of the gate are the first half of those of `up`."""
    up: str = "blk.{}.ffn_up"
    down: str = "blk.{}.ffn_down"
    feed_forward_post_norm: str | None = None
    output_norm: str = "output_norm.weight"
    output: str = "output"
    """The output head; a file without it uses the embeddings."""
    inert: tuple[str, ...] = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    """Further tensors, which attention reads."""

    def layer_tensors(self, layer: int) -> set[str]:
        """All tensors that the decoder itself may use in a layer."""
        matrices = [name for name in (self.gate, self.up, self.down) if name is not None]
        norms = (self.attention_norm, self.attention_post_norm, self.feed_forward_norm, self.feed_forward_post_norm)
        names = {f"{name}.{kind}" for name in matrices for kind in ("weight", "bias")}
        return {name.format(layer) for name in names.union(norm for norm in norms if norm is not None)}

    def shared_tensors(self) -> set[str]:
        """All tensors that belong to no layer."""
        return {self.embeddings, self.output_norm, f"{self.output}.weight", f"{self.output}.bias", *self.inert}


@functools.cache
def _architectures() -> dict[str, Architecture]:
    """What the modules beside this one describe; each has a family in ``ARCHITECTURES``."""
    found: dict[str, Architecture] = {}
    for described in itertools.chain(*(module.ARCHITECTURES for module in import_all("qattn.models.architectures"))):
        if described.name in found:
            raise ValueError(f"there are two descriptions of {described.name!r}")
        found[described.name] = described
    return found


def names() -> tuple[str, ...]:
    """Return the architectures whose decoder is described."""
    return tuple(sorted(_architectures()))


def get(name: str) -> Architecture:
    """Return a description.

    Raises
    ------
    NotImplementedError
        There is none; the message lists those that are.
    """
    if name not in names():
        raise NotImplementedError(f"there is no decoder for architecture {name!r}; there are: {', '.join(names())}")
    return _architectures()[name]
