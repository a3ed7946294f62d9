"""The functional API: arrays in, arrays out.

Arguments are checked here, before any work; the kernels below assume that they are right.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from qattn import _check, array, backends, devices, formats
from qattn._backend import as_array, as_float32, as_host, check_device, device_of, is_aligned, namespace
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.batch import check_row_offsets as check_row_offsets
from qattn.kv_cache import SequenceCache
from qattn.packing import PackedMatrix
from qattn.rope import RotaryEmbedding, Rotation

Array = np.ndarray[Any, Any]
Precision = Literal["fast", "int8", "exact"]
PRECISIONS: tuple[Precision, ...] = ("fast", "int8", "exact")


def dequantize(w: QuantArray | PackedMatrix, *, out: Array | None = None) -> Array:
    """The values of quantized weights, float32, of the shape of `w`; the bits that the ``gguf`` package gives.

    Weights on a GPU are dequantized there, to a CuPy array.
    """
    backend = backends.get(w.device.split(":")[0])
    with devices.current(w.device):
        out = output(out, devices.namespace(w.device), w.shape)
        if isinstance(w, PackedMatrix):
            for packed_part in w.parts:
                backend.unpack(packed_part, out)
            return out
        first = 0
        for part in w.parts:
            target = out if len(w.parts) == 1 else out[first : first + len(part)]
            backend.dequantize(part.data, formats.get(part.format), target)
            first += len(part) if part.ndim > 1 else 0
    return out


def matmul(
    x: Any, w: QuantArray | PackedMatrix | Array, *, out: Array | None = None, precision: Precision = "fast"
) -> Array:
    """Multiply activations by weights, x @ w.T.

    Parameters
    ----------
    x : (..., columns) floats
    w : (rows, columns)
        A `QuantArray` is packed on first use, and keeps the packed form.
    out : (..., rows) float32, C-contiguous, optional
        Where the product goes.
    precision : "fast", "int8" or "exact"
        "int8" rounds x to 8 bits with a scale per 32 columns, and once more what that leaves over beside an outlier
        (normalized mean squared error at most 5e-4, 3e-5 on Gaussian x).  "exact" computes in float32.  "fast" is
        "int8", or rounds both factors to bfloat16, which errs less (1e-5), where that is faster: for 40 rows or more on
        a CPU with tile registers (Intel's AMX), which take half the time; and for 256 or more on a GPU if cuBLAS
        proves to be faster there, which is measured when a size is first seen.  Weights that are floats are
        multiplied in float32, but for bfloat16 ones in tiles.

    Returns
    -------
    (..., rows) float32
        A row's bits depend on that row of x alone, not on the number of threads or of other rows; but for "fast",
        which may take bfloat16 for many.  A row with NaN or infinity gives NaN (infinity also itself, from cuBLAS).

    Raises
    ------
    ValueError
        If the numbers of columns differ, or `out` doesn't fit.
    """
    return affine(x, packed(w), None, out=out, precision=precision)


def affine(
    x: Any,
    matrix: PackedMatrix,
    bias: Array | None,
    *,
    factor: Array | None = None,
    limit: Array | None = None,
    out: Array | None = None,
    precision: Precision = "fast",
) -> Array:
    """clamp(x @ matrix.T · factor + bias, -limit, limit), as in `matmul`; the latter three (rows,) float32."""
    _check.choice("precision", precision, PRECISIONS)
    x = as_array(x, "x")
    check_device("x", x, "the weights are", matrix.device)
    rows, columns = matrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {x.shape}; weights {matrix.shape} need (..., {columns})")
    xp, backend, given = namespace(x), backends.of(x), out is not None
    with devices.current(matrix.device):
        out = output(out, xp, (*x.shape[:-1], rows))
        if out.size:
            flat, products = as_float32(x), out.reshape(-1, rows)
            flat = without(flat, out, xp) if given else flat
            if columns:
                backend.multiply(flat.reshape(-1, columns), matrix, products, precision)
            else:
                out[...] = 0
            if bias is not None or factor is not None or limit is not None:
                backend.finish(products, factor, bias, limit)
    return out


def affine_each(x: Array, matrix: PackedMatrix, *, precision: Precision = "fast") -> Array:
    """x[:, h] @ head h of matrix.T, for each head: x (tokens, heads, columns) float32 → (tokens, heads, rows).

    matrix : (heads · rows, columns), `divisible` into heads
    precision : as in `matmul`, but that "fast" is "int8" here
    """
    tokens, heads, _ = x.shape
    with devices.current(matrix.device):
        xp = namespace(x)
        out = xp.empty((tokens, heads, matrix.shape[0] // heads), np.float32)
        if out.size:
            backends.of(x).multiply_each(xp.ascontiguousarray(x), matrix, out, precision)
    return out


def packed(w: QuantArray | PackedMatrix | Array) -> PackedMatrix:
    """The packed form of weights.  A `QuantArray` keeps it, so that it is made once."""
    if isinstance(w, PackedMatrix):
        return w
    if not isinstance(w, QuantArray):
        return PackedMatrix(as_host(w, "w"))
    if w.cached is None:
        w.cached = PackedMatrix(w.to("cpu")).to(w.device)
    return w.cached


def rope(x: Any, positions: Any, rotary: RotaryEmbedding, *, out: Array | None = None) -> Array:
    """Rotate heads by the angles of their positions.

    Parameters
    ----------
    x : (tokens, heads, head_dim) floats
    positions : (tokens,) integers, or one integer: the position of the first token
        For an embedding with sections also (sections, tokens): a position for each of them.
    rotary : RotaryEmbedding

    Returns
    -------
    (tokens, heads, head_dim) float32

    Raises
    ------
    ValueError
        For other shapes, or a negative position.
    """
    x = as_array(x, "x")
    _check.shape("x", x, ("tokens", "heads", "head_dim"))
    if rotary.rope_dims > x.shape[2]:
        raise ValueError(f"x has heads of {x.shape[2]}, shorter than the {rotary.rope_dims} that rotate")
    positions = token_positions(positions, len(x), rotary)
    xp = namespace(x)
    with devices.current(device_of(x)):
        out = output(out, xp, x.shape)
        rotation, angles = rotary.rotation_at(positions, device_of(x))
        heads = as_float32(x)
        if heads is not out:  # elements are turned where they are
            heads = without(heads, out, xp)
        backends.of(x).rotate(heads, rotation, xp.asarray(angles), out)
    return out


def token_positions(positions: Any, tokens: int, rotary: RotaryEmbedding | None = None) -> Array:
    """Check positions, given as one start or one for each token → (tokens,) int64.

    For an embedding with sections also one for each section and token, or up to 4 for each token → (rows, tokens).
    """
    positions = np.asarray(as_host(positions, "positions"))
    _check.positions("positions", positions)
    positions = positions.astype(np.int64)
    if positions.ndim == 0:
        positions = positions + np.arange(tokens)
    expected: tuple[int, ...] = (tokens,)
    if positions.ndim == 2 and rotary is not None and rotary.sections:
        expected = (max(len(rotary.sections), min(len(positions), 4)), tokens)
    _check.shape("positions", positions, expected)
    return positions


def store(
    kv: Array,
    cache: SequenceCache,
    row_offsets: Array | None = None,
    rotation: Rotation | None = None,
    angles: Array | None = None,
) -> None:
    """Append keys and values, (tokens, n_kv_heads · (head_dim + value_dim)) float32, to a cache.

    row_offsets : (sequences + 1,) int64, whose tokens they are; not needed for a cache of one sequence
    rotation, angles : what keys turn by, and (tokens,) int64, its rows for them; they stay as they are without
    """
    xp, count = namespace(kv), len(kv)
    offsets = np.array([0, count]) if row_offsets is None else row_offsets
    lengths = cache.lengths + np.diff(offsets)
    cache.reserve(lengths)
    if rotation is None or angles is None:
        rotation, angles = Rotation.none(1, cache.device), np.zeros(count, np.int64)
    batch = Batch.appended(lengths, offsets)._replace(angles=angles).to(cache.device)
    no_queries = xp.empty((count, 0, cache.params.head_dim), np.float32)
    with cache.appending(lengths, offsets):
        backends.of(kv).rotate_and_store(kv, rotation, batch, cache, no_queries)
    cache.note(lengths)


def without(x: Any, out: Any, xp: Any) -> Any:
    """x, or a copy where writing to `out` would change it."""
    return x.copy() if xp.may_share_memory(x, out) else x


def output(out: Any, xp: Any, shape: tuple[int, ...]) -> Any:
    """`out`, checked, or a new array of NumPy's or CuPy's."""
    if out is None:
        return xp.empty(shape, np.float32)
    if not isinstance(out, xp.ndarray) or out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        came = f"{out.dtype} {out.shape}" if hasattr(out, "dtype") else type(out).__name__
        raise ValueError(f"out is {came}; expected a C-contiguous float32 array of shape {shape}")
    if xp is np and not out.flags.writeable:
        raise ValueError("out is read-only")
    if not is_aligned(out):
        raise ValueError("out starts in the middle of 16 bytes; on a GPU it must start at a multiple of them")
    return out


array.install_engine(array.Engine(dequantize, matmul))
