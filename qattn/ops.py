"""The functional API: arrays in, arrays out.

Arguments are checked here, before any work; the kernels below assume that they are right.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from qattn import _check, array, backends, devices, formats, masks
from qattn._backend import as_array, as_float32, as_host, device_of, is_aligned, namespace
from qattn.array import QuantArray
from qattn.batch import Batch
from qattn.errors import DeviceError
from qattn.kv_cache import KVCache, KVCacheParams
from qattn.masks import Mask, MHAMaskVariant
from qattn.packing import PackedMatrix
from qattn.rope import RotaryEmbedding, Rotation

Array = np.ndarray[Any, Any]
Precision = Literal["int8", "exact"]
PRECISIONS: tuple[Precision, ...] = ("int8", "exact")


def dequantize(w: QuantArray | PackedMatrix, *, out: Array | None = None) -> Array:
    """The values of quantized weights, float32, of the shape of `w`; the bits that the ``gguf`` package gives.

    Weights on a GPU are dequantized there, to a CuPy array.
    """
    backend = backends.get(w.device.split(":")[0])
    with devices.current(w.device):
        out = _output(out, devices.namespace(w.device), w.shape)
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
    x = as_array(x, "x")
    _same_device(x, matrix.device, "the weights are")
    rows, columns = matrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {x.shape}; weights {matrix.shape} need (..., {columns})")
    with devices.current(matrix.device):
        out = _output(out, namespace(x), (*x.shape[:-1], rows))
        if out.size:
            flat = as_float32(x).reshape(-1, columns)
            backend = backends.of(x)
            backend.multiply(flat, matrix, out.reshape(-1, rows), precision == "exact")
            if bias is not None:
                backend.add_bias(out.reshape(-1, rows), bias)
    return out


def packed(w: QuantArray | PackedMatrix | Array) -> PackedMatrix:
    """The packed form of weights.  A `QuantArray` keeps it, so that it is made once."""
    if isinstance(w, PackedMatrix):
        return w
    if not isinstance(w, QuantArray):
        return PackedMatrix(as_host(w, "w"))
    if w.cached is None:
        w.cached = PackedMatrix(w.to("cpu")).to(w.device)
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
    x = as_array(x, "x")
    _check.shape("x", x, ("tokens", "heads", "head_dim"))
    if rotary.rope_dims > x.shape[2]:
        raise ValueError(f"x has heads of {x.shape[2]}, shorter than the {rotary.rope_dims} that rotate")
    positions = token_positions(positions, len(x))
    xp = namespace(x)
    with devices.current(device_of(x)):
        out = _output(out, xp, x.shape)
        rotation = rotary.rotation(int(positions.max(initial=-1)) + 1, device_of(x))
        backends.of(x).rotate(as_float32(x), rotation, xp.asarray(positions), out)
    return out


def token_positions(positions: Any, tokens: int) -> Array:
    """Check positions, given as one start or one for each token → (tokens,) int64."""
    positions = np.asarray(as_host(positions, "positions"))
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
    q, k, v = (as_array(a, name) for a, name in ((q, "q"), (k, "k"), (v, "v")))
    for other, name in ((k, "k is"), (v, "v is")):
        _same_device(q, device_of(other), name)
    xp = namespace(q)
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
    scale = head_dim**-0.5 if scale is None else scale
    with devices.current(device_of(q)):
        cache = KVCache(KVCacheParams(kv_heads, head_dim, value_dim, dtype=dtype), device=device_of(q))
        kv = xp.concatenate([k.reshape(keys, -1), v.reshape(keys, -1)], axis=1).astype(np.float32, copy=False)
        store(as_float32(kv), cache)
        out = _output(out, xp, (tokens, heads, value_dim))
        queries, offsets = as_float32(q), xp.asarray(np.array([0, tokens]))
        _, lse = backends.of(q).attend(queries, cache, offsets, chosen, scale, exact=True, out=out)
    return (out, lse) if return_lse else out


def store(kv: Array, cache: KVCache) -> None:
    """Append keys and values, (tokens, n_kv_heads · (head_dim + value_dim)) float32, to a cache of one sequence."""
    tokens, start, xp = len(kv), int(cache.lengths[0]), namespace(kv)
    cache.reserve(cache.lengths + tokens)
    zeros, places = np.zeros(tokens, np.int64), np.arange(start, start + tokens)
    nothing, q = xp.empty((1, 0), np.float32), xp.empty((tokens, 0, cache.params.head_dim), np.float32)
    batch = Batch(*map(xp.asarray, (zeros, places, zeros, np.array([0, tokens]))))
    backends.of(kv).rotate_and_store(kv, Rotation(nothing, nothing, neox=False), batch, cache, q)
    cache.note(np.array([start + tokens]))


def _same_device(x: Any, device: str, what: str) -> None:
    if device_of(x) != device:
        raise DeviceError(f"x is on {device_of(x)}, and {what} on {device}; move one of them: .to({device_of(x)!r})")


def _output(out: Any, xp: Any, shape: tuple[int, ...]) -> Any:
    """`out`, checked, or a new array of NumPy's or CuPy's."""
    if out is None:
        return xp.empty(shape, np.float32)
    if not isinstance(out, xp.ndarray) or out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        came = f"{out.dtype} {out.shape}" if hasattr(out, "dtype") else type(out).__name__
        raise ValueError(f"out is {came}; expected a C-contiguous float32 array of shape {shape}")
    if not is_aligned(out):
        raise ValueError("out starts in the middle of 16 bytes; on a GPU it must start at a multiple of them")
    return out


array.install_engine(array.Engine(dequantize, matmul))
