"""Packed weights to float32, float16 or bfloat16 values: see `qattn.layout` for how they lie.

Vectors of 16 bytes, four codes of four rows, are read from global memory.  A thread makes eight columns of each of
these rows, 16 or 32 bytes of values, and does everything else once for 32 weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from qattn.cuda import ptx
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.values import ELEMENTS, KINDS, key, load_four_of, narrow_for, store_for
from qattn.layout import OCTET, PLANES, TILE, Layout, Packed

Array = Any  # of CuPy
THREADS = 256
_CHUNK = 512  # columns of a thread block, for 16 rows
_MAGIC = 0x4B000000  # the bits of 2**23: the lowest bits of float32 integers above it are those of the integer


def unpack(packed: Packed, layout: Layout, out: Array) -> None:
    """out[packed.targets] = the values of packed weights.

    out : (rows of the whole matrix, columns) float32, float16 or uint16 (bfloat16), C-contiguous
    Cost: reads the packed weights once, writes the values once.
    """
    columns, kind = out.shape[1], KINDS[out.dtype.name]
    grid = (packed.codes.shape[0], -(-columns // _CHUNK))
    if layout.bits >= 16:
        run = unpack_floats_kernel(layout, kind)
        run(packed.codes, packed.targets, packed.rows, columns, out, grid=grid, block=THREADS)
        return
    scales = (packed.scales, packed.steps, packed.offsets, packed.offset_steps)
    run = unpack_kernel(layout, kind)
    run(packed.codes, *scales, packed.table, packed.targets, packed.rows, columns, out, grid=grid, block=THREADS)


@functools.cache
def unpack_kernel(layout: Layout, kind: str) -> Kernel:
    """The kernel of packed codes, `THREADS` threads: grid (tiles, runs of `_CHUNK` columns).

    ``run(codes, scales, steps, offsets, offset_steps, table, targets, rows, columns, out)``, see `Packed`.
    """
    words, four, store, has_offset = _words(layout), _word_values(layout), store_for(kind), layout.offset
    scales_of, offsets_of, paired = _four_rows(layout), _four_rows(layout, of_offsets=True), layout.paired
    has_table, cell_bytes, gain = layout.table, 64 * layout.bits, _shared(layout)

    @device
    def emit(out, place, low, high, scale, offset, table):
        at, columns, column = place
        if at >= 0:
            store(out, at * columns + column, four(low, scale, offset, table), four(high, scale, offset, table))

    @kernel(f"u8* u16* i8* u16* i8* u8* i32* i32 i32 {ELEMENTS[kind]}", key(layout.name(), kind))
    def packed(codes, scales, steps, offsets, offset_steps, table, targets, rows, columns, out):
        tile, lanes, column = _octet()
        if column < columns:
            cell = tile * np.int64(columns >> 5) + (column >> 5)
            low, high = words(codes, cell * cell_bytes + 4 * lanes, np.uint32((column >> 3) & 3))
            low, high = gain(low, high, steps, tile, lanes, column, columns)
            s = scales_of(scales, steps, tile, lanes, column, columns)
            o = s
            if has_offset:
                o = offsets_of(offsets, steps if paired else offset_steps, tile, lanes, column, columns)
            levels = ptx.load_16_constant(table, 0) if has_table else low
            place = _targets(targets, tile, lanes, rows)
            emit(out, (place[0], columns, column), low[0], high[0], s[0], o[0], levels)
            emit(out, (place[1], columns, column), low[1], high[1], s[1], o[1], levels)
            emit(out, (place[2], columns, column), low[2], high[2], s[2], o[2], levels)
            emit(out, (place[3], columns, column), low[3], high[3], s[3], o[3], levels)

    return packed


@device
def _octet():
    """Which weights a thread takes: the tile, the first of four rows in it, the first of eight columns.

    Neighbours take the rows first, so that 4 threads read 64 bytes side by side, and 8 of them write 128 of a row.
    """
    thread = np.int32(cuda.threadIdx.x)
    column = np.int32(cuda.blockIdx.y * _CHUNK + (thread >> 2) * 8)
    return np.int64(cuda.blockIdx.x), np.int32((thread & 3) * 4), column


@device
def _targets(targets, tile, lanes, rows):
    """Where four rows go, -1 for those that are none."""
    row = np.int32(tile * TILE + lanes)
    none = np.int64(-1)
    return (
        np.int64(targets[row]) if row < rows else none,
        np.int64(targets[row + 1]) if row + 1 < rows else none,
        np.int64(targets[row + 2]) if row + 2 < rows else none,
        np.int64(targets[row + 3]) if row + 3 < rows else none,
    )


@functools.cache
def _words(layout: Layout) -> Any:
    """words(codes, at, pair): codes of quads 2 · pair and 2 · pair + 1, each a word of four codes for four rows."""
    planes, up = PLANES[layout.bits], np.uint32(layout.up)
    first, second, shift = _plane(planes[0], 0), _plane(planes[-1], 64 * planes[0]), np.uint32(planes[0])

    @device
    def joined(a, b):
        return a[0] | b[0] << shift, a[1] | b[1] << shift, a[2] | b[2] << shift, a[3] | b[3] << shift

    @device
    def words(codes, at, pair):
        low, high = first(codes, at, pair)
        more_low, more_high = second(codes, at, pair)
        return joined(low, more_low), joined(high, more_high)

    @device
    def moved(codes, at, pair):
        low, high = first(codes, at, pair)
        return (
            (low[0] << up, low[1] << up, low[2] << up, low[3] << up),
            (high[0] << up, high[1] << up, high[2] << up, high[3] << up),
        )

    if len(planes) > 1:
        return words
    return moved if layout.up else first


@functools.cache
def _shared(layout: Layout) -> Any:
    """gain(low, high, steps, tile, lanes, column, columns): the codes with what eight columns share."""
    shift, octets, worth = layout.group.bit_length() - 1, layout.group // OCTET, np.uint32(layout.shared)

    @device
    def nothing(low, high, steps, tile, lanes, column, columns):
        return low, high

    @device
    def joined(codes, a, b, c, d):
        return codes[0] | a, codes[1] | b, codes[2] | c, codes[3] | d

    @device
    def gain(low, high, steps, tile, lanes, column, columns):
        word = ptx.load_4_constant(steps, (tile * (columns >> shift) + (column >> shift)) * TILE + lanes)
        rows = np.uint32((word >> np.uint32(4 + (column // OCTET) % octets) & 0x01010101) * worth)
        a, b = ptx.permute(rows, 0, 0), ptx.permute(rows, 0, 0x1111)
        c, d = ptx.permute(rows, 0, 0x2222), ptx.permute(rows, 0, 0x3333)
        return joined(low, a, b, c, d), joined(high, a, b, c, d)

    return gain if layout.shared else nothing


@functools.cache
def _plane(width: int, start: int) -> Any:
    """The same for one plane, which begins at a byte of the cell."""
    mask, quads = np.uint32(((1 << width) - 1) * 0x01010101), 8 // width

    @device
    def bytes_(codes, at, pair):
        there = at + pair * np.int64(128)
        return ptx.load_16_constant(codes, there), ptx.load_16_constant(codes, there + 64)

    @device
    def masked(v, shift):
        return v[0] >> shift & mask, v[1] >> shift & mask, v[2] >> shift & mask, v[3] >> shift & mask

    @device
    def bits(codes, at, pair):
        quad = np.uint32(2 * pair)
        vector = ptx.load_16_constant(codes, at + (start + np.int64(quad // np.uint32(quads)) * 64))
        shift = np.uint32((quad & (quads - 1)) * width)
        return masked(vector, shift), masked(vector, np.uint32(shift + width))

    return bytes_ if width == 8 else bits


@functools.cache
def _word_values(layout: Layout) -> Any:
    """four(word, scale, offset, table): the values of four codes."""
    has_table, has_offset, narrow_codes = layout.table, layout.offset, layout.bits <= 3
    flip = np.uint32(0x80808080 if layout.signed else 0)
    magic, zero = np.uint32(_MAGIC), np.float32((1 << 23) + layout.zero + (128 if layout.signed else 0))

    @device
    def lookup(table, word):
        """The bytes of a table of 16 that four codes stand for."""
        nibbles = ptx.permute(word | word >> 4, 0, 0x4420)  # the first and third byte have two codes each
        if narrow_codes:
            return ptx.permute(table[0], table[1], nibbles)
        low, high = (
            ptx.permute(table[0], table[1], nibbles & 0x7777),
            ptx.permute(table[2], table[3], nibbles & 0x7777),
        )
        return ptx.permute(low, high, 0x3210 | (nibbles & 0x8888) >> 1)

    @device
    def value(word, selector, scale, offset):
        level = ptx.float_of(ptx.permute(word, magic, selector)) - zero
        product = ptx.multiply(level, scale)
        return ptx.add(product, offset) if has_offset else product

    @device
    def four(word, scale, offset, table):
        word = np.uint32((lookup(table, word) if has_table else word) ^ flip)
        return (
            value(word, 0x7440, scale, offset),
            value(word, 0x7441, scale, offset),
            value(word, 0x7442, scale, offset),
            value(word, 0x7443, scale, offset),
        )

    return four


@functools.cache
def _four_rows(layout: Layout, of_offsets: bool = False) -> Any:
    """values(bases, steps, tile, lanes, column, columns): four rows' scales or offsets of the column's group."""
    load, stepped, nibbles = load_four_of(layout.base), layout.step, layout.paired if of_offsets else layout.nibbles
    step_bits, step_shift = np.uint32(15 if nibbles else 255), np.uint32(4 if nibbles and of_offsets else 0)
    unit, halved = np.float32(2.0**-layout.down), layout.down > 0
    base_shift, group_shift = layout.base_group.bit_length() - 1, layout.group.bit_length() - 1

    @device
    def stepped_by(base, step):
        return ptx.multiply(base, np.float32(np.int8(step & step_bits)))

    @device
    def values(bases, steps, tile, lanes, column, columns):
        base = load(bases, (tile * (columns >> base_shift) + (column >> base_shift)) * TILE + lanes)
        if halved:
            base = (
                ptx.multiply(base[0], unit), ptx.multiply(base[1], unit),
                ptx.multiply(base[2], unit), ptx.multiply(base[3], unit),
            )  # fmt: skip
        if stepped:
            group = tile * (columns >> group_shift) + (column >> group_shift)
            word = ptx.load_4_constant(steps, group * TILE + lanes) >> step_shift
            return (
                stepped_by(base[0], word),
                stepped_by(base[1], word >> 8),
                stepped_by(base[2], word >> 16),
                stepped_by(base[3], word >> 24),
            )
        return base

    return values


@functools.cache
def unpack_floats_kernel(layout: Layout, kind: str) -> Kernel:
    """The kernel of float weights: ``run(codes, targets, rows, columns, out)``, grid and threads as for codes."""
    load, narrow, store = load_four_of(layout.base), narrow_for(kind), store_for(kind)

    @device
    def emit(out, row, columns, column, low, high):
        if row >= 0 and columns & 7 == 0:
            store(out, row * columns + column, low, high)
        elif row >= 0:  # rows begin anywhere, and the last columns are no eight
            for k in range(8):
                if column + k < columns:
                    out[row * columns + column + k] = narrow(low[k] if k < 4 else high[k - 4])

    @kernel(f"{ELEMENTS[layout.base]} i32* i32 i32 {ELEMENTS[kind]}", key(layout.base, kind))
    def packed_floats(codes, targets, rows, columns, out):
        tile, lanes, column = _octet()
        if column < columns:
            first, last = (tile * columns + column) * TILE + lanes, columns - 1 - column
            a, b = load(codes, first), load(codes, first + min(1, last) * TILE)
            c, d = load(codes, first + min(2, last) * TILE), load(codes, first + min(3, last) * TILE)
            e, f = load(codes, first + min(4, last) * TILE), load(codes, first + min(5, last) * TILE)
            g, h = load(codes, first + min(6, last) * TILE), load(codes, first + min(7, last) * TILE)
            place = _targets(targets, tile, lanes, rows)
            emit(out, place[0], columns, column, (a[0], b[0], c[0], d[0]), (e[0], f[0], g[0], h[0]))
            emit(out, place[1], columns, column, (a[1], b[1], c[1], d[1]), (e[1], f[1], g[1], h[1]))
            emit(out, place[2], columns, column, (a[2], b[2], c[2], d[2]), (e[2], f[2], g[2], h[2]))
            emit(out, place[3], columns, column, (a[3], b[3], c[3], d[3]), (e[3], f[3], g[3], h[3]))

    return packed_floats
