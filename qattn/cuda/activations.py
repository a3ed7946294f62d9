"""Rows of activations, rounded to int8 and laid out for `qattn.cuda.matmul`.

The arithmetic is that of `qattn.cpu.activations`: a cell, 32 activations of a row, shares one scale, and a cell with an
outlier is multiplied a second time with what its rounding left over.  What differs is where things lie.  Tokens come in
blocks of 8, the columns of a tensor core's right factor, and a block has a place for each cell, twice: first for the
cells as they are, then for their remainders.  A remainder that isn't there has the scale 0, so that its block may be
multiplied all the same; `seconds` says where a block has any.  So nothing needs to be counted, and no size that the
host would have to know depends on the activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int32, int64

from qattn.cuda import ptx
from qattn.cuda.kernel import device, kernel
from qattn.cuda.values import load_four
from qattn.cuda.warps import ALL_LANES, sum_of_block
from qattn.layout import CELL

BLOCK = 8  # tokens, the columns of one product of a tensor core
DECODE = 16  # tokens that the kernels for few of them take at once
TILE = 64  # tokens that the kernels for many of them take at once
OUTLIER = 12  # times the root mean square of a row, as in `qattn.cpu.activations`
MAGIC = 0x4B400000  # the bits of 1.5 · 2**23: what is added to that float, up to 2**22, is added to its bits as well
_MAGIC = np.float32(1.5 * 2**23)
_FOUR_MAGIC = 4 * MAGIC
_INVERSE_127 = np.float32(1 / 127)
_THREADS = 1024  # at most, of a block that rounds a row: four columns each, so few pass over the row twice


class Activations(NamedTuple):
    """Rows of int8 activations on the device, in blocks of 8; where heads have rows of their own, head by head.

    The first axis is 2: cells as they are, and the remainders of those that have outliers.
    """

    levels: Any
    """(2, blocks, cells, 8, 32) int8; a token's quads of columns are in order, or where groups are 16 columns, in the
    order 0 4 1 5 2 6 3 7: so the eight bytes from 8 · c on are what one lane of a tensor core's product holds."""
    scales: Any
    """(2, blocks, cells, 8) float32."""
    starts: Any
    """(2, blocks, cells, groups, 8) int32: minus the zero point times the sum of levels."""
    sums: Any
    """(2, blocks, cells, groups, 8) float32: the sum of a group's activations."""
    seconds: Any
    """(blocks, cells, 8) uint8: whether the remainder of this cell of this row is worth multiplying."""

    @classmethod
    def room(cls, rows: int, columns: int, group: int, heads: int = 1) -> Activations:
        """Memory for that many rows of each head, for weights in groups of `group` columns; larger ones count as 32."""
        import cupy

        cells, groups = columns // CELL, CELL // min(group, CELL)
        blocks = heads * padded(rows) // BLOCK
        return cls(
            cupy.empty((2, blocks, cells, BLOCK, CELL), "int8"),
            cupy.empty((2, blocks, cells, BLOCK), "float32"),
            cupy.empty((2, blocks, cells, groups, BLOCK), "int32"),
            cupy.empty((2, blocks, cells, groups, BLOCK), "float32"),
            cupy.empty((blocks, cells, BLOCK), "uint8"),
        )


def padded(rows: int) -> int:
    """Rows that there is room for: whole blocks, or whole tiles where the kernels for many tokens read them."""
    unit = BLOCK if rows <= DECODE else TILE
    return -(-rows // unit) * unit


@device
def _sum_of_lanes(value, lanes):
    """The sum over 4 or 8 neighbouring lanes."""
    value += cuda.shfl_xor_sync(ALL_LANES, value, 1)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 2)
    if lanes == 8:
        value += cuda.shfl_xor_sync(ALL_LANES, value, 4)
    return value


@device
def _bad(x):
    """0, or NaN where x is NaN or infinite; it spoils the scale, and so the result, as float arithmetic would."""
    return ptx.add(x, -x)


@device
def _low_bytes(a, b, c, d):
    """The lowest bytes of four words: where a rounded number's magic sum has the number itself."""
    return ptx.permute(ptx.permute(a, b, 0x0040), ptx.permute(c, d, 0x0040), 0x5410)


@device
def _energy(x, start, columns):
    """The sum of the squares of a row, for all threads of the block."""
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    energies = cuda.shared.array(32, float32)
    energy, column = float32(0), 4 * thread
    while column < columns:
        a, b, c, d = load_four(x, start + column)
        energy += a * a + b * b + (c * c + d * d)
        column += 4 * threads
    return sum_of_block(energy, energies)


@device
def _round(v):
    """A cell, four columns a lane → its scale; the lane's integers, each plus the magic number; its peak."""
    largest = max(max(abs(v[0]), abs(v[1])), max(abs(v[2]), abs(v[3])))
    largest = max(largest, cuda.shfl_xor_sync(ALL_LANES, largest, 1))
    largest = max(largest, cuda.shfl_xor_sync(ALL_LANES, largest, 2))
    largest = max(largest, cuda.shfl_xor_sync(ALL_LANES, largest, 4))
    unit = ptx.multiply(largest, _INVERSE_127)
    inverse = ptx.reciprocal(unit) if unit > float32(0) else float32(0)
    rounded = (
        ptx.add(ptx.multiply(v[0], inverse), _MAGIC),
        ptx.add(ptx.multiply(v[1], inverse), _MAGIC),
        ptx.add(ptx.multiply(v[2], inverse), _MAGIC),
        ptx.add(ptx.multiply(v[3], inverse), _MAGIC),
    )
    return unit, rounded, largest


