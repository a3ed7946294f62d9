"""Keys and values that are codes in blocks of 32, and how threads read them.

A *row* is one key or value: the codes of its blocks one after the other, then a float16 scale for each block, then an
offset for each, if the type has one.  Its length is a multiple of 4 bytes.  Tensor cores want pairs of float16, and a
lane wants eight neighbours, an *octet*, at a time.  So codes lie such that the two of a pair are 16 bits apart:

8 bits  element i of a block is byte i
4 bits  octet o is word o, whose nibbles are its elements 0, 2, 4, 6, 1, 3, 5, 7
5 bits  the lower four as those, then a word of the fifth: that of element 2 j + h of octet o is bit 4 o + j + 16 h

Put into the lowest bits of a float16 of 1024, a code is added to it: all that is left to do is subtract 1024 and the
code of level 0, and multiply by the scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int32, int64, uint32

from qattn import cache_types
from qattn.cache_types import BLOCK, CacheType
from qattn.cuda import ptx
from qattn.cuda.kernel import device
from qattn.cuda.values import widen_for

_1024 = 0x6400_6400  # twice, in float16
_256 = 0x5C00_5C00


@functools.cache
def stride_of(kind: str) -> Callable[..., Any]:
    """`qattn.cache_types.stride` as a device function of the size."""
    type_ = cache_types.of_kind(kind)
    in_blocks, block_bytes, single = type_.in_blocks, type_.block_bytes, kind == "f32"

    @device
    def run(size):
        if in_blocks:
            return int32((((size + 31) >> 5) * block_bytes + 3) & ~3)
        return int32(size if single else (size + 15) & ~15)

    return run


def _table_words(type_: CacheType, bias: int) -> tuple[int, ...]:
    """A type's levels, plus a bias, as bytes of four words."""
    levels = (np.array(type_.table or [0] * 16) + bias).astype(np.uint8)
    return tuple(int(word) for word in levels.view("<u4"))


# ------------------------------------------------------------------------------------------------ single elements


@functools.cache
def element_of(kind: str) -> Callable[..., Any]:
    """A device function (array, row, size, d) → element d, float32, of a row that begins at array[row]."""
    type_ = cache_types.of_kind(kind)
    if not type_.in_blocks:
        wide = widen_for(kind)

        @device
        def plain(array, row, size, d):
            return wide(array[row + d])

        return plain
    bits, zero, offset, has_table = type_.bits, type_.zero, type_.offset, bool(type_.table)
    code_bytes, t0, t1, t2, t3 = BLOCK * type_.bits // 8, *_table_words(type_, 128)

    @device
    def factor(array, at):
        return ptx.f16_to_f32(array[at] | int32(array[at + 1]) << 8)

    @device
    def code_of(array, block, i):
        if bits == 8:
            return int32(array[block + i])
        octet, nibble = int32(i >> 3), int32(((i >> 1) & 3) + 4 * (i & 1))
        code = int32(array[block + 4 * octet + (nibble >> 1)] >> (4 * (nibble & 1))) & 15
        if bits == 5:
            bit = int32(4 * octet + ((i >> 1) & 3) + 16 * (i & 1))
            code |= (int32(array[block + 16 + (bit >> 3)] >> (bit & 7)) & 1) << 4
        return int32(code)

    @device
    def coded(array, row, size, d):
        blocks, block = int32((size + 31) >> 5), int32(d >> 5)
        code = code_of(array, row + block * code_bytes, int32(d & 31))
        level = int32(code - zero)
        if has_table:
            low, high = ptx.permute(t0, t1, code & 7), ptx.permute(t2, t3, code & 7)
            level = int32(((high if code > 7 else low) & 0xFF) - 128)
        at = row + blocks * code_bytes + 2 * block
        value = ptx.multiply(float32(level), factor(array, at))
        if offset:
            value = float32(value + factor(array, at + 2 * blocks))
        return value

    return coded


# --------------------------------------------------------------------------------------------------------- octets


