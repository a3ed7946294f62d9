"""The fused projection: rows of x become q, k, v and, where there is one, a gate, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import backends, devices, ops
from qattn.architectures import AttentionConfig
from qattn.array import QuantArray
from qattn.packing import PackedMatrix
from qattn.state import State

Array = np.ndarray[Any, Any]


class Projection:
    """clamp(x @ wqkv.T · factor + bias); a gate is not clamped.

    Parameters
    ----------
    config : AttentionConfig
    state : State
        Has ``q_proj``, ``k_proj`` and ``v_proj``, or ``qkv_proj`` for the three stacked, with ``gate_proj``.
    parts : str
        What is made of the rows of x: "qkv", "q", or "kv".  A gate comes with q.
    has_bias : bool
    clip : float, optional
        The weights are clamped to [-clip, clip].
    """

    def __init__(
        self,
        config: AttentionConfig,
        state: State,
        parts: str = "qkv",
        *,
        has_bias: bool,
        clip: float | None,
        device: str,
        precision: ops.Precision,
    ) -> None:
        self._config, self._parts, self._precision = config, parts, precision
        weights, factors, biases = [], [], []
        names = self._names(state)
        for name, rows in names.items():
            weights.append(state.matrix(name, rows, config.hidden_size))
            factors.append(np.full(rows, state.factor(name), np.float32))
            biases.append(_bias(state, name, rows, has_bias))
        wqkv, factor, bias = QuantArray.stack(weights), np.concatenate(factors), np.concatenate(biases)
        order = self._order(names)
        if order is not None:
            wqkv, factor, bias = wqkv[order], factor[order], bias[order]
        self.wqkv = wqkv if clip is None else _clipped(wqkv, clip)
        """The fused weights, (outputs, hidden_size)."""
        bias_there: Any = devices.asarray(bias, device) if has_bias else None
        factor_there: Any = devices.asarray(factor, device) if (factor != 1).any() else None
        limit_there: Any = None
        if config.clamp_qkv is not None:  # of the gate, which comes last, nothing is clamped
            gated = np.arange(len(factor)) >= len(factor) - self._gate_rows(names)
            limit = np.where(gated, np.finfo(np.float32).max, config.clamp_qkv)  # kernels' fast math knows no infinity
            limit_there = devices.asarray(limit.astype(np.float32), device)
        self.finishing = factor_there, bias_there, limit_there
        """Factor, bias and limit of each output, (outputs,) float32 on the device, or None."""
        gate_rows = self._gate_rows(names)
        self.gate_finishes = bool((factor[-gate_rows:] != 1).any() or bias[-gate_rows:].any()) if gate_rows else False
        """Whether the first two do anything to a gate: the last does not."""
        self._packed = PackedMatrix(self.wqkv).to(device)

    def _names(self, state: State) -> dict[str, int]:
        """The weights that are stacked, and how many rows each has."""
        c, parts = self._config, self._parts
        doubled = c.gate is not None and c.gate.interleaved
        sizes = {
            "q_proj": c.num_attention_heads * c.head_dim * (2 if doubled else 1),
            "k_proj": c.num_key_value_heads * c.head_dim,
            "v_proj": 0 if c.value_from_key else c.num_key_value_heads * c.value_dim,
        }
        rows = {name: size for name, size in sizes.items() if name[0] in parts and size}
        if parts == "qkv" and "qkv_proj.weight" in state:
            rows = {"qkv_proj": sum(rows.values())}
        if c.gate is not None and "q" in parts and not doubled:
            per_head = state.rows("gate_proj") == c.num_attention_heads
            rows["gate_proj"] = c.num_attention_heads * (1 if per_head else c.value_dim)
        return rows

    def _gate_rows(self, names: dict[str, int]) -> int:
        """How many rows are those of the gate."""
        c = self._config
        if c.gate is not None and c.gate.interleaved and "q" in self._parts:
            return c.num_attention_heads * c.head_dim
        return names.get("gate_proj", 0)

    def _order(self, names: dict[str, int]) -> Array | None:
        """Which of the stacked rows are those of q, k, v and the gate, in this order; None: they are as they lie."""
        c, rows, queries = self._config, np.arange(sum(names.values())), 0
        gate = rows[len(rows) - names.get("gate_proj", 0) :]
        rows = rows[: len(rows) - len(gate)]
        if "q" in self._parts:
            queries = c.num_attention_heads * c.head_dim
            if c.gate is not None and c.gate.interleaved:
                both = rows[: 2 * queries].reshape(c.num_attention_heads, 2, c.head_dim)
                gate, rows = both[:, 1].ravel(), np.concatenate([both[:, 0].ravel(), rows[both.size :]])
        if c.value_from_key:
            rows = np.concatenate([rows, rows[queries:]])
        order = np.concatenate([rows, gate])
        return None if np.array_equal(order, np.arange(sum(names.values()))) else order

    @property
    def bias(self) -> Any:
        """(outputs,) float32, or None."""
        return self.finishing[1]

    @property
    def outputs(self) -> int:
        """Columns of a row."""
        return self._packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.nbytes

    def __call__(self, x: Array) -> Array:
        """x (tokens, hidden_size) → (tokens, outputs) float32."""
        return self._affine(x, *self.finishing)

    def unfinished(self, x: Array) -> Array:
        """The same, where `finishing` is left to others."""
        return self._affine(x, None, None, None)

    def _affine(self, x: Array, factor: Any, bias: Any, limit: Any) -> Array:
        out = backends.of(x).scratch("qkv", (len(x), self.outputs))
        return ops.affine(x, self._packed, bias, factor=factor, limit=limit, out=out, precision=self._precision)


def stores(c: AttentionConfig) -> bool:
    """Whether the layer appends keys and values of x to a cache: else others put there what it attends to."""
    return c.shares_cache_of is None and not c.cross


def parts_of(c: AttentionConfig) -> str:
    """What the layer makes of x, by initials."""
    return "qkv" if stores(c) else "q"


def heads_of(c: AttentionConfig, parts: str | None = None) -> list[tuple[int, int]]:
    """Heads of q, k and v, and their sizes, in a row of these parts: by default those that the layer makes of x."""
    parts = parts or parts_of(c)
    counts = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
    sizes = c.head_dim, c.head_dim, c.value_dim
    return [(count if name in parts else 0, size) for name, count, size in zip("qkv", counts, sizes, strict=True)]


def _bias(state: State, name: str, rows: int, has_bias: bool) -> Array:
    """A bias, or zeros for none."""
    if not has_bias:
        if f"{name}.bias" in state:
            raise ValueError(f"{name}.bias was given, but has_bias is False")
        return np.zeros(rows, np.float32)
    if name == "gate_proj" and "gate_proj.bias" not in state:  # most have none
        return np.zeros(rows, np.float32)
    return state.bias(name, rows, why=", and has_bias is True")


def _clipped(weights: QuantArray, limit: float) -> QuantArray:
    """Weights clamped to [-limit, limit]: rows in which none exceeds it stay quantized, the others become float32."""
    values = np.asarray(weights)
    exceeds = (np.abs(values) > limit).any(axis=1)
    if not exceeds.any():
        return weights
    edges = np.flatnonzero(np.diff(exceeds)) + 1
    runs = []
    for rows in np.split(np.arange(len(exceeds)), edges):
        if exceeds[rows[0]]:
            clipped = np.clip(values[rows], -limit, limit).astype(np.float32)
            runs.append(QuantArray(clipped.view(np.uint8), "F32"))
        else:
            runs.append(weights[rows[0] : rows[-1] + 1])
    return QuantArray.stack(runs)
