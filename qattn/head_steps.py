"""What a layer does to its heads besides rotating them, with the weights that it takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from qattn import backends, devices
from qattn.architectures import AttentionConfig, Norm, Temperature
from qattn.logits import Logits
from qattn.preparation import Preparation
from qattn.projection import heads_of
from qattn.rope import RotaryEmbedding, Rotation
from qattn.softmax_attention import alibi_slopes, relative_biases
from qattn.state import State

Array = np.ndarray[Any, Any]


class HeadNorm:
    """A norm of the heads of q, k or v, which lie side by side in rows."""

    def __init__(self, norm: Norm, name: str, state: State, heads: int, size: int, device: str) -> None:
        self.norm = norm
        self._groups, self._size = heads, size
        self.weight: Any = None
        """(groups, size) float32 on the device, or None."""
        self.bias: Any = None
        if norm.weighted:
            self.weight = self._spread(f"{name}.weight", state.vector(f"{name}.weight"), device)
            if f"{name}.bias" in state:
                self.bias = self._spread(f"{name}.bias", state.vector(f"{name}.bias"), device)
        self.by_head = self._groups == heads
        """Whether it sees one head at a time."""

    def _spread(self, name: str, values: Array, device: str) -> Any:
        """Values as (groups, size) on the device.  Those that span all heads make these one group."""
        heads, size = self._groups, self._size
        if values.shape == (heads * size,) and heads > 1:
            self._groups, self._size = 1, heads * size
            return devices.asarray(values[None], device)
        if values.shape not in ((size,), (heads, size), (heads, 1), (1, size)):
            expected = f"({size},), ({heads * size},), ({heads}, {size}) or ({heads}, 1)"
            raise ValueError(f"{name} has shape {values.shape}; expected {expected}")
        return devices.asarray(np.ascontiguousarray(np.broadcast_to(values, (heads, size))), device)

    def __call__(self, rows: Array, first: int) -> None:
        """Normalize the heads that begin at column `first` of each row, in place."""
        layer, epsilon = self.norm.kind == "layer", self.norm.epsilon
        backends.of(rows).norm_heads(rows, first, self._groups, self._size, self.weight, self.bias, epsilon, layer)


_LONGEST = 1024  # elements of a head: a block of four warps then has room for theirs on every GPU


class HeadSteps:
    """What a layer does to the projected heads of q, k and v, or of some of them, beside rotating them.

    Parameters
    ----------
    parts : str
        What a row consists of: "q", "kv" or "qkv".
    finishing : (factor, bias, limit)
        Of the projection.
    gate_finishes : bool
        They are not the same as none for a gate behind the heads.
    """

    def __init__(
        self,
        c: AttentionConfig,
        state: State,
        parts: str,
        device: str,
        finishing: tuple[Any, Any, Any] = (None, None, None),
        gate_finishes: bool = False,
    ) -> None:
        (heads, size), (kv_heads, _), _ = sizes = heads_of(c, parts)
        self._device, self._after_rope = device, c.norm_after_rope
        self._turning, self._size, self._queries = heads + kv_heads, size, heads * size
        self._norms: list[tuple[HeadNorm, int]] = []
        kinds, first = (c.q_norm, c.k_norm, c.v_norm), 0
        for name, norm, (count, each) in zip(("q_norm", "k_norm", "v_norm"), kinds, sizes, strict=True):
            if norm is not None and count:
                self._norms.append((HeadNorm(norm, name, state, count, each, device), first))
            first += count * each
        self.preparation: Preparation | None = None
        """What can be left to the kernels that rotate q and k and store k and v, or None.

        A GPU's do it on the way, where a CPU's find the rows in a cache at each step.  They see one head at a time."""
        asked = any(array is not None for array in finishing) or bool(self._norms) or c.temperature is not None
        fits = max(c.head_dim, c.value_dim) <= _LONGEST and all(norm.by_head for norm, _ in self._norms)
        if asked and fits and device != "cpu" and parts == "qkv" and not gate_finishes:
            norms = tuple(None if norm is None else (norm.kind, norm.epsilon) for norm in kinds)
            weight, shift = (_side_by_side(self._norms, first, name, device) for name in ("weight", "bias"))
            self.preparation = Preparation(*finishing, weight, shift, norms, c.norm_after_rope)

    def __call__(self, rows: Array, angles: Array, rotation: Rotation) -> Rotation:
        """Do it to rows in place, pass by pass → the rotation that is left to do."""
        backend, heat = backends.of(rows), rotation.heat
        if self._after_rope:
            backend.rotate_heads(rows, self._turning, self._size, rotation, angles)
            rotation = Rotation.none(len(rotation.cos), self._device)
        for norm, first in self._norms:
            norm(rows, first)
        if heat is not None and self._queries:
            backend.scale_tokens(rows, 0, self._queries, heat, angles)
        return rotation


def _side_by_side(norms: list[tuple[HeadNorm, int]], columns: int, name: str, device: str) -> Any:
    """The weights or biases of norms, (columns,), 1 or 0 where there is none; None if there is none at all."""
    found = [(getattr(norm, name), first) for norm, first in norms if getattr(norm, name) is not None]
    if not found:
        return None
    with devices.current(device):
        out = devices.asarray(np.full(columns, name == "weight", np.float32), device)
        for values, first in found:
            out[first : first + values.size] = values.ravel()
    return out


def logits_of(c: AttentionConfig, state: State, device: str) -> Logits:
    """What a layer does to its scores."""
    heads, arrays = c.num_attention_heads, {}
    if c.alibi:
        arrays["slopes"] = alibi_slopes(heads, c.alibi)
    if c.sinks:
        arrays["sinks"] = state.numbers("sinks.weight", (heads,))
    if c.distances:
        buckets = state.numbers("buckets.weight", ("buckets", heads))
        arrays["distances"] = relative_biases(buckets, c.distances == "two-sided")
    there = {name: devices.asarray(values, device) for name, values in arrays.items()}
    return Logits(c.scale, c.softcap, **there)


class Temperatures:
    """The factors by which queries grow with their position, as a table that grows as well."""

    def __init__(self, temperature: Temperature, device: str) -> None:
        self.temperature, self._device = temperature, device
        self._table: Any = np.empty(0, np.float32)

    def table(self, positions: int) -> Any:
        """The factors of positions 0 … at least `positions` - 1, float32, on the device."""
        if positions > len(self._table):
            self._table = self.of(np.arange(max(positions, 2 * len(self._table), 256)))
        return self._table

    def of(self, positions: Array) -> Any:
        """The factors of given positions, float32, on the device."""
        length, scale, offset = self.temperature
        steps = np.floor((positions + offset) / length)
        return devices.asarray((1 + scale * np.log1p(steps)).astype(np.float32), self._device)


def rotation_to(
    positions: int, rope: RotaryEmbedding | None, temperatures: Temperatures | None, device: str
) -> Rotation:
    """What positions 0 … at least `positions` - 1 do to heads: angles, if there is an embedding, and temperatures."""
    rotation = Rotation.none(positions, device) if rope is None else rope.rotation(positions, device)
    return rotation if temperatures is None else rotation._replace(heat=temperatures.table(len(rotation.cos)))


def rotation_at(
    positions: Array, rope: RotaryEmbedding | None, temperatures: Temperatures | None, device: str
) -> tuple[Rotation, Array]:
    """What given positions do, as `RotaryEmbedding.rotation_at` takes them: tables, and a row for each token."""
    if rope is None:
        rotation, rows = Rotation.none(len(positions), device), np.arange(len(positions))
    else:
        rotation, rows = rope.rotation_at(positions, device)
    if temperatures is not None:
        by_position = rows is positions  # else tables have a row for each token
        first = positions if positions.ndim == 1 else positions[0]
        heat = temperatures.table(len(rotation.cos)) if by_position else temperatures.of(first)
        rotation = rotation._replace(heat=heat)
    return rotation, rows
