"""Operations on CuPy arrays, by the kernels of `qattn.cuda`.  Nothing here waits for the GPU, but for
`qattn.cuda.tuning`, which sees once for a size which way is the fastest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from qattn import formats
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.cuda import attention as cuda_attention
from qattn.cuda import dense, tuning
from qattn.cuda import dequantize as cuda_dequantize
from qattn.cuda import matmul as cuda_matmul
from qattn.cuda import rope as cuda_rope
from qattn.cuda.activations import Activations, quantize
from qattn.cuda.attend_variant import Storage
from qattn.cuda.dequantize import dequantize as dequantize
from qattn.cuda.feed_forward import add as add
from qattn.cuda.feed_forward import gated as gated
from qattn.cuda.feed_forward import rms_norm as rms_norm
from qattn.cuda.feed_forward import softcap as softcap
from qattn.cuda.heads import Steps, hadamard
from qattn.cuda.heads import finish as finish
from qattn.cuda.heads import gate as gate
from qattn.cuda.heads import norm_heads as norm_heads
from qattn.cuda.heads import scale_tokens as scale_tokens
from qattn.cuda.program import Program as Program
from qattn.cuda.unpack import unpack as unpack_part
from qattn.layout import CELL, Layout
from qattn.logits import Logits
from qattn.packing import PackedMatrix, Part
from qattn.rope import Rotation

Array = Any


def scratch(purpose: str, shape: tuple[int, ...]) -> Array:
    """A float32 array with any content: CuPy's memory pool gives the same memory again and again."""
    import cupy

    return cupy.empty(shape, np.float32)


def take_rows(weights: QuantArray, ids: Array, out: Array) -> None:
    """out = some rows of weights, dequantized: weights (rows, columns), ids (n,) int64, out (n, columns) float32."""
    cuda_dequantize.dequantize_rows(weights.data, ids, formats.get(weights.format), out)


def unpack(part: Part, out: Array) -> None:
    """Write the values of a part's rows to where they belong in out, (rows, columns) float32."""
    unpack_part(part.packed, part.layout, out)


def multiply(x: Array, matrix: PackedMatrix, out: Array, precision: str) -> None:
    """out = x @ matrix.T: x (tokens, columns) and out (tokens, rows), float32, C-contiguous."""
    layouts = tuple(part.layout for part in matrix.parts)
    if precision != "fast" or not dense.fits(len(x), matrix.shape, layouts):
        _multiply_packed(x, matrix, out, precision)
        return
    ways = {
        "packed": partial(_multiply_packed, x, matrix, out, precision),
        "dense": partial(_multiply_dense, x, matrix, out),
    }
    tuning.run_fastest((layouts, matrix.shape, len(x).bit_length()), ways)


def _multiply_dense(x: Array, matrix: PackedMatrix, out: Array) -> None:
    """The same with values of the weights, by cuBLAS."""
    import cupy

    narrow, weights = cupy.empty(x.shape, np.uint16), cupy.empty(matrix.shape, np.uint16)
    dequantize(x.view(np.uint8), formats.get("F32"), narrow)
    for part in matrix.parts:
        unpack_part(part.packed, part.layout, weights)
    dense.multiply(narrow, weights, out)


def _multiply_packed(x: Array, matrix: PackedMatrix, out: Array, precision: str) -> None:
    """The same with packed weights, by kernels."""
    last: Any = None
    prepared: Any = x
    exact = precision == "exact"
    for part in matrix.parts:
        layout = part.layout
        floats, group = layout.bits >= 16, min(layout.group, CELL)
        if not floats and not exact and (group, layout.zero) != last:
            last, prepared = (group, layout.zero), _rounded(x, layout)
        cuda_matmul.product(layout, exact)(part.packed, x if floats or exact else prepared, out)


def multiply_each(x: Array, matrix: PackedMatrix, out: Array, precision: str) -> None:
    """out[:, h] = x[:, h] @ head h of matrix.T: x (tokens, heads, columns), out (tokens, heads, rows), float32.

    matrix : `divisible`, (heads · rows, columns)
    Cost: one launch for all heads, one that rounds x, and a small one where blocks share cells.
    """
    (part,), (tokens, heads, _), exact = matrix.parts, x.shape, precision == "exact"
    given: Any = x
    if part.layout.bits < 16 and not exact:
        given = _rounded(x, part.layout)
    cuda_matmul.product(part.layout, exact)(part.packed, given, out.reshape(tokens, -1), heads)


def _rounded(x: Array, layout: Layout) -> Activations:
    """x (tokens, columns) or (tokens, heads, columns) for weights of a layout."""
    group = min(layout.group, CELL)
    room = Activations.room(len(x), x.shape[-1], group, heads=x.shape[1] if x.ndim == 3 else 1)
    quantize(layout.zero, group)(x, room)
    return room


