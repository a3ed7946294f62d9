"""The registry of decoders, and what a description consists of."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder: the names of its tensors in GGUF files, with ``{}`` for the number of the layer.

        h = x + attention(rms_norm(x, attention_norm))
        y = h + down(silu(gate(n)) · up(n))            n = rms_norm(h, feed_forward_norm)

    Those given without an ending have a ``.weight`` and may have a ``.bias``.
    """

    name: str
    embeddings: str
    attention_norm: str
    feed_forward_norm: str
    gate: str
    up: str
    down: str
    output_norm: str
    output: str
    """The output head; a file without it uses the embeddings."""
    inert: tuple[str, ...] = ()
    """Further tensors that attention reads, or that change nothing."""

    def layer_tensors(self, layer: int) -> set[str]:
        """All tensors that the decoder itself may use in a layer."""
        linear = {f"{name}.{kind}" for name in (self.gate, self.up, self.down) for kind in ("weight", "bias")}
        return {name.format(layer) for name in linear | {self.attention_norm, self.feed_forward_norm}}

    def shared_tensors(self) -> set[str]:
        """All tensors that belong to no layer."""
        return {self.embeddings, self.output_norm, f"{self.output}.weight", f"{self.output}.bias", *self.inert}


@functools.cache
def _architectures() -> dict[str, Architecture]:
    """Find every module beside this one; each describes a family in ``ARCHITECTURES``."""
    package = importlib.import_module("qattn.models.architectures")
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            for described in importlib.import_module(f"{package.__name__}.{module.name}").ARCHITECTURES:
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
