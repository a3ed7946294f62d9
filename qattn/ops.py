"""The functional API: arrays in, arrays out.

Arguments are checked here, before any work; the kernels below assume that they are right.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from qattn import _check, array, formats, masks
from qattn._backend import as_numpy
from qattn.array import QuantArray
from qattn.cpu import attention as cpu_attention
from qattn.cpu import dequantize as cpu_dequantize
from qattn.cpu import matmul as cpu_matmul
from qattn.cpu import rope as cpu_rope
from qattn.cpu.activations import Activations, arrange, quantize
from qattn.cpu.kernel import is_recording
from qattn.cpu.rope import Batch as Batch
from qattn.cpu.target import TARGET
from qattn.cpu.threads import get_num_threads
from qattn.kv_cache import KVCache, KVCacheParams
from qattn.layout import CELL
from qattn.masks import Mask, MHAMaskVariant
from qattn.packing import PackedMatrix
from qattn.rope import RotaryEmbedding

Array = np.ndarray[Any, Any]
Precision = Literal["int8", "exact"]
PRECISIONS: tuple[Precision, ...] = ("int8", "exact")


def dequantize(w: QuantArray | PackedMatrix, *, out: Array | None = None) -> Array:
    """The values of quantized weights, float32, of the shape of `w`; the bits that the ``gguf`` package gives."""
    if isinstance(w, PackedMatrix):
        values = np.asarray(w)
        return values if out is None else _copy_into(out, values)
    if out is None:
        out = np.empty(w.shape, np.float32)
    _check_out(out, w.shape)
    first = 0
    for part in w.parts:
        target = out if len(w.parts) == 1 else out[first : first + len(part)]
        cpu_dequantize.dequantize(part.data, formats.get(part.format), target)
        first += len(part) if part.ndim > 1 else 0
    return out


def matmul(
    x: Any, w: QuantArray | PackedMatrix | Array, *, out: Array | None = None, precision: Precision = "int8"
) -> Array:
    """Multiply activations by weights, x @ w.T.

    Parameters
    ----------
    x : (..., columns) floats
    w : (rows, columns)
        A `QuantArray` is packed on first use, and keeps the packed form.
    out : (..., rows) float32, C-contiguous, optional
        Where the product goes.
    precision : "int8" or "exact"
        "int8" rounds x to 8 bits with a scale per 32 columns, and once more what that leaves over beside an outlier
        (normalized mean squared error at most 5e-4, 3e-5 on Gaussian x).  "exact" computes in float32.  Weights that
        are floats are always multiplied in float32.

    Returns
    -------
    (..., rows) float32
        A row's bits depend on that row of x alone, not on the number of threads or of other rows.  A row with NaN or
        infinity gives NaN.

    Raises
    ------
    ValueError
        If the numbers of columns differ, or `out` doesn't fit.
    """
    return affine(x, packed(w), None, out=out, precision=precision)


def affine(
    x: Any, matrix: PackedMatrix, bias: Array | None, *, out: Array | None = None, precision: Precision = "int8"
) -> Array:
    """x @ matrix.T + bias, as in `matmul`; bias (rows,) float32."""
    _check.choice("precision", precision, PRECISIONS)
    x = as_numpy(x, "x")
    rows, columns = matrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {x.shape}; weights {matrix.shape} need (..., {columns})")
    shape = (*x.shape[:-1], rows)
    if out is None:
        out = np.empty(shape, np.float32)
    else:
        _check_out(out, shape)
    if out.size:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1, columns)
        _multiply(flat, matrix, out.reshape(-1, rows), precision == "exact")
        if bias is not None:
            cpu_matmul.add_bias(out.reshape(-1, rows), bias, parts=parts_of(len(flat)))
    return out


def _multiply(x: Array, matrix: PackedMatrix, out: Array, exact: bool) -> None:
    last: Any = None
    for part in matrix.parts:
        layout = part.layout
        floats, group = layout.bits >= 16, min(layout.group, CELL)
        key = "floats" if floats else (group, 0 if exact else layout.zero)
        if key != last:
            last = key
            if floats or exact:
                prepared = Activations.exact_room(len(x), x.shape[1], 0 if floats else group)
                arrange(x, 0 if floats else group, prepared, parts=parts_of(len(x)))
            else:
                prepared = Activations.room(len(x), x.shape[1], group)
                quantize(layout.zero, group)(x, prepared, parts=parts_of(len(x), TARGET.rows))
        work = part.packed.codes.nbytes * -(-len(x) // TARGET.rows)
        each = _PARTS_FEW if len(x) <= TARGET.rows else _PARTS_MANY
        parts = min(1 + work // _WORK, each * get_num_threads()) if work > _ALONE or is_recording() else 1
        cpu_matmul.product(layout, exact)(part.packed, prepared, out, parts=parts, streams=part.packed.codes)


_ALONE = 1 << 20  # bytes of weights that one thread has read before another, unless it runs already, is worth waking
_WORK = 1 << 13  # bytes of weights, read once for each block of activations, that are worth a part
# Parts for each thread.  Memory is read fastest in long pieces; where arithmetic binds, small ones end together.
_PARTS_FEW, _PARTS_MANY = 4, 16


def parts_of(rows: int, least: int = 4) -> int:
    """Into how many parts the work on so many rows is divided, `least` in each: several for each thread."""
    return max(1, min(rows // least, 4 * get_num_threads()))


def packed(w: QuantArray | PackedMatrix | Array) -> PackedMatrix:
    """The packed form of weights.  A `QuantArray` keeps it, so that it is made once."""
    if isinstance(w, PackedMatrix):
        return w
    if not isinstance(w, QuantArray):
        return PackedMatrix(as_numpy(w, "w"))
    if w.cached is None:
        w.cached = PackedMatrix(w)
    return w.cached  # type: ignore[no-any-return]


def rope(x: Any, positions: Any, rotary: RotaryEmbedding, *, out: Array | None = None) -> Array:
    """Rotate heads by the angles of their positions.

    Parameters
    ----------
    x : (tokens, heads, head_dim) floats
    positions : (tokens,) integers, or one integer: the position of the first token
    rotary : RotaryEmbedding

    Returns
    -------
    (tokens, heads, head_dim) float32

    Raises
    ------
    ValueError
        For other shapes, or a negative position.
    """
    x = np.ascontiguousarray(as_numpy(x, "x"), np.float32)
    _check.shape("x", x, ("tokens", "heads", "head_dim"))
    if rotary.rope_dims > x.shape[2]:
        raise ValueError(f"x has heads of {x.shape[2]}, shorter than the {rotary.rope_dims} that rotate")
    positions = token_positions(positions, len(x))
    if out is None:
        out = np.empty(x.shape, np.float32)
    _check_out(out, x.shape)
    cos, sin = rotary.table(int(positions.max(initial=-1)) + 1)
    cpu_rope.rotate(x, cos, sin, positions, rotary.neox, out, parts=parts_of(len(x)))
    return out


def token_positions(positions: Any, tokens: int) -> Array:
    """Check positions, given as one start or one for each token → (tokens,) int64."""
    positions = np.asarray(as_numpy(positions, "positions"))
    if positions.dtype.kind not in "iu" and positions.size:
        raise ValueError(f"positions have dtype {positions.dtype}; expected integers")
    positions = positions.astype(np.int64)
    if positions.ndim == 0:
        positions = positions + np.arange(tokens)
    _check.shape("positions", positions, (tokens,))
    if positions.size and positions.min() < 0:
        token = int(positions.argmin())
        raise ValueError(f"positions[{token}] is {positions[token]}; a position is at least 0")
    return positions


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: str | MHAMaskVariant | Mask = "causal",
    scale: float | None = None,
    out: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of queries over given keys and values.

    Parameters
    ----------
    q : (tokens, heads, head_dim) floats
    k : (keys, kv_heads, head_dim) floats;  v : (keys, kv_heads, value_dim) floats
        `heads` is a multiple of `kv_heads`.  float16 keys and values are kept as they are, others become float32.
    mask : str, MHAMaskVariant or mask
        The last query is aligned with the last key.
    scale : float, optional
        Factor of the scores, 1 / sqrt(head_dim) by default.
    return_lse : bool
        Return also the logarithm of each row's sum of exponentials, (tokens, heads).

    Returns
    -------
    (tokens, heads, value_dim) float32
        Computed in float32; exp2 has a relative error below 3e-7.  A query that sees no key gives zeros.
    """
    q, k, v = (as_numpy(a, name) for a, name in ((q, "q"), (k, "k"), (v, "v")))
    _check.shape("q", q, ("tokens", "heads", "head_dim"))
    _check.shape("k", k, ("keys", "kv_heads", q.shape[2]))
    _check.shape("v", v, (*k.shape[:2], "value_dim"))
    tokens, heads, head_dim = q.shape
    keys, kv_heads, value_dim = v.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, k has {kv_heads}; expected a multiple")
    if tokens > keys:
        raise ValueError(f"q has {tokens} tokens, k has {keys}; the last of each are aligned, so k needs as many")
    chosen = masks.get(mask)
    dtype = "float16" if k.dtype == v.dtype == np.float16 else "float32"
    cache = KVCache(KVCacheParams(kv_heads, head_dim, value_dim, dtype=dtype))
    store(np.concatenate([k.reshape(keys, -1), v.reshape(keys, -1)], axis=1, dtype=np.float32), cache)
    offsets = np.array([0, tokens])
    queries = np.ascontiguousarray(q, np.float32)
    result, lse = attend(queries, cache, offsets, chosen, scale or head_dim**-0.5, exact=True)
    if out is not None:
        result = _copy_into(out, result)
    return (result, lse) if return_lse else result


