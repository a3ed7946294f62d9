"""Rows of activations, rounded to int8 and laid out for `qattn.cpu.matmul`.

A cell, 32 activations of a row, shares one scale.  An activation far above the others coarsens the rounding of its
whole cell, and real models have such *outliers*, in the same few columns of every row.  So a cell with an outlier is
multiplied twice: once as it is, and once with what its rounding left over, itself rounded to int8, by the same weights.
Rows without outliers pay nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from qattn.cpu._jit import kernel
from qattn.cpu.simd import micro_kernel
from qattn.cpu.target import TARGET

CELL = 32  # columns that share one activation scale
BLOCKS = (*(size for size in (1, 2, 4, 8) if size < TARGET.rows), TARGET.rows)


class Activations(NamedTuple):
    """Rows of activations in blocks, each block column-major, ready for the micro-kernel.

    Block b is the rows from b · `TARGET.rows`, padded to its size.  It consists of slots: a slot holds, for each row of
    the block, what is multiplied by one cell of the weights.  `exact` and float kernels have a slot for each cell, in
    order.
    """

    levels: np.ndarray
    """(slots · rows · 32) int8, in quads; or float32 for exact kernels."""
    scales: np.ndarray
    """(slots · rows) float32; empty for exact kernels."""
    starts: np.ndarray
    """(slots · rows · 32 / sum_group) int32: minus the zero point times the sum of levels."""
    sums: np.ndarray
    """(slots · rows · 32 / sum_group) float32: the sum of a group's activations."""
    cells: np.ndarray
    """(slots of all blocks) int32: the cell that each slot is multiplied by; empty for exact kernels."""
    first_slot: np.ndarray
    """(blocks + 1) int64: where a block begins in `cells`."""
    first: np.ndarray
    """(blocks + 1) int64: where a block begins in the other arrays, in slots times rows."""
    rows: int


@numba.njit
def block_size(remaining: int) -> int:
    """Rows of the next block: a full one, or the smallest that takes all that remain."""
    for size in BLOCKS:
        if remaining <= size:
            return size
    return BLOCKS[-1]


@numba.njit
def padded_rows(rows: int) -> int:
    """Rows of all blocks together."""
    full = rows // TARGET.rows * TARGET.rows
    return full + (block_size(rows - full) if rows > full else 0)


@micro_kernel
def _peaks(e, x, peaks, energy, cells):  # type: ignore[no-untyped-def]
    """The largest magnitude in each cell of a row of float32, and the sum of the row's squares."""
    total = e.register(e.constant(0.0, e.F32))
    with e.loop(cells) as cell:
        low, high = (x.at(cell * (4 * CELL)).at(64 * i).load(e.F32) for i in range(2))
        peaks.at(cell * 4).store(e.largest(e.maximum(e.absolute(low), e.absolute(high))))
        total.set(e.fma(low, low, e.fma(high, high, total.get())))
    energy.store(e.sum(total.get()))


@micro_kernel
def _round_cell(e, x, levels, scale, totals, rest, stride):  # type: ignore[no-untyped-def]
    """32 float32 → int8 quads `stride` bytes apart, their scale, the levels' sums by halves (int32), and the rest."""
    halves = [x.at(64 * i).load(e.F32) for i in range(2)]
    largest = e.largest(e.maximum(*(e.absolute(half) for half in halves)))
    # x - x is NaN where x is NaN or infinite: it spoils the scale, and so the result, as float arithmetic would
    poison = e.sum((halves[0] - halves[0]) + (halves[1] - halves[1]))
    unit = largest * (1.0 / 127.0)
    inverse = unit.compare(">", 0.0).where(e.constant(1.0, e.F32S) / unit, e.constant(0.0, e.F32S)).splat(e.F32)
    scale.store(unit + poison)
    for i, half in enumerate(halves):
        rounded = e.rounded(half * inverse)
        rest.at(64 * i).store(half - rounded * unit.splat(e.F32))
        integers = rounded.to(e.I32V)
        totals.at(4 * i).store(e.sum(integers))
        quads = integers.to(e.I8V).bits(e.QUADS)
        for quad in range(4):
            levels.at(stride * (4 * i + quad)).store(quads.lane(quad))


OUTLIER = np.float32(12)  # times the root mean square of a row: few cells have one, and they cause most of the error


