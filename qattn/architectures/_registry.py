"""The registry of architectures, and what a description consists of."""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qattn.errors import GGUFError
from qattn.gguf_file import GGUFFile
from qattn.masks import MHAMaskVariant
from qattn.rope import RotaryEmbedding


@dataclass(frozen=True)
class AttentionConfig:
    """All that a layer's attention needs to know beside its weights."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    rope: RotaryEmbedding
    scale: float
    mask_variant: MHAMaskVariant = MHAMaskVariant.CAUSAL_MASK


class Metadata:
    """A file's metadata under the prefix of its architecture, with errors that name the key."""

    def __init__(self, model: GGUFFile) -> None:
        self.model, self.all = model, model.metadata
        self.architecture = architecture(self.all)

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str, default: Any = None) -> Any:
        return self.all.get(self.key(name), default)

    def integer(self, name: str, default: int | None = None, *, layer: int = 0) -> int:
        """A positive integer; some files give one for each layer."""
        value = self._value(name, default, layer)
        try:
            number = operator.index(value)
        except TypeError:
            raise GGUFError(f"metadata {self.key(name)} is {value!r}; expected an integer") from None
        if number < 1:
            raise GGUFError(f"metadata {self.key(name)} is {number}; expected at least 1")
        return number

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, default, 0)
        scalar = np.isscalar(value) and not isinstance(value, (str, bool))
        if not scalar or not np.isfinite(value) or value <= 0:
            raise GGUFError(f"metadata {self.key(name)} is {value!r}; expected a positive number")
        return float(value)

    def _value(self, name: str, default: Any, layer: int) -> Any:
        value = self.get(name, default)
        if value is None:
            raise GGUFError(f"metadata {self.key(name)} is missing")
        if isinstance(value, (list, tuple, np.ndarray)):
            if layer >= len(value):
                raise GGUFError(f"metadata {self.key(name)} has {len(value)} entries; layer {layer} has none")
            return value[layer]
        return value


Describe = Callable[[Metadata, int], AttentionConfig]
_architectures: dict[str, Describe] = {}


def register(*architectures: str) -> Callable[[Describe], Describe]:
    """Let a function describe these architectures."""

    def add(function: Describe) -> Describe:
        for name in architectures:
            if name in _architectures:
                raise ValueError(f"there are two descriptions of {name!r}")
            _architectures[name] = function
        return function

    return add


@functools.cache
def _discover() -> None:
    package = importlib.import_module("qattn.architectures")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"qattn.architectures.{module.name}")


def names() -> tuple[str, ...]:
    """The architectures that are described."""
    _discover()
    return tuple(sorted(_architectures))


def architecture(metadata: Mapping[str, Any]) -> str:
    """The name of a file's architecture."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise GGUFError(f"metadata general.architecture is {name!r}; expected a name")
    return name


def describe(model: GGUFFile, layer: int = 0) -> AttentionConfig:
    """Describe the attention of one layer of a file.

    Raises
    ------
    NotImplementedError
        If the architecture, or something that its metadata asks for, is not supported.
    GGUFError
        If metadata is missing or makes no sense.
    """
    metadata = Metadata(model)
    if metadata.architecture not in names():
        known = ", ".join(names())
        raise NotImplementedError(f"architecture {metadata.architecture!r} is not supported; there are: {known}")
    reasons = unsupported(model)
    if reasons:
        raise NotImplementedError(f"{metadata.architecture} with {'; '.join(reasons)} is not supported")
    layers = metadata.integer("block_count")
    if not 0 <= layer < layers:
        raise ValueError(f"layer is {layer}; the model has layers 0 to {layers - 1}")
    return _architectures[metadata.architecture](metadata, layer)


# Tensors of an attention block that are understood; others would change its result.
_TENSORS = {
    f"{name}.{kind}"
    for name in ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
    for kind in ("weight", "bias")
} | {"attn_norm.weight"}


def unsupported(model: GGUFFile) -> list[str]:
    """What a file's attention asks for and is not here, a phrase each; empty if all of it is supported."""
    metadata = Metadata(model)
    reasons = []
    if metadata.architecture not in names():
        reasons.append(f"architecture {metadata.architecture!r}")
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "llama3"):
        reasons.append(f"RoPE scaling {scaling!r}")
    odd = ("attention.sliding_window", "attention.clamp_kqv", "attn_logit_softcapping", "attention.max_alibi_bias")
    for key in odd:
        if metadata.get(key):
            reasons.append(f"{metadata.key(key)} = {metadata.get(key)}")
    extra = {name.split(".", 2)[2] for name in model if name.startswith("blk.") and name.count(".") >= 3}
    extra = {name for name in extra if name.startswith(("attn_", "post_attention", "ssm_"))} - _TENSORS
    reasons.extend(f"tensors blk.*.{name}" for name in sorted(extra))
    return reasons
