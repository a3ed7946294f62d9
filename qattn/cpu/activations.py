"""Rows of activations, rounded to int8 and laid out for `qattn.cpu.matmul`.

A cell, 32 activations of a row, shares one scale.  An activation far above the others coarsens the rounding of its
whole cell, and real models have such *outliers*, in the same few columns of every row.  So a cell with an outlier is
multiplied twice: once as it is, and once with what its rounding left over, itself rounded to int8, by the same weights.
Rows without outliers pay nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from qattn.cpu._jit import generated, helper
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.scratch import scratch
from qattn.cpu.simd import Emitter, Pointer, Value, micro_kernel
from qattn.cpu.target import TARGET
from qattn.layout import CELL

# Rows of a block; few, since a kernel is compiled for each.
BLOCKS = (1, 4, 8, TARGET.rows) if TARGET.rows > 4 else (1, 2, TARGET.rows)


class Activations(NamedTuple):
    """Rows of activations in blocks, each block column-major, ready for the micro-kernel.

    Block b is the rows from b · `TARGET.rows`, padded to its size.  It consists of slots: a slot holds, for each row of
    the block, what is multiplied by one cell of the weights.  There is room for two slots a cell; exact and float
    kernels have one for each cell, in order.
    """

    levels: np.ndarray
    """(slots · rows · 32) int8, in quads; or float32 for exact kernels."""
    scales: np.ndarray
    """(slots · rows) float32; empty for exact kernels."""
    starts: np.ndarray
    """(slots · rows · 32 / sum_group) int32: minus the zero point times the sum of levels; empty for exact kernels."""
    sums: np.ndarray
    """(slots · rows · 32 / sum_group) float32: the sum of a group's activations."""
    cells: np.ndarray
    """(blocks, 2 · cells) int32: the cell that each slot is multiplied by; empty for exact kernels."""
    slots: np.ndarray
    """(blocks,) int64: how many slots of a block are in use; empty for exact kernels."""

    @classmethod
    def room(cls, rows: int, columns: int, group: int, *, copies: tuple[int, ...] = ()) -> Activations:
        """Scratch for int8 activations, for weights with groups of `group` columns; `copies` go before each shape."""
        cells, parts, blocks = columns // CELL, CELL // group, -(-rows // TARGET.rows)
        size = 2 * cells * padded_rows(rows)
        return cls(
            scratch("levels", (*copies, size * CELL), np.int8),
            scratch("scales", (*copies, size)),
            scratch("starts", (*copies, size * parts), np.int32),
            scratch("sums", (*copies, size * parts)),
            scratch("cells", (*copies, blocks, 2 * cells), np.int32),
            scratch("slots", (*copies, blocks), np.int64),
        )

    @classmethod
    def exact_room(cls, rows: int, columns: int, group: int, *, copies: tuple[int, ...] = ()) -> Activations:
        """Scratch for float32 activations, likewise; no sums if `group` is 0."""
        size = padded_rows(rows) * columns
        levels = scratch("floats", (*copies, size))
        sums = scratch("sums of floats", (*copies, size // group if group else 0))
        nothing = np.empty((*copies, 0), np.int32)
        return cls(levels, sums[..., :0], nothing, sums, nothing[..., None], np.empty((*copies, 0), np.int64))


@numba.njit
def block_size(remaining: int) -> int:
    """Rows of the next block: a full one, or the smallest that takes all that remain."""
    for size in BLOCKS:
        if remaining <= size:
            return size
    return BLOCKS[-1]


def padded_rows(rows: int) -> int:
    """Rows of all blocks together."""
    full = rows // TARGET.rows * TARGET.rows
    return full + (block_size.py_func(rows - full) if rows > full else 0)


@micro_kernel
def _peaks(e, x, peaks, energy, cells):
    """The largest magnitude in each cell of a row of float32, and the sum of the row's squares."""
    total = e.register(e.constant(0.0, e.F32))
    with e.loop(cells) as cell:
        low, high = (x.at(cell * (4 * CELL)).at(64 * i).load(e.F32) for i in range(2))
        peaks.at(cell * 4).store(e.largest(e.maximum(e.absolute(low), e.absolute(high))))
        total.set(e.fma(low, low, e.fma(high, high, total.get())))
    energy.store(e.sum(total.get()))


def round_cell(e: Emitter, halves: list[Value]) -> tuple[Value, list[Value]]:
    """A cell of 32 float32 → its scale, and the two halves as whole numbers up to ±127."""
    largest = e.largest(e.maximum(*(e.absolute(half) for half in halves)))
    unit = largest * (1.0 / 127.0)
    inverse = unit.compare(">", 0.0).where(e.constant(1.0, e.F32S) / unit, e.constant(0.0, e.F32S)).splat(e.F32)
    return unit, [e.rounded(half * inverse) for half in halves]


@functools.cache
def _row_kernels(zero: int, parts: int) -> tuple[Any, Any]:
    """Round the cells of a row into a block of `height` rows, and what that leaves of one cell into another slot.

    levels, scales, starts, sums : those of `Activations`, from the row's first element in the block (the slot) on
    """

    def store(e: Emitter, halves: list[Value], slot: Value, height: Value, arrays: list[Pointer]) -> None:
        levels, scales, starts, sums = arrays
        unit, rounded = round_cell(e, halves)
        # x - x is NaN where x is NaN or infinite: it spoils the scale, and so the result, as float arithmetic would
        scale = unit + e.sum((halves[0] - halves[0]) + (halves[1] - halves[1]))
        stride = height * 4
        scales.at(slot * stride).store(scale)
        integers = [half.to(e.I32V) for half in rounded]
        for part, group in enumerate(integers if parts == 2 else [integers[0] + integers[1]]):
            total, there = e.sum(group), (slot * parts + part) * stride
            starts.at(there).store(total * -zero)
            sums.at(there).store(scale * total.to(e.F32S))
        for i, half in enumerate(integers):
            quads = half.to(e.I8V).bits(e.QUADS)
            for quad in range(4):
                levels.at((slot * 8 + (4 * i + quad)) * stride).store(quads.lane(quad))

    @micro_kernel
    def round_row(e, x, levels, scales, starts, sums, height, cells):
        with e.loop(cells) as cell:
            halves = [x.at(cell * (4 * CELL)).at(64 * i).load(e.F32) for i in range(2)]
            store(e, halves, cell, height, [levels, scales, starts, sums])

    @micro_kernel
    def round_rest(e, x, levels, scales, starts, sums, height, slot):
        halves = [x.at(64 * i).load(e.F32) for i in range(2)]
        unit, rounded = round_cell(e, halves)
        rest = [half - level * unit.splat(e.F32) for half, level in zip(halves, rounded, strict=True)]
        store(e, rest, slot, height, [levels, scales, starts, sums])

    return round_row, round_rest


OUTLIER = np.float32(12)  # times the root mean square of a row: few cells have one, and they cause most of the error


@helper
def _find_outliers(x, top, outliers, second):
    """Mark the cells that have an outlier in the rows from `top`, and give those marked in any row a second slot.

    outliers : (rows of a block, cells) bool;  second : (cells,) int64, the second slot of a cell, or 0; both zeroed
    Returns the slots of the block.
    """
    cells = outliers.shape[1]
    peaks, energy, slots = np.empty(cells, np.float32), np.empty(1, np.float32), cells
    for m in range(min(TARGET.rows, x.shape[0] - top)):
        _peaks((x[top + m], peaks, energy, cells))
        limit = OUTLIER * np.sqrt(energy[0] / np.float32(x.shape[1]))
        for cell in range(cells):
            if peaks[cell] > limit:
                outliers[m, cell] = True
                second[cell] = 1
    for cell in range(cells):
        if second[cell]:
            second[cell] = slots
            slots += 1
    return slots


@functools.cache
def block_filler(zero: int, group: int) -> Any:
    """A part of kernels: fill_block(x, block, a) rounds the rows of one block, see `quantize`."""
    parts_of_cell = CELL // group
    round_row, round_rest = _row_kernels(zero, parts_of_cell)

    @generated(f"{zero}-{group}")
    def fill_block(x, block, a):
        top, cells = block * TARGET.rows, x.shape[1] // CELL
        height, first = block_size(x.shape[0] - top), 2 * cells * top
        outliers, second = np.zeros((TARGET.rows, cells), np.bool_), np.zeros(cells, np.int64)
        slots = _find_outliers(x, top, outliers, second)
        a.slots[block] = slots
        for cell in range(cells):
            a.cells[block, cell] = cell
            if second[cell]:
                a.cells[block, second[cell]] = cell
        unused, end = first + cells * height, first + slots * height  # rows without the outlier have zeros there
        a.levels[unused * CELL : end * CELL] = 0
        a.scales[unused:end] = 0
        a.starts[unused * parts_of_cell : end * parts_of_cell] = 0
        a.sums[unused * parts_of_cell : end * parts_of_cell] = 0
        for m in range(min(TARGET.rows, x.shape[0] - top)):
            row = x[top + m]
            levels, scales = a.levels[first * CELL + 4 * m :], a.scales[first + m :]
            starts, sums = a.starts[first * parts_of_cell + m :], a.sums[first * parts_of_cell + m :]
            round_row((row, levels, scales, starts, sums, height, cells))
            for cell in range(cells):
                if outliers[m, cell]:
                    round_rest((row[cell * CELL :], levels, scales, starts, sums, height, second[cell]))

    return fill_block


@functools.cache
def quantize(zero: int, group: int) -> Kernel:
    """The kernel that rounds activations to int8, for weights of that zero point and groups: ``run(x, a)``.

    x : (rows, K) float32;  a : `Activations`, with `room` for them, overwritten
    One scale per 32 columns: the largest magnitude maps to ±127, ties round to even.
    """
    fill_block = block_filler(zero, group)

    @kernel(f"{zero}-{group}")
    def run(x, a, part, parts):
        for block in share(a.slots.size, part, parts):
            fill_block(x, block, a)

    return run


@numba.njit
def arrange_rows(x, group, a, part, parts):
    """A part of kernels: see `arrange`."""
    rows, columns = x.shape
    groups = columns // group if group else 0
    for row in share(rows, part, parts):
        first = row // TARGET.rows * TARGET.rows
        size = block_size(rows - first)
        for k in range(columns):
            a.levels[first * columns + k * size + row - first] = x[row, k]
        for g in range(groups):
            total = np.float32(0)
            for k in range(g * group, (g + 1) * group):
                total += x[row, k]
            a.sums[first * groups + g * size + row - first] = total


@kernel()
def arrange(x, group, a, part, parts):
    """Lay rows of float32 activations out for exact and float kernels, with the sums of groups (of 0: none).

    x : (rows, K) float32;  a : `Activations`, with `exact_room` for them, overwritten
    """
    arrange_rows(x, group, a, part, parts)
