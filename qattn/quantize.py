"""Floats to quantized rows.

The older formats are rounded as the ``gguf`` package rounds them.  For the others a search of our own makes the squared
error small.  It has the weights of a group one below the other, so that NumPy works on thousands of groups at once, and
adds up in the same order on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize

from qattn import formats
from qattn._backend import as_numpy
from qattn.array import QuantArray
from qattn.errors import FormatError

Array = np.ndarray[Any, Any]

_SLAB = 1 << 16  # weights at a time, whole blocks of any format: a few float32 arrays of them fit into caches
_F16_MAX, _F16_TINY = 65504.0, 2.0**-24
_STRETCHES = np.linspace(-1.8, 1.8, 13, dtype=np.float32)  # in levels; 37 of them lower errors by less than 0.5 %


def quantize(x: Any, format: str) -> QuantArray:
    """Round numbers to a quantized format.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4, BF16 and F16 become the bits that ``gguf.quants.quantize`` gives.
    Q2_K to Q6_K and Q2_0 are searched for a small squared error: on Gaussian numbers, the root of its mean is 0.90
    (Q2_K), 0.95, 0.99, 0.97 and 0.95 (Q6_K) times that of ggml's own quantization.  Q1_0 keeps signs and the mean
    magnitude.

    Parameters
    ----------
    x : (..., columns) real numbers
        Made float32 first, except for F64.  What is small against 6e-8, the smallest float16, becomes zero where scales
        are float16.
    format : str
        The name of the format: one of those above, F32 or F64.

    Returns
    -------
    QuantArray
        Of the shape of `x`.

    Raises
    ------
    FormatError
        The format is unknown, or its blocks don't fill the rows.
    NotImplementedError
        The format is one that can be read, but not written.
    ValueError
        `x` has no axis, isn't real, or has a NaN, an infinity or a number that is too large for the format.
    """
    fmt = formats.get(format)
    if format not in _ENCODERS:
        raise NotImplementedError(f"can't quantize to {format}; these work: {', '.join(sorted(_ENCODERS))}")
    x = as_numpy(x)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"x has dtype {x.dtype.name}; expected real numbers")
    if x.ndim < 1:
        raise ValueError("x has shape (); expected (..., columns)")
    blocks, rest = divmod(x.shape[-1], fmt.block)
    if rest:
        remedy = f"pad x to {(blocks + 1) * fmt.block} columns"
        raise FormatError(f"x has {x.shape[-1]} columns; {format} has blocks of {fmt.block}: {remedy}")
    x = np.ascontiguousarray(x)
    data = np.empty((*x.shape[:-1], blocks * fmt.bytes), np.uint8)
    for start in range(0, x.size, _SLAB):
        end = start + _SLAB
        data.reshape(-1, fmt.bytes)[start // fmt.block : end // fmt.block] = _encode(x, fmt, start, end)
    return QuantArray(data, format)


def _encode(x: Array, fmt: formats.Format, start: int, end: int) -> Array:
    """The blocks of part of contiguous `x`, (blocks, bytes); ValueError for numbers that have no code."""
    part = x.reshape(-1)[start:end]
    with np.errstate(all="ignore"):  # what overflows is found below, what underflows is meant to be zero
        values = part.astype("<f8" if fmt.name == "F64" else "<f4", copy=False)
        fits = np.isfinite(values)
        if fits.all():
            encoded = _ENCODERS[fmt.name](values, fmt).reshape(-1, fmt.bytes)
            if np.abs(values).max() <= _F16_MAX or fmt.name in ("F32", "F64"):
                return encoded
            fits = np.isfinite(formats.dequantize_reference(fmt, encoded)).reshape(-1)
            if fits.all():
                return encoded
        worst = np.where(fits, -1, np.where(np.isnan(values), np.inf, np.abs(values))).argmax()
    index = ", ".join(map(str, np.unravel_index(start + worst, x.shape)))
    reason = f"too large for {fmt.name}" if np.isfinite(part[worst]) else "expected finite numbers"
    raise ValueError(f"x[{index}] is {part[worst]}; {reason}")


# Search


def _fit(x: Array, fmt: formats.Format) -> tuple[Array, Array]:
    """The scale and offset of each group that nearly minimize (scale · level - offset - x)², for offset ≥ 0.

    x : (weights of a group, groups) float32.  Returns two (groups,) float32; offsets are 0 where the format has none.

    The largest magnitude is put near the outermost level, at some places inside and outside of it.  Each of them gives
    levels, and levels give the best scale and offset, by linear regression.
    """
    floor = np.minimum(x.min(axis=0), 0) if fmt.offset_bits else np.zeros(x.shape[1], np.float32)
    y = x - floor
    low, high, total = y.min(axis=0), y.max(axis=0), y.sum(axis=0)
    peak = np.where(high >= -low, high, low)
    outermost = max(_level_range(fmt), key=abs)
    best, scale, offset = (np.full(x.shape[1], value, np.float32) for value in (np.inf, np.nan, np.nan))
    levels = np.empty_like(y)
    for stretch in _STRETCHES:
        _round(y, peak / (outermost + stretch), fmt, levels)
        slope, start, loss = _regress(levels, y, total, -floor, bool(fmt.offset_bits))
        better = loss < best
        for kept, found in ((best, loss), (scale, slope), (offset, -floor - start)):
            np.copyto(kept, found, where=better)
    return scale, offset


def _regress(levels: Array, y: Array, total: Array, most: Array, free: bool) -> tuple[Array, Array, Array]:
    """The line y ≈ slope · level + start of each group, with start ≤ `most` if `free`, else = `most`.

    levels, y : (weights of a group, groups);  total : y.sum(axis=0).  The loss lacks the constant Σ y².
    """
    count = len(y)
    sum_l, sum_ll, sum_ly = levels.sum(axis=0), (levels * levels).sum(axis=0), (levels * y).sum(axis=0)
    start = most
    if free:
        spread = count * sum_ll - sum_l * sum_l  # whole numbers below 2**24: exact
        slope = np.where(spread > 0, (count * sum_ly - sum_l * total) / np.maximum(spread, 1), 0)
        start = np.minimum((total - slope * sum_l) / count, most)
    slope = (sum_ly - start * sum_l) / np.maximum(sum_ll, 1)
    loss = slope * (slope * sum_ll + 2 * (start * sum_l - sum_ly)) + start * (count * start - 2 * total)
    return slope, start, loss


def _round(y: Array, scale: Array, fmt: formats.Format, out: Array) -> Array:
    """The levels nearest to y / scale, or 0 where a scale is so small that its inverse could overflow."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    np.multiply(y, inverse, out=out)
    np.rint(out, out=out)
    return np.clip(out, *_level_range(fmt), out=out)