@device
def _rest(v, rounded, unit):
    """What rounding left over of one column."""
    return ptx.add(v, -ptx.multiply(ptx.add(rounded, -_MAGIC), unit))


@functools.cache
def quantize_kernel(zero: int, groups: int) -> Any:
    """The kernel behind `quantize`, for one or two groups in a cell: a block for each row, eight lanes a cell."""
    lanes = 8 // groups  # of a group

    @device
    def store(v, unit, rounded, real, at, quad, levels, scales, starts, sums):
        """Write the cell of a row whose scale lies at `at`; a scale of 0 if it isn't real.  Called by whole warps."""
        a, b = ptx.bits_of(rounded[0]), ptx.bits_of(rounded[1])
        c, d = ptx.bits_of(rounded[2]), ptx.bits_of(rounded[3])
        bad = _sum_of_lanes(ptx.add(ptx.add(_bad(v[0]), _bad(v[1])), ptx.add(_bad(v[2]), _bad(v[3]))), 8)
        total = _sum_of_lanes(float32(int32(a + b + c + d - _FOUR_MAGIC)), lanes)  # exact: small integers
        scale = ptx.add(unit, bad) if real else float32(0)
        total = total if real else float32(0)
        if at >= 0:
            place, part = quad, 0
            if groups == 2:
                place, part = (quad & 3) * 2 + (quad >> 2), quad >> 2
            ptx.store_4(levels, at * CELL + place * 4, _low_bytes(a, b, c, d))
            if quad == 0:
                scales[at] = scale
            if quad & (lanes - 1) == 0:
                there = (at >> 3) * (groups * BLOCK) + part * BLOCK + (at & 7)
                starts[there] = int32(total) * -zero
                sums[there] = ptx.multiply(scale, total)

    @kernel("f32* u8* f32* i32* f32* u8* i32 i32", f"{zero}_{groups}")
    def quantize(x, levels, scales, starts, sums, seconds, rows, cells):
        row, thread, threads = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        head, heads, room = int32(cuda.blockIdx.y), int32(cuda.gridDim.y), int32(cuda.gridDim.x)
        first = (head * room + (row & ~7)) * cells + (row & 7)  # where the scale of the row's first cell lies
        if row >= rows:  # padding: its levels reach no result, but it may not ask for remainders
            cell = thread
            while cell < cells:
                seconds[first + cell * BLOCK] = 0
                cell += threads
            return
        start, lane = (int64(row) * heads + head) * (cells * CELL), thread & 31
        limit = float32(OUTLIER * OUTLIER) / float32(cells * CELL) * _energy(x, start, cells * CELL)
        remainders = room * heads * cells
        warp_cell = (thread >> 5) * 4  # lanes of a warp stay together, since they exchange values
        while warp_cell < cells:
            cell, quad = warp_cell + (lane >> 3), lane & 7
            inside = cell < cells
            v = load_four(x, start + min(cell, cells - 1) * CELL + 4 * quad)
            unit, rounded, largest = _round(v)
            at = first + cell * BLOCK if inside else -1
            store(v, unit, rounded, True, at, quad, levels, scales, starts, sums)
            outlier = largest * largest > limit
            if inside and quad == 0:
                seconds[at] = 1 if outlier else 0
            rest = v
            if cuda.any_sync(ALL_LANES, outlier):
                rest = (
                    _rest(v[0], rounded[0], unit),
                    _rest(v[1], rounded[1], unit),
                    _rest(v[2], rounded[2], unit),
                    _rest(v[3], rounded[3], unit),
                )
                unit, rounded, largest = _round(rest)
            at = at + remainders if inside else -1
            store(rest, unit, rounded, outlier, at, quad, levels, scales, starts, sums)
            warp_cell += threads >> 3

    return quantize


@functools.cache
def quantize(zero: int, group: int) -> Callable[[Any, Activations], None]:
    """What rounds activations to int8, for weights of that zero point and groups: ``run(x, a)``.

    x : (rows, K) or (rows, heads, K) float32, aligned to 16 bytes;  a : `Activations`, with `room` for it, overwritten
    One scale per 32 columns: the largest magnitude maps to ±127, ties round to even.  A row with NaN or infinity gets
    scales of NaN there.
    Cost: reads x twice, the second time from the cache, and writes about 1.4 bytes an element.
    """
    run_kernel = quantize_kernel(zero, CELL // min(group, CELL))

    def run(x: Any, a: Activations) -> None:
        rows, columns, heads = x.shape[0], x.shape[-1], math.prod(x.shape[1:-1])
        threads = min(_THREADS, -(-columns // 128) * 32)
        grid = a.seconds.shape[0] * BLOCK // heads, heads
        run_kernel(x, *a, rows, columns // CELL, grid=grid, block=threads)

    return run
