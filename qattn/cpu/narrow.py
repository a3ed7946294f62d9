"""float32 → what a cache stores: single elements narrowed, or blocks of 32 rounded to codes and scales.

Blocks are rounded as ggml's ``quantize_row_*_ref`` rounds them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from qattn.cache_types import BLOCK, CacheType
from qattn.cpu._jit import generated, helper
from qattn.cpu.simd import LANES, Emitter, Value, micro_kernel


def _to_f8(e: Emitter, x: Value) -> Value:
    """16 float32 rounded to e4m3, ties to even, as int8; ±448 beyond it."""
    word = x.bits(e.I32V)
    magnitude = word & 0x7FFFFFFF
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Adding 2**14 lines a denormal's last bit, 2**-9, up with the sum's, so that the addition rounds it.
    tiny = (magnitude.bits(e.F32) + 2.0**14).bits(e.I32V) - (141 << 23)
    code = magnitude.compare("<", 121 << 23).where(tiny, normal)
    code = code.compare(">", 0x7E).where(e.constant(0x7E, e.I32V), code)
    return (code | ((word >> 24) & 0x80)).to(e.I8V)


def narrow_kernel(kind: str) -> Any:
    """float32 → elements of a float type, 16 at a time."""

    @micro_kernel
    def run(e, x, out, vectors):
        with e.loop(vectors) as i:
            value = x.at(i * (4 * LANES)).load(e.F32)
            if kind == "f32":
                out.at(i * (4 * LANES)).store(value)
            elif kind == "f16":
                out.at(i * (2 * LANES)).store(e.to_f16(value))
            elif kind == "bf16":
                out.at(i * (2 * LANES)).store(e.to_bf16(value))
            else:
                out.at(i * LANES).store(_to_f8(e, value))

    return run


@helper
def _inverse(scale):
    """1 / scale, or 0 where that is infinite."""
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    return inverse if abs(inverse) < np.inf else np.float32(0)


@helper
def _peak(x):
    """The element of largest magnitude, the first of equals."""
    largest, peak = np.float32(0), np.float32(0)
    for i in range(BLOCK):
        if abs(x[i]) > largest:
            largest, peak = abs(x[i]), x[i]
    return peak


def block_rounder(type_: CacheType) -> Any:
    """A function (x, codes) → scale, offset: x (32,) float32, codes (32,) uint8, overwritten."""
    return _ROUNDERS[type_.rounding](type_)


def _by_amax(type_: CacheType) -> Any:
    most, zero = np.float32(type_.zero - 1), type_.zero

    @generated(type_.kind)
    def run(x, codes):
        scale = abs(_peak(x)) / most
        inverse = _inverse(scale)
        for i in range(BLOCK):
            level = x[i] * inverse
            codes[i] = np.int32(level + (0.5 if level >= 0 else -0.5)) + zero  # in float64: 0.49999997 is no 1
        return scale, np.float32(0)

    return run


def _by_peak(type_: CacheType) -> Any:
    zero, half, most = np.float32(type_.zero), np.float32(type_.zero + 0.5), (1 << type_.bits) - 1

    @generated(type_.kind)
    def run(x, codes):
        scale = _peak(x) / -zero
        inverse = _inverse(scale)
        for i in range(BLOCK):
            codes[i] = min(np.int32(x[i] * inverse + half), most)
        return scale, np.float32(0)

    return run


def _by_range(type_: CacheType) -> Any:
    most = (1 << type_.bits) - 1
    steps = np.float32(most)

    @generated(type_.kind)
    def run(x, codes):
        low = high = x[0]
        for i in range(1, BLOCK):
            low, high = min(low, x[i]), max(high, x[i])
        scale = (high - low) / steps
        inverse = _inverse(scale)
        for i in range(BLOCK):
            codes[i] = min(np.int32((x[i] - low) * inverse + np.float32(0.5)), most)
        return scale, low

    return run


def _by_table(type_: CacheType) -> Any:
    levels = np.array(type_.table, np.float32)

    @micro_kernel
    def encode(e, x, codes, inverse):
        one, factor = e.constant(1, e.I32V), inverse.splat(e.F32)
        for half in range(BLOCK // LANES):
            level, code = x.at(half * 4 * LANES).load(e.F32) * factor, one * 0
            for low, high in itertools.pairwise(type_.table):
                code = level.compare(">=", (low + high) / 2).where(code + one, code)  # a tie goes up
            codes.at(half * LANES).store(code.to(e.I8V))

    @generated(type_.kind)
    def run(x, codes):
        scale = _peak(x) / levels[0]
        encode((x, codes, _inverse(scale)))
        along, square = np.float32(0), np.float32(0)
        for i in range(BLOCK):
            level = levels[codes[i]]
            weighted = x[i] * x[i] * level
            along += weighted * x[i]
            square += weighted * level
        return along / square if square > 0 else np.float32(0), np.float32(0)

    return run


_ROUNDERS = {"amax": _by_amax, "peak": _by_peak, "range": _by_range, "table": _by_table}