def rotate(x: Array, rotation: Rotation, positions: Array, out: Array) -> None:
    """out = heads rotated by the angles of their positions: see `qattn.cuda.rope`."""
    cos, sin, neox, *_ = rotation
    cuda_rope.rotate(x, cos, sin, positions, neox, out)


def rotate_heads(rows: Array, heads: int, size: int, rotation: Rotation, angles: Array) -> None:
    """Rotate the first heads of each row in place: see `qattn.cuda.rope`."""
    cos, sin, neox, *_ = rotation
    cuda_rope.rotate_heads(rows, heads, size, cos, sin, angles, neox)


def rotate_and_store(qkv: Array, rotation: Rotation, batch: Batch, cache: Any, q: Array) -> None:
    """Rotate queries into q, append rotated keys, and values, to a cache that has room: see `qattn.cuda.rope`.

    Rows are overwritten if the cache is one that turns keys and values by a Hadamard matrix.
    """
    params, heads = cache.params, q.shape[1]
    if params.hadamard:
        rotate_heads(qkv, heads + params.n_kv_heads, params.head_dim, rotation, batch.angles)
        hadamard(qkv, heads * params.head_dim, params.n_kv_heads, params.head_dim)
        first = (heads + params.n_kv_heads) * params.head_dim
        hadamard(qkv, first, params.n_kv_heads, params.values)
        rotation = Rotation(rotation.cos[:, :0], rotation.sin[:, :0], rotation.neox)
    cos, sin, neox, heat, preparation = rotation
    steps = Steps.of(preparation, heat)
    cuda_rope.rotate_and_store(_storage(params), qkv, cos, sin, batch, neox, cache.view(), cache.counts, q, steps)


def _storage(params: Any, exact: bool = False) -> Storage:
    return Storage(params.key_kind, params.value_kind, exact)


def attend(
    q: Array, cache: Any, row_offsets: Array, mask: Any, logits: Logits, *, exact: bool, out: Array | None = None
) -> tuple[Array, Array]:
    """Attention of the last tokens of each sequence in a cache: out (tokens, heads, value_dim), lse (tokens, heads).

    q : (tokens, heads, head_dim) float32, rotated;  row_offsets : (sequences + 1,) int64
        Overwritten if the cache is one that turns keys and values by a Hadamard matrix.
    Tensor cores multiply, q and weights rounded to 16 bits, unless the cache is float32 or this `exact`.
    """
    import cupy

    params, view = cache.params, cache.view()
    if params.hadamard:
        hadamard(q.reshape(len(q), q.shape[1] * q.shape[2]), 0, q.shape[1], params.head_dim)
    out = cupy.empty((*q.shape[:2], view.value_dim), np.float32) if out is None else out
    lse = cupy.empty(q.shape[:2], np.float32)
    partial = cuda_attention.Partial.room(len(q), len(row_offsets) - 1, q.shape[1], view)
    storage = _storage(params, exact)
    cuda_attention.attend(storage, q, view, row_offsets, cache.counts, mask, logits, out, lse, partial)
    if params.hadamard:
        hadamard(out.reshape(len(out), out.shape[1] * out.shape[2]), 0, out.shape[1], params.values)
    return out, lse


def rotate_and_attend(
    qkv: Array, rotation: Rotation, batch: Batch, cache: Any, mask: Any, logits: Logits, *, exact: bool, out: Array
) -> None:
    """out (tokens, heads, value_dim) = attention of projected rows, which are rotated and appended to the cache.

    One launch, and a small one that merges parts, where each sequence has one token and `fuses` takes the cache.
    """
    storage, (tokens, heads, value_dim) = _storage(cache.params, exact), out.shape
    group = heads // cache.params.n_kv_heads
    fuses = cuda_attention.fuses(storage, group, cache.params.head_dim, value_dim) and not cache.params.hadamard
    if not (fuses and batch.one_each):
        q = scratch("q", (tokens, heads, cache.params.head_dim))
        rotate_and_store(qkv, rotation, batch, cache, q)
        attend(q, cache, batch.row_offsets, mask, logits, exact=exact, out=out)
        return
    view, lse, (cos, sin, neox, heat, preparation) = cache.view(), scratch("lse", (tokens, heads)), rotation
    partial = cuda_attention.Partial.room(tokens, tokens, heads, view)
    cuda_attention.rotate_and_attend(
        storage, qkv, cos, sin, batch, neox, view, cache.counts, mask, logits, out, lse, partial,
        Steps.of(preparation, heat),
    )  # fmt: skip