class Octets(NamedTuple):
    """Device functions for rows of one type and size; words of a slot lie `step` bytes apart in shared memory."""

    bring: Callable[..., Any]
    """(array, row, block, octet, to, step): begin to copy an octet, and its factors, to a slot."""
    pairs: Callable[..., Any]
    """(from_, step, block, octet) → the octet in a slot as four pairs of float16."""


def in_codes(kind: str) -> bool:
    """Whether a kind is read in octets, and not in float16 or bfloat16 as it lies."""
    return cache_types.of_kind(kind).bits <= 8


@functools.cache
def octets(kind: str, size: int) -> Octets:
    """How rows of `size` elements are read."""
    type_ = cache_types.of_kind(kind)
    blocks, code_bytes = -(-size // BLOCK), BLOCK * type_.bits // 8
    bits, in_blocks, offset, two_words = type_.bits, type_.in_blocks, type_.offset, type_.bits in (5, 8)
    each, scales, scale_word, offset_word = 8 if bits == 8 else 4, blocks * code_bytes, 2 if two_words else 1, 3

    @device
    def bring(array, row, block, octet, to, step):
        codes = row + int64(uint32(block * code_bytes + octet * each))
        ptx.copy_async_4(array, codes, to)
        if bits == 8:
            ptx.copy_async_4(array, codes + 4, to + uint32(step))
        if bits == 5:
            ptx.copy_async_4(array, row + int64(uint32(block * code_bytes + 16)), to + uint32(step))
        if in_blocks:
            ptx.copy_async_4(array, row + int64(uint32(scales + (block & ~1) * 2)), to + uint32(scale_word * step))
        if offset:
            there = uint32(scales + ((blocks + block) & ~1) * 2)
            ptx.copy_async_4(array, row + int64(there), to + uint32(offset_word * step))

    @device
    def twice(from_, number):
        """Factor `number` of a row, in both halves, from the word that it shares with its neighbour."""
        return ptx.permute(ptx.load_shared_4(from_), 0, uint32(0x1010) + uint32(0x2222) * uint32(number & 1))

    decode = _decoder(type_)

    @device
    def pairs(from_, step, block, octet):
        first, second, scale, start = ptx.load_shared_4(from_), uint32(0), uint32(0), uint32(0)
        if two_words:
            second = ptx.load_shared_4(from_ + uint32(step))
        if in_blocks:
            scale = twice(from_ + uint32(scale_word * step), block)
        if offset:
            start = twice(from_ + uint32(offset_word * step), blocks + block)
        return decode(first, second, octet, scale, start)

    return Octets(bring, pairs)


def _decoder(type_: CacheType) -> Callable[..., Any]:
    """A device function (first, second, octet, scale, start) → four pairs, from codes and pairs of factors."""
    bits, offset, has_table = type_.bits, type_.offset, bool(type_.table)
    zero = _1024 + (128 if has_table else type_.zero) * 0x1_0001
    t0, t1, t2, t3 = _table_words(type_, 128)

    @device
    def finished(code, scale, start):
        level = ptx.subtract_f16(code | uint32(_1024), uint32(zero))
        return ptx.multiply_add_f16(level, scale, start) if offset else ptx.multiply_f16(level, scale)

    @device
    def looked_up(codes):
        """Four codes, in the lower nibbles → a byte for each."""
        low, high = ptx.permute(t0, t1, codes & 0x7777), ptx.permute(t2, t3, codes & 0x7777)
        return ptx.permute(low, high, uint32(0x3210) | (codes & 0x8888) >> 1)

    @device
    def nibbles(first, second, octet, scale, start):
        fifth = uint32(second >> (4 * uint32(octet)))
        p = (
            (first & 0xF_000F) | (fifth << 4 & 0x10_0010),
            (first >> 4 & 0xF_000F) | (fifth << 3 & 0x10_0010),
            (first >> 8 & 0xF_000F) | (fifth << 2 & 0x10_0010),
            (first >> 12 & 0xF_000F) | (fifth << 1 & 0x10_0010),
        )
        if has_table:
            even, odd = looked_up(first), looked_up(first >> 16)
            p = (
                ptx.permute(even, odd, 0x0400) & 0xFF_00FF, ptx.permute(even, odd, 0x0501) & 0xFF_00FF,
                ptx.permute(even, odd, 0x0602) & 0xFF_00FF, ptx.permute(even, odd, 0x0703) & 0xFF_00FF,
            )  # fmt: skip
        return (
            finished(p[0], scale, start), finished(p[1], scale, start),
            finished(p[2], scale, start), finished(p[3], scale, start),
        )  # fmt: skip

    @device
    def two_bytes(word, selector, scale):
        return finished(ptx.permute(word, 0, selector), scale, uint32(0))

    @device
    def whole_bytes(first, second, octet, scale, start):
        return (
            two_bytes(first, 0x4140, scale), two_bytes(first, 0x4342, scale),
            two_bytes(second, 0x4140, scale), two_bytes(second, 0x4342, scale),
        )  # fmt: skip

    @device
    def two_floats(word, selector):
        """e4m3 moved to float16's place: exponents are 8 too small there."""
        both = ptx.permute(word, 0, selector)
        return ptx.multiply_f16((both & 0x8000_8000) | (both & 0x7F00_7F00) >> 1, _256)

    @device
    def floats(first, second, octet, scale, start):
        return (
            two_floats(first, 0x1404), two_floats(first, 0x3424),
            two_floats(second, 0x1404), two_floats(second, 0x3424),
        )  # fmt: skip

    if not type_.in_blocks:
        return floats
    return whole_bytes if bits == 8 else nibbles


# --------------------------------------------------------------------------------------------------------- pieces


class Piece(NamedTuple):
    """Device functions for 8, 4 or 2 neighbours of a row of any kind but float32, whose slot is 16 bytes of a lane.

    The lanes of a warp have slots side by side.  The piece begins at element d + start, where start is a constant.
    """

    begin: Callable[..., Any]
    """(array, row, d, start, to): begin to copy it to the lane's slot."""
    taken: Callable[..., Any]
    """(from_, d, start) → it, in registers of two numbers each."""


@functools.cache
def piece(kind: str, size: int, width: int) -> Piece:
    """How `width` neighbours in rows of `size` elements are read."""
    if in_codes(kind):
        return _coded_piece(octets(kind, size), width)
    copy = {8: ptx.copy_async_16, 4: ptx.copy_async_8, 2: ptx.copy_async_4}[width]
    load = {8: ptx.load_shared_16, 4: ptx.load_shared_8, 2: _load_2}[width]

    @device
    def begin(array, row, d, start, to):
        copy(array, row + int64(uint32(d)) + start, to)

    @device
    def taken(from_, d, start):
        return load(from_)

    return Piece(begin, taken)


@device
def _load_2(from_):
    return (ptx.load_shared_4(from_),)


def _coded_piece(octet: Octets, width: int) -> Piece:
    """The same for codes, a whole octet of which is read.  Words of a slot are apart, so that lanes reach all banks."""
    bring, pairs = octet

    @device
    def place(slot):
        return uint32(slot - uint32(12) * uint32(cuda.threadIdx.x & 31))

    @device
    def begin(array, row, d, start, to):
        at = uint32(d + start)
        bring(array, row, at >> 5, at >> 3 & 3, place(to), 128)

    @device
    def whole(from_, d, start):
        at = uint32(d + start)
        return pairs(place(from_), 128, at >> 5, at >> 3 & 3)

    @device
    def half(from_, d, start):
        a, b, c, e = whole(from_, d, start)
        second = uint32(d + start) & 4 != 0
        return c if second else a, e if second else b

    @device
    def quarter(from_, d, start):
        a, b = half(from_, d, start)
        return (b if uint32(d + start) & 2 != 0 else a,)

    return Piece(begin, {8: whole, 4: half, 2: quarter}[width])
