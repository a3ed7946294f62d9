"""Many rows of activations times packed weights, in tile registers.

Both are rounded to bfloat16 here, and their products summed in float32: a tile of 16 weights' rows is dequantized to
*leaves* of 32 columns, tiles B of `qattn.cpu.amx`, and 32 columns of 16 rows of activations are a tile A.  Scales and
offsets are in the weights then, so that nothing has to be done between two leaves, where integers would have to be
taken out of the registers and scaled.

A thread dequantizes as many tiles as fill half its second-level cache, then lets all activations pass by.  Long rows
are cut into chunks, between which sums go to memory, so that enough tiles share each activation that passes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.amx import BYTES, PAIRS, ROWS, add_tiles, bf16_pairs, tiles
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.matmul import Weights
from qattn.cpu.scratch import aligned, scratch
from qattn.cpu.simd import LANES, micro_kernel
from qattn.cpu.target import TARGET
from qattn.layout import CELL, Layout

_WIDTH = 2 * LANES  # columns of the product that two tiles give
LEAST = 40  # rows that are worth it: vectors multiply fewer sooner than weights are dequantized
_CHUNK = 128  # cells
_CACHE = 1 << 20  # bytes of dequantized weights that stay in a core's second-level cache


def takes(layout: Layout, rows: int, columns: int) -> bool:
    """Whether so many activations are multiplied in tiles, by weights that rounding to bfloat16 costs no more."""
    fits = layout.bits < 16 or (layout.base == "bf16" and columns % CELL == 0)
    return TARGET.amx and rows >= LEAST and fits


def room(rows: int, columns: int) -> np.ndarray:
    """Scratch for activations: (an even number of blocks, cells, 16 rows, 32 columns) bfloat16, as uint16."""
    return scratch("bfloat16", (-(-rows // (2 * ROWS)) * 2, columns // CELL, ROWS, CELL), np.uint16)


@micro_kernel
def _round_row(e, x, out, cells):
    """A row of float32 → its place in a block.  x - x is NaN where x is NaN or infinite, and so are its products."""
    with e.loop(cells) as cell:
        for half in range(2):
            value = x.at(cell * (4 * CELL)).at(64 * half).load(e.F32)
            out.at(cell * BYTES).at(32 * half).store(e.to_bf16(value + (value - value)))


@kernel()
def round_rows(x, out, part, parts):
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
def _leaves_of_bf16(e, weights, *arguments):
    """Cells of one tile of bfloat16 weights, (K, 16), from the first on → leaves, (cells, 16, 16, 2)."""
    *_, out, first, cells = arguments
    with e.loop(cells) as cell:
        for pair in range(PAIRS):
            rows = weights.at((first + cell) * (2 * CELL * LANES)).at(pair * (4 * LANES))
            low, high = (rows.at(2 * LANES * i).load(e.I16V) for i in range(2))
            out.at(cell * BYTES).at(64 * pair).store(bf16_pairs(e, low, high))


def _leaves_kernel(layout: Layout) -> Any:
    """Cells of one tile of packed weights, from the first on → leaves, (cells, 16, 16, 2) bfloat16."""
    if layout.bits >= 16:
        return _leaves_of_bf16
    parts = max(1, CELL // layout.group)
    quads = 8 // parts

    @micro_kernel
    def run(e, *arguments):
        *packed, out, first, cells = arguments
        with e.loop(cells) as cell:
            weights, there = Weights(e, layout, packed, first + cell), out.at(cell * BYTES)
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
def _multiply(e, x, leaves, sums, out, cells, sizes, pairs, first):
    """Two blocks of activations times `cells` leaves of pairs of tiles: 32 rows of 32 floats for each pair.

    sums : (pairs, 32, 32) float32, the chunks before this one, unless it is the `first`
    sizes : (4,) int64, bytes from a block to the next, from a tile of leaves, from a row of `out`, and from a pair's
    """
    block_bytes, leaf_bytes, stride, step = (sizes.at(8 * i).load(e.I64) for i in range(4))
    with tiles(e) as tile, e.loop(pairs) as pair:
        totals = [(tile[2 * i + j], i, j) for i in range(2) for j in range(2)]
        before, after, leaf = sums.at(pair * (4 * BYTES)), out.at(pair * step), leaves.at(pair * 2 * leaf_bytes)
        for total, _, _ in totals:
            total.clear()
        with e.when(first.compare("==", 0)):
            for total, i, j in totals:
                total.load(before.at(4 * _WIDTH * ROWS * i + 4 * LANES * j), 4 * _WIDTH)
        add_tiles(
            e, tile, 2, 2, cells,
            lambda register, cell, i: register.load(x.at(block_bytes * i).at(cell * BYTES)),
            lambda register, cell, j: register.load(leaf.at(leaf_bytes * j).at(cell * BYTES)),
        )  # fmt: skip
        for total, i, j in totals:
            total.store(after.at(stride * (ROWS * i)).at(4 * LANES * j), stride)


@functools.cache
def product(layout: Layout) -> Kernel:
    """The kernel for weights of a layout: ``run(packed, x, out)`` with ``out[:, packed.targets]`` overwritten.

    packed : `Packed`;  x : activations, see `room`;  out : (tokens, n) float32, C-contiguous
    Cost: reads and dequantizes the packed weights once.  Each output depends on its own row and tile only.
    """
    dequantize = _leaves_kernel(layout)

    @generated(layout.name())
    def fill(packed, tile, count, leaves, first, cells):
        for i in range(count):
            t = tile + i
            dequantize((packed.codes[t], packed.scales[t], packed.steps[t], packed.offsets[t], packed.offset_steps[t],
                        packed.table, leaves[i], first, cells))  # fmt: skip

    @kernel(layout.name())
    def run(packed, x, out, part, parts):
        (rows, width), cells, flat = out.shape, x.shape[1], out.reshape(-1)
        tiles, leaf = packed.codes.shape[0], min(cells, _CHUNK) * BYTES
        mine = share((tiles + 1) // 2, part, parts)  # pairs
        together = 2 * min(max(1, _CACHE // leaf // 2), len(mine))
        leaves = aligned(together * leaf).reshape(-1, leaf)
        # One block of sums will do where they need not be kept.
        sums = aligned(4 * BYTES * (together // 2) * (x.shape[0] // 2 if cells > _CHUNK else 1)).view(np.float32)
        sums = sums.reshape(-1, together // 2 * 2 * ROWS * _WIDTH)
        to_out = np.array([cells * BYTES, leaf, 4 * width, 4 * _WIDTH])
        to_sums = np.array([cells * BYTES, leaf, 4 * _WIDTH, 4 * BYTES])
        end = min(2 * mine.stop, tiles)
        for tile in range(2 * mine.start, end, together):
            ready = min(together, end - tile)
            lanes = packed.targets[tile * LANES : (tile + ready) * LANES]
            whole = lanes.size // _WIDTH if lanes[-1] - lanes[0] == lanes.size - 1 else 0
            for first in range(0, cells, _CHUNK):
                depth, last = min(_CHUNK, cells - first), first + _CHUNK >= cells
                fill(packed, tile, ready, leaves, first, depth)
                for row in range(0, rows, 2 * ROWS):
                    now, so_far = x[row // ROWS, first:], sums[row // (2 * ROWS) % len(sums)]
                    direct = whole if last and row + 2 * ROWS <= rows else 0
                    if direct:
                        there = flat[row * width + lanes[0] :]
                        _multiply((now, leaves, so_far, there, depth, to_out, direct, first == 0))
                    rest, done = so_far[direct * 2 * ROWS * _WIDTH :], direct * _WIDTH  # past an odd tile, of anything
                    pairs = (ready + 1) // 2 - direct
                    _multiply((now, leaves[2 * direct :], rest, rest, depth, to_sums, pairs, first == 0))
                    if last:
                        for m in range(min(2 * ROWS, rows - row)):
                            for n in range(lanes.size - done):
                                out[row + m, lanes[done + n]] = rest[(n // _WIDTH * 2 * ROWS + m) * _WIDTH + n % _WIDTH]

    return run
