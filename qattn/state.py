"""A layer's weights by name: those of a state dictionary, and the tensors of a GGUF file under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qattn import _check
from qattn._backend import as_numpy
from qattn.architectures import AttentionConfig
from qattn.array import QuantArray
from qattn.gguf_file import GGUFFile

Array = np.ndarray[Any, Any]

_GGUF_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_gate": "gate_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_v_norm": "v_norm",
    "attn_sub_norm": "output_norm",
    "attn_sinks": "sinks",
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_norm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj",
    "attn_kv_a_norm": "kv_a_norm",
    "attn_kv_b": "kv_b_proj",
    "attn_k_b": "k_b_proj",
    "attn_v_b": "v_b_proj",
}


class State:
    """Takes weights out of a state dictionary, and checks that what is taken fits and that nothing is left.

    Parameters
    ----------
    given : mapping
        Weights by name: ``q_proj.weight`` and so on.
    weight : function of (name, value, shape)
        Checks a matrix, and makes it a `QuantArray`.
    """

    def __init__(self, given: Mapping[str, Any], weight: Callable[[str, Any, tuple[int, int]], QuantArray]) -> None:
        self._given, self._weight = given, weight
        self._known: set[str] = set()

    def __contains__(self, name: str) -> bool:
        self._known.add(name)
        return name in self._given

    def _take(self, name: str, why: str = "") -> Any:
        if name not in self:
            raise KeyError(f"{name} is missing from the state dictionary{why}")
        return self._given[name]

    def rows(self, name: str) -> int:
        """How many rows the weights ``name.weight`` have."""
        return int(_rows(self._take(f"{name}.weight")).shape[0])

    def matrix(self, name: str, rows: int, columns: int) -> QuantArray:
        """The weights ``name.weight``, (rows, columns)."""
        return self._weight(f"{name}.weight", _rows(self._take(f"{name}.weight")), (rows, columns))

    def matrices(self, name: str, count: int, rows: int, columns: int) -> list[QuantArray]:
        """The weights ``name.weight``, (count, rows, columns), or (rows, columns) if there is one, a matrix each."""
        value = self._take(f"{name}.weight")
        parts = [value] if getattr(value, "ndim", 0) == 2 else list(value)
        if len(parts) != count:
            raise ValueError(f"{name}.weight has {len(parts)} matrices; expected {count}")
        return [self._weight(f"{name}.weight", part, (rows, columns)) for part in parts]

    def vector(self, name: str, why: str = "") -> Array:
        """A float32 array of any shape: a norm's weight, a bias."""
        return np.array(as_numpy(self._take(name, why), name), np.float32)

    def numbers(self, name: str, shape: tuple[int | str, ...]) -> Array:
        """A float32 array of finite numbers: what is added to scores, where a NaN would not be seen in the result."""
        values = self.vector(name)
        _check.shape(name, values, shape)
        _check.finite(name, values)
        return values

    def factor(self, name: str) -> float:
        """The number ``name.scale``, by which products of the weights are multiplied; 1 if there is none.

        ``name.input_scale`` is what activations were divided by where they are rounded to a few bits: not here.
        """
        _ = f"{name}.input_scale" in self
        if f"{name}.scale" not in self:
            return 1.0
        value = self.vector(f"{name}.scale")
        if value.size != 1 or not np.isfinite(value).all():
            raise ValueError(f"{name}.scale has shape {value.shape}; expected one finite number")
        return float(value.ravel()[0])

    def bias(self, name: str, rows: int, *, why: str = "") -> Array:
        """The bias of some weights, (rows,) float32."""
        bias = self.vector(f"{name}.bias", why)
        _check.shape(f"{name}.bias", bias, (rows,))
        return bias

    def end(self) -> None:
        """Raise ValueError if there is something that was not asked for."""
        unknown = sorted(set(self._given) - self._known)
        if unknown:
            raise ValueError(f"the layer has no {', '.join(unknown)}; it takes {', '.join(sorted(self._known))}")


def _rows(value: Any) -> Any:
    """A matrix: files leave out that there is a single row."""
    if getattr(value, "ndim", 2) != 1:
        return value
    return QuantArray(value.data[None], value.format) if isinstance(value, QuantArray) else value[None]


def of_layer(model: GGUFFile, config: AttentionConfig) -> dict[str, Any]:
    """The tensors of a layer's attention, by the names of a state dictionary."""
    state: dict[str, Any] = {}
    norms = {"attn_q_norm": config.q_norm, "attn_k_norm": config.k_norm, "attn_v_norm": config.v_norm}
    skipped = {name for name, norm in norms.items() if norm is None or not norm.weighted}
    if config.latent is not None and config.latent.shared_norm:
        skipped.remove("attn_k_norm")
    if config.shares_cache_of is not None:
        skipped |= {"attn_k", "attn_v", "attn_k_norm", "attn_v_norm"}
    for theirs, ours in (_GGUF_NAMES | {config.output: "o_proj"}).items():
        for kind in ("weight", "bias", "scale", "input_scale"):
            name = f"{theirs}.{kind}"
            if theirs not in skipped and name not in config.unused and config.prefix + name in model:
                state[f"{ours}.{kind}"] = model.mapped(config.prefix + name)
    if config.distances:
        state["buckets.weight"] = model.mapped(config.distance_table)
    if "qkv_proj.weight" in state:
        _complete_fused(state, config)
    return state


def _complete_fused(state: dict[str, Any], config: AttentionConfig) -> None:
    """What llama.cpp makes of a fused weight: biases may stand apart, and a layer without keys takes the first rows."""
    if config.shares_cache_of is not None:
        state["q_proj.weight"] = state.pop("qkv_proj.weight")[: config.num_attention_heads * config.head_dim]
        for kind in ("scale", "input_scale"):
            if f"qkv_proj.{kind}" in state:
                state[f"q_proj.{kind}"] = state.pop(f"qkv_proj.{kind}")
        return
    apart = [state.pop(f"{name}_proj.bias", None) for name in "qkv"]
    if "qkv_proj.bias" not in state and all(bias is not None for bias in apart):
        state["qkv_proj.bias"] = np.concatenate([np.asarray(bias) for bias in apart])
