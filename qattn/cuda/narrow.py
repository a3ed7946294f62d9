"""Blocks of 32 numbers → codes and factors, with the bits of `qattn.cpu.narrow`: a warp rounds a block, a lane each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, float64, int32, uint8, uint32

from qattn import cache_types
from qattn.cache_types import BLOCK, LARGEST_F16, CacheType
from qattn.cuda import ptx
from qattn.cuda.kernel import device
from qattn.cuda.warps import ALL_LANES, warp_max

_SMALLEST = 2.0**-126  # of which the inverse is finite


@functools.cache
def encode_row(kind: str) -> Callable[..., Any]:
    """A device function for one warp: (source, start, size, target, row): float32 to the row that begins there.

    See `qattn.cuda.attend_codes` for how it lies.  NaN and infinity become finite.
    """
    type_ = cache_types.of_kind(kind)
    code_bytes, offset = BLOCK * type_.bits // 8, type_.offset
    rounded, put = _ROUNDERS[type_.rounding](type_), _put_codes(type_)

    @device
    def put_factor(target, at, value):
        bits = int32(ptx.f32_to_f16(value))
        target[at], target[at + 1] = uint8(bits & 0xFF), uint8(bits >> 8)

    @device
    def run(source, start, size, target, row):
        lane, blocks, block = int32(cuda.threadIdx.x & 31), int32((size + 31) >> 5), int32(0)
        while block < blocks:
            x, d = float32(0), int32(32 * block + lane)
            if d < size:  # bounded, since it is read back as float16
                x = min(max(source[start + d], float32(-LARGEST_F16)), float32(LARGEST_F16))
            code, scale, low = rounded(x)
            put(target, row + block * code_bytes, lane, code)
            if lane == 0:
                at = row + blocks * code_bytes + 2 * block
                put_factor(target, at, scale)
                if offset:
                    put_factor(target, at + 2 * blocks, low)
            block = int32(block + 1)

    return run


def _put_codes(type_: CacheType) -> Callable[..., Any]:
    """A device function for one warp: (target, at, lane, code): the codes of a block, one for each lane."""
    bits = type_.bits

    @device
    def put(target, at, lane, code):
        if bits == 8:
            target[at + lane] = uint8(code)
        else:
            low = int32(code & 15)
            other = cuda.shfl_xor_sync(ALL_LANES, low, 2)
            if lane & 2 == 0:
                target[at + 4 * (lane >> 3) + ((lane >> 2) & 1) + 2 * (lane & 1)] = uint8(low | other << 4)
        if bits == 5:
            asked = int32(8 * ((lane >> 2) & 3) + 2 * (lane & 3) + (lane >> 4))
            fifth = cuda.ballot_sync(ALL_LANES, cuda.shfl_sync(ALL_LANES, int32(code), asked) & 16 != 0)
            if lane == 0:
                ptx.store_4(target, at + 16, uint32(fifth))

    return put


@device
def _inverse(scale):
    """1 / scale, or 0 where that would be infinite."""
    return ptx.reciprocal(scale) if abs(scale) >= float32(_SMALLEST) else float32(0)


@device
def _peak(x):
    """The element of largest magnitude, the first of equals."""
    size = abs(x)
    first = int32(cuda.ffs(cuda.ballot_sync(ALL_LANES, size == warp_max(size))) - 1)
    return cuda.shfl_sync(ALL_LANES, x, first)


def _by_amax(type_: CacheType) -> Callable[..., Any]:
    zero = type_.zero

    @device
    def run(x):
        scale = ptx.divide(warp_max(abs(x)), float32(zero - 1))
        level = float64(ptx.multiply(x, _inverse(scale)))  # in float64: 0.49999997 is no 1
        return int32(level + (float64(0.5) if level >= float64(0) else float64(-0.5))) + zero, scale, float32(0)

    return run


def _by_peak(type_: CacheType) -> Callable[..., Any]:
    zero, most = type_.zero, (1 << type_.bits) - 1

    @device
    def run(x):
        scale = ptx.divide(_peak(x), float32(-zero))
        code = int32(ptx.multiply(x, _inverse(scale)) + float32(zero + 0.5))
        return min(code, int32(most)), scale, float32(0)

    return run


def _by_range(type_: CacheType) -> Callable[..., Any]:
    most = (1 << type_.bits) - 1

    @device
    def run(x):
        low = float32(-warp_max(float32(-x)))
        scale = ptx.divide(float32(warp_max(x) - low), float32(most))
        code = int32(ptx.multiply(float32(x - low), _inverse(scale)) + float32(0.5))
        return min(code, int32(most)), scale, low

    return run


def _by_table(type_: CacheType) -> Callable[..., Any]:
    first = float(type_.table[0])
    steps = tuple(((low + high) / 2, float(high)) for low, high in itertools.pairwise(type_.table))
    betweens, levels = (tuple(column) for column in zip(*steps, strict=True))
    count = len(steps)

    @device
    def run(x):
        scaled = ptx.multiply(x, _inverse(ptx.divide(_peak(x), float32(first))))
        code, level = int32(0), float32(first)
        for i in range(count):
            if scaled >= float32(betweens[i]):  # a tie goes up
                code, level = int32(i + 1), float32(levels[i])
        along, square, i = float32(0), float32(0), int32(0)
        while i < BLOCK:  # in order, for the same bits
            other, its = cuda.shfl_sync(ALL_LANES, x, i), cuda.shfl_sync(ALL_LANES, level, i)
            weighted = ptx.multiply(ptx.multiply(other, other), its)
            along = ptx.add(along, ptx.multiply(weighted, other))
            square = ptx.add(square, ptx.multiply(weighted, its))
            i = int32(i + 1)
        return code, ptx.divide(along, square) if square > float32(0) else float32(0), float32(0)

    return run


_ROUNDERS = {"amax": _by_amax, "peak": _by_peak, "range": _by_range, "table": _by_table}
