"""Operations on NumPy arrays, by the kernels of `qattn.cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qattn import formats
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.cpu import amx_matmul, feed_forward
from qattn.cpu import attention as cpu_attention
from qattn.cpu import heads as cpu_heads
from qattn.cpu import matmul as cpu_matmul
from qattn.cpu import rope as cpu_rope
from qattn.cpu.activations import Activations, arrange, quantize
from qattn.cpu.dequantize import dequantize as dequantize
from qattn.cpu.dequantize import dequantize_rows
from qattn.cpu.kernel import Program as Program
from qattn.cpu.kernel import is_recording
from qattn.cpu.scratch import scratch as scratch
from qattn.cpu.target import TARGET
from qattn.cpu.threads import get_num_threads
from qattn.layout import CELL, Layout
from qattn.logits import Logits
from qattn.packing import PackedMatrix, Part, part_values
from qattn.rope import Rotation

Array = np.ndarray[Any, Any]


def take_rows(weights: QuantArray, ids: Array, out: Array) -> None:
    """out = some rows of weights, dequantized: weights (rows, columns), ids (n,) int64, out (n, columns) float32."""
    dequantize_rows(weights.data, ids, formats.get(weights.format), out)


def unpack(part: Part, out: Array) -> None:
    """Write the values of a part's rows to where they belong in out, (rows, columns) float32."""
    out[part.packed.targets] = part_values(part)


def multiply(x: Array, matrix: PackedMatrix, out: Array, precision: str) -> None:
    """out = x @ matrix.T: x (tokens, columns) and out (tokens, rows), float32, C-contiguous."""
    taken: list[Part] = []
    others: list[Part] = []
    for part in matrix.parts:
        (taken if precision == "fast" and amx_matmul.takes(part.layout, *x.shape) else others).append(part)
    if taken:
        _multiply_by_amx(x, taken, out)
    _multiply_by_rows(x, others, out, precision == "exact")