def _level_range(fmt: formats.Format) -> tuple[int, int]:
    """The lowest and the highest level."""
    return -fmt.zero, (1 << fmt.bits) - 1 - fmt.zero


# K-quants


def _k_quant(values: Array, fmt: formats.Format) -> Array:
    """Fit scales and offsets, round these to steps, then choose the best step among neighbours."""
    most, layout = _K_QUANTS[fmt.name]
    x = values.reshape(-1, fmt.group).T.copy()
    scale, offset = _fit(x, fmt)
    groups = fmt.block // fmt.group
    d, unit = _unit(scale, most, groups)
    dmin, offset_unit = _unit(offset, most, groups)
    offset_steps = np.rint(offset / offset_unit)
    x += offset_steps * offset_unit  # now near scale · level
    nearest, lowest = np.rint(scale / unit), 0 if fmt.offset_bits else -most
    best, steps = np.full_like(nearest, np.inf), nearest
    levels, error = np.empty_like(x), np.empty_like(x)
    for change in (0, -1, 1):
        candidate = np.clip(nearest + change, lowest, most)
        _round(x, candidate * unit, fmt, levels)
        np.multiply(levels, candidate * unit, out=error)
        error -= x
        error *= error
        loss = error.sum(axis=0)
        steps = np.where(loss < best, candidate, steps)
        best = np.minimum(loss, best)
    _round(x, steps * unit, fmt, levels)
    codes = (levels.T + fmt.zero).astype(np.uint8).reshape(-1, fmt.block)
    steps, offset_steps = (s.astype(np.int8).view(np.uint8).reshape(-1, groups) for s in (steps, offset_steps))
    return np.concatenate(layout(codes, steps, offset_steps, d, dmin), axis=1)


