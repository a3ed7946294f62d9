"""Many rows of activations times packed weights, in tile registers.

Both are rounded to bfloat16 here, and their products summed in float32: a tile of 16 weights' rows is dequantized to
*leaves* of 32 columns, tiles B of `qattn.cpu.amx`, and 32 columns of 16 rows of activations are a tile A.  Scales and
offsets are in the weights then, so that nothing has to be done between two leaves, where integers would have to be
taken out of the registers and scaled.

A thread dequantizes as many tiles as fill half its second-level cache, then lets all activations pass by.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qattn.cpu.amx import BYTES, PAIRS, ROWS, aligned, bf16_pairs, tiles
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.matmul import Weights
from qattn.cpu.scratch import scratch
from qattn.cpu.simd import LANES, micro_kernel
from qattn.layout import CELL, Layout

LEAST = 40  # rows that are worth it: vectors multiply fewer sooner than weights are dequantized
_CACHE = 1 << 20  # bytes of dequantized weights that stay in a core's second-level cache


def takes(layout: Layout, columns: int) -> bool:
    """Whether these weights are multiplied in tiles: those that rounding to bfloat16 costs no more than activations."""
    return layout.bits < 16 or (layout.base == "bf16" and columns % CELL == 0)


def room(rows: int, columns: int) -> np.ndarray:
    """Scratch for activations: (an even number of blocks, cells, 16 rows, 32 columns) bfloat16, as uint16."""
    return scratch("bfloat16", (-(-rows // (2 * ROWS)) * 2, columns // CELL, ROWS, CELL), np.uint16)


@micro_kernel
def _round_row(e, x, out, cells):  # type: ignore[no-untyped-def]
    """A row of float32 → its place in a block.  x - x is NaN where x is NaN or infinite, and so are its products."""
    with e.loop(cells) as cell:
        for half in range(2):
            value = x.at(cell * (4 * CELL)).at(64 * half).load(e.F32)
            out.at(cell * BYTES).at(32 * half).store(e.to_bf16(value + (value - value)))


@kernel()
def round_rows(x, out, part, parts):  # type: ignore[no-untyped-def]
    """out = x, rounded to bfloat16: x (rows, K) float32, out `room` for them; rows beyond are 0."""
    rows, cells = x.shape[0], x.shape[1] // CELL
    for block in share(out.shape[0], part, parts):
        for m in range(ROWS):
            row = block * ROWS + m
            if row < rows:
                _round_row((x[row], out[block, 0, m:], cells))
            else:
                out[block, :, m] = 0


@micro_kernel
def _leaves_of_bf16(e, weights, *arguments):  # type: ignore[no-untyped-def]
    """One tile of bfloat16 weights, (K, 16) → leaves, (cells, 16, 16, 2)."""
    *_, out, cells = arguments
    with e.loop(cells) as cell:
        for pair in range(PAIRS):
            rows = weights.at(cell * (2 * CELL * LANES)).at(pair * (4 * LANES))
            low, high = (rows.at(2 * LANES * i).load(e.I16V) for i in range(2))
            out.at(cell * BYTES).at(64 * pair).store(bf16_pairs(e, low, high))


def _leaves_kernel(layout: Layout) -> Any:
    """One tile of packed weights → leaves, (cells, 16, 16, 2) bfloat16."""
    if layout.bits >= 16:
        return _leaves_of_bf16
    parts = max(1, CELL // layout.group)
    quads = 8 // parts

    @micro_kernel
    def run(e, *arguments):  # type: ignore[no-untyped-def]
        *packed, out, cells = arguments
        with e.loop(cells) as cell:
            weights, there = Weights(e, layout, packed, cell), out.at(cell * BYTES)
            for part in range(parts):
                scale = weights.scale(part)
                offset = weights.offset(part) if layout.offset else None
                for quad in range(quads * part, quads * (part + 1)):
                    word = (weights.codes(quad) - layout.zero if layout.zero else weights.codes(quad)).bits(e.I32V)
                    levels = [(word << (24 - 8 * i)).shift_signed(24).to(e.F32) for i in range(4)]
                    values = [e.fma(level, scale, offset) if offset is not None else level * scale for level in levels]
                    for half in range(2):
                        pair = (e.to_bf16(value) for value in values[2 * half : 2 * half + 2])
                        there.at(64 * (2 * quad + half)).store(bf16_pairs(e, *pair))

    return run


@micro_kernel
def _multiply(e, x, leaves, out, cells, stride):  # type: ignore[no-untyped-def]
    """Two blocks of activations times the leaves of two tiles, into 32 rows of 32 floats, `stride` bytes apart."""
    size = cells * BYTES
    with tiles(e) as tile:
        left, right, sums = tile[4:6], tile[6:8], [tile[0:2], tile[2:4]]
        for total in tile[:4]:
            total.clear()
        with e.loop(cells) as cell:
            for j in range(2):
                right[j].load(leaves.at(size * j).at(cell * BYTES))
            for i in range(2):
                left[i].load(x.at(size * i).at(cell * BYTES))
                for j in range(2):
                    sums[i][j].add_products(left[i], right[j])
        for i in range(2):
            for j in range(2):
                sums[i][j].store(out.at(stride * (ROWS * i)).at(4 * LANES * j), stride)


@functools.cache
def product(layout: Layout) -> Kernel:
    """The kernel for weights of a layout: ``run(packed, x, out)`` with ``out[:, packed.targets]`` overwritten.

    packed : `Packed`;  x : activations, see `room`;  out : (tokens, n) float32, C-contiguous
    Cost: reads and dequantizes the packed weights once.  Each output depends on its own row and tile only.
    """
    dequantize = _leaves_kernel(layout)

    @kernel(layout.name())
    def run(packed, x, out, part, parts):  # type: ignore[no-untyped-def]
        rows, width, flat, cells, targets = out.shape[0], out.shape[1], out.reshape(-1), x.shape[1], packed.targets
        mine, together = share(packed.codes.shape[0], part, parts), max(2, _CACHE // (cells * BYTES) // 2 * 2)
        leaves = aligned((min(together, len(mine)) + 1) // 2 * 2 * cells * BYTES).reshape(-1, cells * BYTES)
        buffer = aligned(4 * BYTES).view(np.float32)
        for first in range(mine.start, mine.stop, together):
            ready = min(together, mine.stop - first)
            for i in range(ready):
                tile = first + i
                dequantize((packed.codes[tile], packed.scales[tile], packed.steps[tile], packed.offsets[tile],
                            packed.offset_steps[tile], packed.table, leaves[i], cells))  # fmt: skip
            for row in range(0, rows, 2 * ROWS):
                for i in range(0, ready, 2):  # past an odd tile there is room for anything
                    lanes = targets[(first + i) * LANES : (first + min(i + 2, ready)) * LANES]
                    direct = lanes[-1] - lanes[0] == 2 * LANES - 1 and lanes.size == 2 * LANES
                    direct = direct and row + 2 * ROWS <= rows
                    there, stride = buffer, 8 * LANES
                    if direct:
                        there, stride = flat[row * width + lanes[0] :], 4 * width
                    _multiply((x[row // ROWS], leaves[i], there, cells, stride))
                    if not direct:
                        for m in range(min(2 * ROWS, rows - row)):
                            for lane in range(lanes.size):
                                out[row + m, lanes[lane]] = buffer[m * 2 * LANES + lane]

    return run