@numba.njit
def _find_outliers(x, first, outliers):  # type: ignore[no-untyped-def]
    """Mark the cells of a block's rows that have an outlier → how many cells some row has one in."""
    cells = outliers.shape[1]
    peaks, energy, count = np.empty(cells, np.float32), np.empty(1, np.float32), 0
    for row in range(first, min(first + TARGET.rows, x.shape[0])):
        _peaks((x[row], peaks, energy, cells))
        limit = OUTLIER * np.sqrt(energy[0] / np.float32(x.shape[1]))
        for cell in range(cells):
            outliers[row, cell] = peaks[cell] > limit
    for cell in range(cells):
        count += outliers[first : first + TARGET.rows, cell].any()
    return count


@kernel(parallel=True)
def quantize_activations(x, zero, group):  # type: ignore[no-untyped-def]
    """Round rows of activations to int8 with a scale per 32 columns → `Activations`.

    x : (rows, K) float32.  The largest magnitude of 32 maps to ±127, ties round to even.
    """
    rows, columns = x.shape
    cells, parts, blocks = columns // CELL, CELL // group, (rows + TARGET.rows - 1) // TARGET.rows
    outliers, more = np.zeros((rows, cells), np.bool_), np.zeros(blocks, np.int64)
    for block in numba.prange(blocks):
        more[block] = _find_outliers(x, block * TARGET.rows, outliers)
    first_slot, first = np.zeros(blocks + 1, np.int64), np.zeros(blocks + 1, np.int64)
    for block in range(blocks):
        slots = cells + more[block]
        first_slot[block + 1] = first_slot[block] + slots
        first[block + 1] = first[block] + slots * block_size(rows - block * TARGET.rows)
    size = first[blocks]
    cell_of = np.empty(first_slot[blocks], np.int32)
    levels, scales = np.zeros(size * CELL, np.int8), np.zeros(size, np.float32)
    starts, sums = np.zeros(size * parts, np.int32), np.zeros(size * parts, np.float32)
    for block in numba.prange(blocks):
        top, height = block * TARGET.rows, block_size(rows - block * TARGET.rows)
        second = np.zeros(cells, np.int64)  # the slot that a cell has besides its own, 0 for none
        slots = cells
        for cell in range(cells):
            cell_of[first_slot[block] + cell] = cell
            if outliers[top : top + TARGET.rows, cell].any():
                second[cell] = slots
                cell_of[first_slot[block] + slots] = cell
                slots += 1
        rest, totals = np.empty(CELL, np.float32), np.empty(2, np.int32)
        for row in range(top, min(top + TARGET.rows, rows)):
            for cell in range(cells):
                source, slot = x[row, cell * CELL :], cell
                for _ in range(2 if outliers[row, cell] else 1):
                    at = first[block] + slot * height
                    here = at + row - top
                    _round_cell((source, levels[at * CELL + 4 * (row - top) :], scales[here:], totals, rest,
                                 4 * height))  # fmt: skip
                    for part in range(parts):
                        total = totals[part] if parts == 2 else totals[0] + totals[1]
                        there = at * parts + part * height + row - top
                        starts[there] = -zero * total
                        sums[there] = scales[here] * np.float32(total)
                    source, slot = rest, second[cell]
    return Activations(levels, scales, starts, sums, cell_of, first_slot, first, rows)


@kernel(parallel=True)
def arrange_activations(x, group, levels, sums):  # type: ignore[no-untyped-def]
    """Copy rows of float32 activations into the arrays of `Activations`, for exact and float kernels."""
    rows, columns = x.shape
    for row in numba.prange(rows):
        first = row // TARGET.rows * TARGET.rows
        size = block_size(rows - first)
        for k in range(columns):
            levels[first * columns + k * size + row - first] = x[row, k]
        for g in range(columns // group if sums.size else 0):
            total = np.float32(0)
            for k in range(g * group, (g + 1) * group):
                total += x[row, k]
            sums[(first * (columns // group)) + g * size + row - first] = total


def arranged(x: np.ndarray, group: int) -> Activations:
    """Rows of float32 as they are, with the sums of groups; none if `group` is 0."""
    rows, columns = x.shape
    levels = np.zeros(padded_rows(rows) * columns, np.float32)
    sums = np.zeros(levels.size // group if group else 0, np.float32)
    arrange_activations(x, group or CELL, levels, sums)
    none, nowhere = np.empty(0, np.int32), np.empty(0, np.int64)
    return Activations(levels, sums[:0], none, sums, none, nowhere, nowhere, rows)
