"""Float32 activations times packed weights, and times weights that are floats: no tensor cores, and nothing rounded.

A block of threads has 64 rows and 16 tokens.  It takes 128 columns at a time: weights, as float32, and activations go
to shared memory, and each thread multiplies four rows by four tokens, in a quarter of the columns.  The four quarters'
totals are added up at the end, in order.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda, float32, int32, int64, types, uint32

from qattn.cuda import ptx
from qattn.cuda.emitter import Emitter, function
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.matmul_cell import groups_of, value_maker, weight_fetcher, weight_placer
from qattn.cuda.values import load_four_of
from qattn.layout import CELL, Layout

_ROWS, _TOKENS, _COLUMNS = 64, 16, 128  # of a block, and of one turn
_WEIGHTS, _VALUES = _ROWS * _COLUMNS, _TOKENS * _COLUMNS
_THREADS = 256
_PASSES = _VALUES // _THREADS
_ZEROS = (np.float32(0),) * 16
_FLOATS = {"f16": "u16*", "bf16": "u16*", "f32": "f32*"}


def _add_products(e: Emitter, totals: Any, a: Any, b: Any) -> list[Any]:
    """totals[4 j + i] + a[i] · b[j]: the words are those of float32."""
    rows, tokens = ([e(ptx.float_of, word) for word in words] for words in (a, b))
    return [e.fma(rows[i % 4], tokens[i // 4], total) for i, total in enumerate(totals)]


_outer = function("totals, a, b", types.UniTuple(types.float32, 16), _add_products)


def _fill_levels(layout: Layout) -> Any:
    """The device function that dequantizes 64 rows and 128 columns: each warp two tiles and a cell."""
    place_weights, fetch_weights, values = weight_placer(layout), weight_fetcher(layout), value_maker(layout)
    has_table, halves = layout.table, groups_of(layout) == 2

    @device
    def fill(weights, w, table, tile, tiles, head, column, columns, thread):
        lane, pair, cell = thread & 31, thread >> 5 & 1, column // CELL + (thread >> 6)
        lookup = ptx.load_16_constant(table, 0) if has_table else (uint32(0), uint32(0), uint32(0), uint32(0))
        if cell * CELL < columns:
            mine = head * tiles + min(tile + 2 * pair + (lane >> 4), tiles - 1)
            found = values(fetch_weights(place_weights(w, mine, columns // CELL, lane), cell), lane, lookup)
            row, c = 32 * pair + (lane & 28), lane & 3
            for i in range(32):
                quad = c + 4 * (i >> 4) if halves else 2 * c + (i >> 4)
                k = CELL * (thread >> 6) + 4 * quad + (i & 3)
                weights[uint32(k * _ROWS + row + (i >> 2 & 3))] = found[i]

    return fill


def _fill_floats(layout: Layout) -> Any:
    """The device function that does so with weights that are floats: each thread eight times four rows."""
    load = load_four_of(layout.base)

    @device
    def fill(weights, w, table, tile, tiles, head, column, columns, thread):
        row = 4 * (thread & 15)
        mine = head * tiles + min(tile + (row >> 4), tiles - 1)
        for i in range(_COLUMNS // 16):
            k = 16 * i + (thread >> 4)
            if column + k < columns:
                at = (int64(mine) * columns + (column + k)) * 16 + (row & 15)
                a, b, c, d = load(w[0], at)
                there = k * _ROWS + row
                weights[uint32(there)], weights[uint32(there + 1)] = a, b
                weights[uint32(there + 2)], weights[uint32(there + 3)] = c, d

    return fill


@functools.cache
def exact_kernel(layout: Layout) -> Kernel:
    """The kernel for any number of tokens."""
    floats = layout.bits >= 16
    fill = _fill_floats(layout) if floats else _fill_levels(layout)
    codes = _FLOATS[layout.base] if floats else "u8*"
    signature = f"{codes} u16* i8* u16* i8* u8* i32* i32 i32 i32"

    @kernel(f"{signature} f32* f32* i32 i32", layout.name().replace("-", "_"))
    def exact(codes, scales, steps, offsets, offset_steps, table, targets, tiles, columns, rows, x, out, tokens, width):
        thread, tile = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x) * (_ROWS // 16)
        first, quarter = int32(cuda.blockIdx.y) * _TOKENS, thread >> 6
        head, heads = int32(cuda.blockIdx.z), int32(cuda.gridDim.z)
        row, token = 4 * (thread & 15), 4 * (thread >> 4 & 3)  # the thread's first ones
        weights = cuda.shared.array(_WEIGHTS, float32, 16)
        values = cuda.shared.array(_VALUES, float32, 16)
        weights_at = ptx.shared_address(weights, 0) + uint32(4 * row)
        values_at = ptx.shared_address(values, 0) + uint32(4 * token)
        w, totals, column = (codes, scales, steps, offsets, offset_steps), _ZEROS, int32(0)
        while column < columns:
            fill(weights, w, table, tile, tiles, head, column, columns, thread)
            for i in range(_PASSES):
                there, k = 2 * i + (thread >> 7), thread & 127
                inside = first + there < tokens and column + k < columns
                value = float32(0)
                if inside:
                    value = x[(int64(first + there) * heads + head) * columns + (column + k)]
                values[uint32(k * _TOKENS + there)] = value
            cuda.syncthreads()
            if first + token < tokens:
                k, end = 32 * quarter, min(32 * quarter + 32, columns - column)
                while k < end:
                    a = ptx.load_shared_16(weights_at + uint32(4 * _ROWS * k))
                    totals = _outer(totals, a, ptx.load_shared_16(values_at + uint32(4 * _TOKENS * k)))
                    k = int32(k + 1)
            cuda.syncthreads()
            column = int32(column + _COLUMNS)
        for i in range(16):  # row i & 3, token i >> 2; the weights' memory is free now
            weights[uint32((quarter * _TOKENS + token + (i >> 2)) * _ROWS + row + (i & 3))] = totals[i]
        cuda.syncthreads()
        for i in range(4):
            row, token, total = thread & 63, 4 * i + (thread >> 6), float32(0)
            for k in range(4):
                total += weights[uint32((k * _TOKENS + token) * _ROWS + row)]
            if first + token < tokens and tile * 16 + row < rows:
                out[int64(first + token) * width + targets[head * rows + tile * 16 + row]] = total

    return exact


def exact(layout: Layout, packed: Any, x: Any, out: Any, heads: int = 1) -> None:
    """Multiply float32 activations, x (tokens, K) or (tokens, heads, K)."""
    weights = (packed.codes, packed.scales, packed.steps, packed.offsets, packed.offset_steps, packed.table)
    sizes = packed.codes.shape[0] // heads, x.shape[-1], packed.rows // heads
    grid = -(-packed.rows // heads // _ROWS), -(-len(x) // _TOKENS), heads
    exact_kernel(layout)(*weights, packed.targets, *sizes, x, out, *out.shape, grid=grid, block=_THREADS)