def _unit(values: Array, most: int, groups: int) -> tuple[Array, Array]:
    """The float16 that `values` are written in multiples of, up to ±most: its bytes, and for each group its value.

    Never zero: where the ideal one is below float16's range, values get fewer steps instead of none.
    """
    peak = np.abs(values).reshape(-1, groups).max(axis=1)
    unit = np.maximum(peak / most, _F16_TINY).astype(np.float16)
    unit = np.where(unit.astype(np.float32) * (most + 0.5) < peak, np.nextafter(unit, np.float16(np.inf)), unit)
    return unit.astype("<f2").reshape(-1, 1).view(np.uint8), np.repeat(unit.astype(np.float32), groups)


def _pack(values: Array, bits: int, stride: int) -> Array:
    """(blocks, n) → (blocks, n · bits / 8): each byte has the lowest bits of values that are `stride` apart."""
    parts = (values & ((1 << bits) - 1)).reshape(len(values), -1, 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(values), -1)


def _six_bits(s: Array, m: Array) -> Array:
    """The 12 bytes of 8 + 8 steps: #0-3 of both with the upper bits of #4-7 above them, then the nibbles of #4-7."""
    first, last = (np.concatenate([s[:, n : n + 4], m[:, n : n + 4]], axis=1) for n in (0, 4))
    return np.concatenate([first | last >> 4 << 6, _pack(last, 4, 4)], axis=1)


def _biased_six_bits(s: Array) -> Array:
    """The 12 bytes of 16 steps, which are biased by 32: the nibbles, then the upper bits."""
    return np.concatenate([_pack(s + 32, 4, 8), _pack((s + 32) >> 4, 2, 4)], axis=1)


# The largest step, and what blocks are made of, in the order of ggml's block_q2_K … block_q6_K (ggml-common.h):
# codes q, steps s of scales and m of offsets, and the float16 units d of s and e of m.  All are (blocks, …) uint8.
_K_QUANTS: dict[str, tuple[int, Callable[..., list[Array]]]] = {
    "Q2_K": (15, lambda q, s, m, d, e: [s | m << 4, _pack(q, 2, 32), d, e]),
    "Q3_K": (31, lambda q, s, m, d, e: [_pack(q >> 2, 1, 32), _pack(q, 2, 32), _biased_six_bits(s), d]),
    "Q4_K": (63, lambda q, s, m, d, e: [d, e, _six_bits(s, m), _pack(q, 4, 32)]),
    "Q5_K": (63, lambda q, s, m, d, e: [d, e, _six_bits(s, m), _pack(q >> 4, 1, 32), _pack(q, 4, 32)]),
    "Q6_K": (127, lambda q, s, m, d, e: [_pack(q, 4, 64), _pack(q >> 4, 2, 32), s, d]),
}


# Other formats


def _by_gguf(values: Array, fmt: formats.Format) -> Array:
    return gguf_quantize(values, GGMLQuantizationType[fmt.name]).view(np.uint8)


def _as_they_are(values: Array, fmt: formats.Format) -> Array:
    return values.view(np.uint8)


def _q1_0(values: Array, fmt: formats.Format) -> Array:
    """The mean magnitude, and a bit for each sign."""
    blocks = values.reshape(-1, fmt.block)
    d = np.abs(blocks).mean(axis=1, keepdims=True).astype("<f2")
    return np.concatenate([d.view(np.uint8), _pack((blocks >= 0).view(np.uint8), 1, 1)], axis=1)


def _q2_0(values: Array, fmt: formats.Format) -> Array:
    """A fitted scale, and the levels nearest to x / scale."""
    x = values.reshape(-1, fmt.block).T.copy()
    d = _fit(x, fmt)[0].astype("<f2")
    codes = (_round(x, d.astype(np.float32), fmt, x).T + fmt.zero).astype(np.uint8)
    return np.concatenate([d.reshape(-1, 1).view(np.uint8), _pack(codes, 2, 1)], axis=1)


_ENCODERS: dict[str, Callable[[Array, formats.Format], Array]] = {
    **dict.fromkeys(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16"], _by_gguf),
    **dict.fromkeys(("F32", "F64"), _as_they_are),
    **dict.fromkeys(_K_QUANTS, _k_quant),
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}