def _multiply_by_amx(x: Array, matrix_parts: Sequence[Part], out: Array) -> None:
    rounded = amx_matmul.room(*x.shape)
    amx_matmul.round_rows(x, rounded, parts=_parts_of(len(x), TARGET.rows))
    for part in matrix_parts:
        tiles = len(part.packed.codes)
        parts = min(1 + tiles * x.size // _WORK_AMX, max(tiles // _TILES_AMX, get_num_threads()))
        parts = min(parts, _PARTS_MANY * get_num_threads())
        amx_matmul.product(part.layout)(part.packed, rounded, out, parts=parts)


def _multiply_by_rows(x: Array, matrix_parts: Sequence[Part], out: Array, exact: bool) -> None:
    last: Any = None
    for part in matrix_parts:
        layout = part.layout
        floats, group = layout.bits >= 16, min(layout.group, CELL)
        key = "floats" if floats else (group, 0 if exact else layout.zero)
        if key != last:
            last, prepared = key, _room(layout, exact, *x.shape)
            if floats or exact:
                arrange(x, 0 if floats else group, prepared, parts=_parts_of(len(x)))
            else:
                quantize(layout.zero, group)(x, prepared, parts=_parts_of(len(x), TARGET.rows))
        work = part.packed.codes.nbytes * -(-len(x) // TARGET.rows)
        each = _PARTS_FEW if len(x) <= TARGET.rows else _PARTS_MANY
        parts = min(1 + work // _WORK, each * get_num_threads()) if work > _ALONE or is_recording() else 1
        cpu_matmul.product(layout, exact)(part.packed, prepared, out, parts=parts, streams=part.packed.codes)


def multiply_each(x: Array, matrix: PackedMatrix, out: Array, precision: str) -> None:
    """out[:, h] = x[:, h] @ head h of matrix.T: x (tokens, heads, columns), out (tokens, heads, rows), float32.

    matrix : `divisible`, (heads · rows, columns)
    """
    (part,), (tokens, heads, columns), exact = matrix.parts, x.shape, precision == "exact"
    parts = min(heads, _PARTS_FEW * get_num_threads())
    room = _room(part.layout, exact, tokens, columns, copies=(parts,))
    run = cpu_matmul.product_each(part.layout, exact)
    run(part.packed, heads, x.reshape(tokens, -1), room, out.reshape(tokens, -1), parts=parts)


def _room(layout: Layout, exact: bool, rows: int, columns: int, copies: tuple[int, ...] = ()) -> Activations:
    """Room for activations that weights of a layout are multiplied by."""
    floats, group = layout.bits >= 16, min(layout.group, CELL)
    if floats or exact:
        return Activations.exact_room(rows, columns, 0 if floats else group, copies=copies)
    return Activations.room(rows, columns, group, copies=copies)


_ALONE = 1 << 20  # bytes of weights that one thread has read before another, unless it runs already, is worth waking
_WORK_AMX = 1 << 20  # tiles times activations that are worth a part
_TILES_AMX = 8  # that share activations from the third-level cache
_WORK = 1 << 13  # bytes of weights, read once for each block of activations, that are worth a part
# Parts for each thread.  Memory is read fastest in long pieces; where arithmetic binds, small ones end together.
_PARTS_FEW, _PARTS_MANY = 4, 16


def _parts_of(rows: int, least: int = 4) -> int:
    """Into how many parts the work on so many rows is divided, `least` in each: several for each thread."""
    return max(1, min(rows // least, 4 * get_num_threads()))


def finish(out: Array, factor: Array | None, bias: Array | None, limit: Array | None) -> None:
    """out = clamp(out · factor + bias, -limit, limit): (tokens, n), and (n,) float32; None for what there isn't."""
    factor, bias, limit = (_or_empty(array, 1) for array in (factor, bias, limit))
    cpu_heads.finish(out, factor, bias, limit, parts=_parts_of(len(out)))


def norm_heads(
    x: Array, first: int, groups: int, size: int, weight: Array | None, bias: Array | None, epsilon: float, layer: bool
) -> None:
    """Normalize pieces of each row in place: see `qattn.cpu.heads`."""
    weight, bias = _or_empty(weight, 2), _or_empty(bias, 2)
    cpu_heads.norm_heads(x, first, groups, size, weight, bias, np.float32(epsilon), layer, parts=_parts_of(len(x)))


def scale_tokens(x: Array, first: int, count: int, table: Array, angles: Array) -> None:
    """Columns first … first + count - 1 of token t *= table[angles[t]]."""
    cpu_heads.scale_tokens(x, first, count, table, angles, parts=_parts_of(len(x)))


def _hadamard(x: Array, first: int, heads: int, size: int) -> None:
    """Multiply heads of rows x by a Walsh-Hadamard matrix, in place: see `qattn.cpu.heads`."""
    cpu_heads.hadamard(x, first, heads, size, parts=_parts_of(len(x)))


def gate(heads: Array, x: Array, first: int, per_head: bool, function: str) -> None:
    """heads (tokens, heads, value_dim) *= function of the columns of x from `first` on: see `qattn.cpu.heads`."""
    kind = cpu_heads.GATES.index(function)
    cpu_heads.gate(heads, x, first, per_head, kind, parts=_parts_of(len(x)))


def _or_empty(array: Array | None, ndim: int) -> Array:
    """Kernels get an empty array for none, so that they are compiled once."""
    return np.empty((0,) * ndim, np.float32) if array is None else array


def rotate(x: Array, rotation: Rotation, positions: Array, out: Array) -> None:
    """out = heads rotated by the angles of their positions: see `qattn.cpu.rope`."""
    cos, sin, neox, *_ = rotation
    cpu_rope.rotate(x, cos, sin, positions, neox, out, parts=_parts_of(len(x)))


def rotate_heads(rows: Array, heads: int, size: int, rotation: Rotation, angles: Array) -> None:
    """Rotate the first heads of each row in place: see `qattn.cpu.rope`."""
    cos, sin, neox, *_ = rotation
    cpu_rope.rotate_heads(rows, heads, size, cos, sin, angles, neox, parts=_parts_of(len(rows)))


def rotate_and_store(qkv: Array, rotation: Rotation, batch: Batch, cache: Any, q: Array) -> None:
    """Rotate queries into q, append rotated keys, and values, to a cache that has room: see `qattn.cpu.rope`.

    Rows are overwritten if the cache is one that turns keys and values by a Hadamard matrix.
    """
    params, heads = cache.params, q.shape[1]
    if params.hadamard:
        rotate_heads(qkv, heads + params.n_kv_heads, params.head_dim, rotation, batch.angles)
        _hadamard(qkv, heads * params.head_dim, params.n_kv_heads, params.head_dim)
        _hadamard(qkv, (heads + params.n_kv_heads) * params.head_dim, params.n_kv_heads, params.values)
        rotation = Rotation(rotation.cos[:, :0], rotation.sin[:, :0], rotation.neox)
    cos, sin, neox, *_ = rotation
    run = cpu_rope.rotate_and_store(params.key_kind, params.value_kind)
    run(qkv, cos, sin, batch, neox, cache.view(), cache.counts, q, parts=_parts_of(len(qkv)))


def attend(
    q: Array, cache: Any, row_offsets: Array, mask: Any, logits: Logits, *, exact: bool, out: Array | None = None
) -> tuple[Array, Array]:
    """Attention of the last tokens of each sequence in a cache: out (tokens, heads, value_dim), lse (tokens, heads).

    q : (tokens, heads, head_dim) float32, rotated;  row_offsets : (sequences + 1,) int64
        Overwritten if the cache is one that turns keys and values by a Hadamard matrix.
    A bfloat16 cache is multiplied in bfloat16 pairs, and codes with bytes, unless `exact`.
    """
    params, view = cache.params, cache.view()
    keys, values = (cpu_attention.Storage.best(kind, exact) for kind in (params.key_kind, params.value_kind))
    out = np.empty((*q.shape[:2], view.value_dim), np.float32) if out is None else out
    lse = np.empty(q.shape[:2], np.float32)
    if params.hadamard:
        _hadamard(q.reshape(len(q), q.shape[1] * q.shape[2]), 0, q.shape[1], params.head_dim)
    partial = cpu_attention.Partial.room(row_offsets, cache.capacity, q.shape[1], view.value_dim)
    large = cache.capacity * q.size > _LARGE or is_recording()
    parts = 4 * get_num_threads() if large else 1
    run = cpu_attention.attend(keys, values, type(mask))  # type: ignore[arg-type]
    run(q, view, row_offsets, cache.counts, _filled(logits), mask, out, lse, partial, parts=parts)
    if partial.lse.size:
        cpu_attention.merge(row_offsets, params.n_kv_heads, partial, out, lse, parts=parts)
    if params.hadamard:
        _hadamard(out.reshape(len(out), out.shape[1] * out.shape[2]), 0, out.shape[1], params.values)
    return out, lse


def rotate_and_attend(
    qkv: Array, rotation: Rotation, batch: Batch, cache: Any, mask: Any, logits: Logits, *, exact: bool, out: Array
) -> None:
    """out (tokens, heads, value_dim) = attention of projected rows, which are rotated and appended to the cache."""
    q = scratch("q", (*out.shape[:2], cache.params.head_dim))
    rotate_and_store(qkv, rotation, batch, cache, q)
    attend(q, cache, batch.row_offsets, mask, logits, exact=exact, out=out)


def _filled(logits: Logits) -> Logits:
    """The same with empty arrays for none."""
    scale: Any = np.float32(logits.scale)  # the kernels' own type
    cap: Any = np.float32(logits.cap)
    slopes, sinks = _or_empty(logits.slopes, 1), _or_empty(logits.sinks, 1)
    return Logits(scale, cap, slopes, sinks, _or_empty(logits.bias, 3), _or_empty(logits.distances, 2))


_LARGE = 1 << 20  # products of queries and keys that take longer than waking a thread


def rms_norm(x: Array, weight: Array, epsilon: float, out: Array) -> None:
    """out = x / sqrt(mean(x²) + epsilon) · weight, row by row."""
    feed_forward.rms_norm(x, weight, np.float32(epsilon), out, parts=_parts_of(len(x)))


def gated(gate_up: Array, out: Array, activation: str) -> None:
    """out = activation(gate) · up, where gate is the first half of each row and up the second: see `qattn.cpu`."""
    feed_forward.gated(activation)(gate_up, out, parts=_parts_of(len(out)))


def add(x: Array, y: Array) -> None:
    """x += y."""
    feed_forward.add(x, y, parts=_parts_of(len(x)))


def softcap(x: Array, limit: float) -> None:
    """x = limit · tanh(x / limit): (tokens, n)."""
    feed_forward.softcap(x, np.float32(limit), parts=min(4 * get_num_threads(), 1 + x.size // _CAPPED))


_CAPPED = 1 << 12  # numbers that are worth a part
