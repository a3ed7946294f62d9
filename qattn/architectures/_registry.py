"""The registry of architectures: who describes which, and what none does."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable
from typing import Literal

from qattn._modules import import_all
from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer, NoAttention
from qattn.architectures._metadata import Metadata as Metadata
from qattn.errors import of_file
from qattn.gguf_file import GGUFFile

Part = Literal["encoder", "decoder", "cross"]
Describe = Callable[[Layer], AttentionConfig]

_architectures: dict[str, Describe] = {}
_refused: dict[str, str] = {}
_parts: dict[str, tuple[Part, ...]] = {}


def register(*architectures: str, parts: tuple[Part, ...] = ()) -> Callable[[Describe], Describe]:
    """Let a function describe these architectures.

    parts : which kinds of blocks layers have, the usual one first; none: one kind, ``blk.N``
    """

    def add(function: Describe) -> Describe:
        for name in architectures:
            if name in _architectures:
                raise ValueError(f"there are two descriptions of {name!r}")
            _architectures[name] = function
            _parts[name] = parts
        return function

    return add


def refuse(reason: str, *architectures: str) -> None:
    """Say why none describes these architectures."""
    _refused.update(dict.fromkeys(architectures, reason))


def names() -> tuple[str, ...]:
    """The architectures that are described."""
    import_all("qattn.architectures")
    return tuple(sorted(_architectures))


def describe(
    model: GGUFFile, layer: int = 0, *, part: Part | None = None, context: int | None = None
) -> AttentionConfig:
    """Describe the attention of one layer of a file.

    Parameters
    ----------
    model : GGUFFile
    layer : int
    part : "encoder", "decoder" or "cross", optional
        Which block of the layer, in a model with an encoder and a decoder; the last attends from one to the other.
    context : int, optional
        Tokens that a sequence may have, by which LongRoPE chooses its factors: those for short contexts if it stays
        within the original one.  Without it, any number.

    Raises
    ------
    NotImplementedError
        If the architecture, or something that its metadata or its tensors ask for, is not supported, or if the layer
        is one without attention.
    GGUFError
        If metadata is missing or makes no sense.
    """
    metadata = Metadata(model, context)
    if metadata.architecture not in names():
        raise NotImplementedError(f"{_unknown(metadata.architecture)}; there are: {', '.join(names())}")
    config = _describe(metadata, layer, part)
    foreign = sorted(_foreign(model, config))
    if foreign:
        listed = ", ".join(f"{config.prefix}{name}" for name in foreign)
        raise NotImplementedError(f"{metadata.architecture} with tensors {listed} is not supported")
    return config


def _unknown(name: str) -> str:
    reason = f": {_refused[name]}" if name in _refused else ""
    return f"architecture {name!r} is not supported{reason}"


def _describe(metadata: Metadata, layer: int, part: Part | None) -> AttentionConfig:
    name = metadata.architecture
    parts = _parts[name]
    part = part or next(iter(parts), None)
    if part is not None and part not in parts:
        raise ValueError(f"part is {part!r}; {name} has {', '.join(map(repr, parts)) or 'no parts'}")
    counted = "block_count" if part in (None, "encoder") else "decoder_block_count"
    layers = metadata.integer(counted, None if counted == "block_count" else metadata.integer("block_count"))
    if not isinstance(layer, numbers.Integral) or not 0 <= layer < layers:
        raise ValueError(f"layer is {layer!r}; the model has layers 0 to {layers - 1}")
    with of_file(metadata.model.path, layer):
        return _architectures[name](Layer(metadata, layer, _PREFIXES[part].format(layer)))


_PREFIXES = {None: "blk.{}.", "encoder": "enc.blk.{}.", "decoder": "dec.blk.{}.", "cross": "dec.blk.{}.cross_"}


def attention_layers(model: GGUFFile) -> list[int]:
    """The layers that have attention, by their tensors and their descriptions: in hybrid models not all do."""
    named = (re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.attn_(?!norm)", name) for name in model)
    return [layer for layer in sorted({int(match[1]) for match in named if match}) if _has_attention(model, layer)]


def _has_attention(model: GGUFFile, layer: int) -> bool:
    try:
        describe(model, layer)
    except NoAttention:
        return False
    except (ValueError, NotImplementedError):  # there is some, for all that is known
        return True
    return True


def unsupported(model: GGUFFile) -> list[str]:
    """What a file's attention asks for and is not here, a phrase each; empty if all of it is supported."""
    metadata = Metadata(model)
    if metadata.architecture not in names():
        return [_unknown(metadata.architecture).replace(" is not supported", "")]
    reasons: dict[str, None] = {}
    for layer in attention_layers(model):
        try:
            config = _describe(metadata, layer, None)
        except NotImplementedError as error:
            reasons[str(error)] = None
        else:
            reasons.update(dict.fromkeys(f"tensors blk.*.{name}" for name in sorted(_foreign(model, config))))
    return list(reasons)


BESIDE = ("attn_norm", "attn_norm_2", "attn_output_norm", "attn_res_score")
"""Norms beside a block, by their tensors: they make its input, or take its output."""
_ENDINGS = ("weight", "bias", "scale", "input_scale")


def _foreign(model: GGUFFile, config: AttentionConfig) -> Iterable[str]:
    """The tensors of a block that its description doesn't understand, which might change its result."""
    known = {"attn_q", "attn_k", "attn_v", "attn_qkv", config.output, *BESIDE, *config.tensors}
    if config.q_norm is not None or config.k_norm is not None:
        known |= {"attn_q_norm", "attn_k_norm"}
    if config.gate is not None and not config.gate.interleaved:
        known.add("attn_gate")
    if config.latent is not None:
        known |= {"attn_q_a", "attn_q_b", "attn_q_a_norm", "attn_kv_a_mqa", "attn_kv_a_norm"}
        known |= {"attn_k_b", "attn_v_b"} if config.latent.absorbed else {"attn_kv_b"}
        known |= {"attn_k_norm"} if config.latent.shared_norm else set()
    for there, name in (
        (config.sinks, "attn_sinks"),
        (config.output_norm is not None, "attn_sub_norm"),
        (bool(config.distances), "attn_rel_b"),
        (config.cross, "attn_rel_b"),  # which no model uses
    ):
        known |= {name} if there else set()
    endings = {f"{name}.{ending}" for name in known for ending in _ENDINGS} | config.unused | known
    for name in model:
        if name.startswith(config.prefix):
            rest = name[len(config.prefix) :]
            if rest.startswith(("attn_", "indexer")) and rest not in endings:
                yield rest
