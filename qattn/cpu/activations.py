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


@numba.njit
def _block_of(x, block, zero, group, outliers, a):  # type: ignore[no-untyped-def]
    """Fill one block of the `Activations` a with rounded rows of x; `outliers` are those cells to be rounded twice."""
    top, cells, parts = block * TARGET.rows, outliers.shape[1], CELL // group
    height, first_slot = block_size(x.shape[0] - top), a.first_slot[block]
    second = np.zeros(cells, np.int64)  # the slot that a cell has besides its own
    slots = cells
    for cell in range(cells):
        a.cells[first_slot + cell] = cell
        if outliers[top : top + TARGET.rows, cell].any():
            second[cell] = slots
            a.cells[first_slot + slots] = cell
            slots += 1
    rest, totals = np.empty(CELL, np.float32), np.empty(2, np.int32)
    for row in range(top, min(top + TARGET.rows, x.shape[0])):
        for cell in range(cells):
            source, slot = x[row, cell * CELL :], cell
            for _ in range(2 if outliers[row, cell] else 1):
                at = a.first[block] + slot * height
                here = at + row - top
                levels, scale = a.levels[at * CELL + 4 * (row - top) :], a.scales[here:]
                _round_cell((source, levels, scale, totals, rest, 4 * height))
                for part in range(parts):
                    total = totals[part] if parts == 2 else totals[0] + totals[1]
                    there = at * parts + part * height + row - top
                    a.starts[there] = -zero * total
                    a.sums[there] = scale[0] * np.float32(total)
                source, slot = rest, second[cell]


@numba.njit(parallel=True)
def quantize_activations(x, zero, group, threads):  # type: ignore[no-untyped-def]
    """Round rows of activations to int8 with a scale per 32 columns → `Activations`.

    x : (rows, K) float32.  The largest magnitude of 32 maps to ±127, ties round to even.
    """
    rows, columns = x.shape
    cells, parts, blocks = columns // CELL, CELL // group, (rows + TARGET.rows - 1) // TARGET.rows
    outliers, more = np.zeros((rows, cells), np.bool_), np.zeros(blocks, np.int64)
    alone = blocks == 1 or threads == 1  # waking other threads takes longer than one block
    if alone:
        for block in range(blocks):
            more[block] = _find_outliers(x, block * TARGET.rows, outliers)
    else:
        for thread in numba.prange(threads):
            for block in range(thread, blocks, threads):
                more[block] = _find_outliers(x, block * TARGET.rows, outliers)
    first_slot, first = np.zeros(blocks + 1, np.int64), np.zeros(blocks + 1, np.int64)
    for block in range(blocks):
        slots = cells + more[block]
        first_slot[block + 1] = first_slot[block] + slots
        first[block + 1] = first[block] + slots * block_size(rows - block * TARGET.rows)
    size = first[blocks]
    a = Activations(
        np.zeros(size * CELL, np.int8),
        np.zeros(size, np.float32),
        np.zeros(size * parts, np.int32),
        np.zeros(size * parts, np.float32),
        np.empty(first_slot[blocks], np.int32),
        first_slot,
        first,
        rows,
    )
    if alone:
        for block in range(blocks):
            _block_of(x, block, zero, group, outliers, a)
    else:
        for thread in numba.prange(threads):
            for block in range(thread, blocks, threads):
                _block_of(x, block, zero, group, outliers, a)
    return a


@numba.njit(parallel=True)
def arrange_activations(x, group, threads):  # type: ignore[no-untyped-def]
    """Lay rows of float32 activations out for exact and float kernels, with the sums of groups (of 0: none)."""
    rows, columns = x.shape
    groups = columns // group if group else 0
    levels = np.zeros(padded_rows(rows) * columns, np.float32)
    sums = np.zeros(padded_rows(rows) * groups, np.float32)
    for thread in numba.prange(threads):
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            first = row // TARGET.rows * TARGET.rows
            size = block_size(rows - first)
            for k in range(columns):
                levels[first * columns + k * size + row - first] = x[row, k]
            for g in range(groups):
                total = np.float32(0)
                for k in range(g * group, (g + 1) * group):
                    total += x[row, k]
                sums[first * groups + g * size + row - first] = total
    nothing, nowhere = np.empty(0, np.int32), np.empty(0, np.int64)
    return Activations(levels, sums[:0], nothing, sums, nothing, nowhere, nowhere, rows)