def store(kv: Array, cache: KVCache) -> None:
    """Append keys and values, (tokens, n_kv_heads · (head_dim + value_dim)) float32, to a cache of one sequence."""
    tokens, start = len(kv), int(cache.lengths[0])
    cache.reserve(cache.lengths + tokens)
    zeros, places = np.zeros(tokens, np.int64), np.arange(start, start + tokens)
    nothing, q = np.empty((1, 0), np.float32), np.empty((tokens, 0, cache.params.head_dim), np.float32)
    batch = Batch(zeros, places, zeros, np.array([0, tokens]))
    rotate_and_store(kv, nothing, nothing, batch, False, cache, q)


def rotate_and_store(qkv: Array, cos: Array, sin: Array, batch: Batch, neox: bool, cache: KVCache, q: Array) -> None:
    """Rotate queries into q, append rotated keys, and values, to a cache that has room: see `qattn.cpu.rope`."""
    run = cpu_rope.rotate_and_store(cache.params.kind)
    run(qkv, cos, sin, batch, neox, cache.view(), cache.lengths, q, parts=parts_of(len(qkv)))


def attend(
    q: Array, cache: KVCache, row_offsets: Array, mask: Mask, scale: float, *, exact: bool, out: Array | None = None
) -> tuple[Array, Array]:
    """Attention of the last tokens of each sequence in a cache: out (tokens, heads, value_dim), lse (tokens, heads).

    q : (tokens, heads, head_dim) float32, rotated;  row_offsets : (sequences + 1,) int64
    A bfloat16 cache is multiplied in bfloat16 pairs, unless `exact`.
    """
    kind, view = cache.params.kind, cache.view()
    storage = cpu_attention.Storage(kind, "bf16" if kind == "bf16" and not exact else "f32")
    out = np.empty((*q.shape[:2], view.value_dim), np.float32) if out is None else out
    lse = np.empty(q.shape[:2], np.float32)
    partial = cpu_attention.Partial.room(row_offsets, cache.capacity, q.shape[1], view.value_dim)
    large = cache.capacity * q.size > _LARGE or is_recording()
    parts, slots = 4 * get_num_threads() if large else 1, np.arange(cache.sequences)
    run = cpu_attention.attend(storage, type(mask))
    run(q, view, slots, row_offsets, cache.lengths, np.float32(scale), mask, out, lse, partial, parts=parts)
    if partial.lse.size:
        cpu_attention.merge(row_offsets, cache.lengths, cache.params.n_kv_heads, partial, out, lse, parts=parts)
    return out, lse


_LARGE = 1 << 20  # products of queries and keys that take longer than waking a thread


def _check_out(out: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        came = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out is {came}; expected a C-contiguous float32 array of shape {shape}")


def _copy_into(out: Array, values: Array) -> Array:
    _check_out(out, values.shape)
    out[...] = values
    return out


array.install_engine(array.Engine(dequantize, matmul))
