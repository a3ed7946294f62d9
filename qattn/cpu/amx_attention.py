"""Attention over a bfloat16 cache, in tile registers: what `qattn.cpu.attend_sides` needs of keys and of values.

A tile of 16 keys, pairs of whose elements lie side by side, is a column of tiles B, and so are two tiles of values for
16 elements, once they lie behind each other.  Queries, and the weights, are tiles A: rows of bfloat16.  Rows come in
blocks of 16; what lies beyond the last row in its block is computed with it, and nobody reads the results.
"""

from __future__ import annotations

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.amx import BYTES, DEPTH, PAIRS, ROWS, Tile, tiles
from qattn.cpu.attend_tiles import AHEAD, KEY_BLOCK
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel
from qattn.cpu.target import TARGET

_TOGETHER = 3  # blocks of rows that share a tile B: as many sums as hide the time that one product takes


def _products(
    e: Emitter, tile: list[Tile], blocks: Value, a: Pointer, b: Pointer, c: Pointer, strides: tuple[Value | int, int],
    pairs: Value, add: bool,
) -> None:  # fmt: skip
    """C (blocks · 16, 16) = A @ B, or += with `add`: A (…, 2 · pairs), B (pairs, 16, 2), by tiles with a `last` one.

    strides : bytes from row to row of A, and of C
    """
    whole, (a_stride, c_stride) = (pairs - 1) >> 4, strides

    def some(count: int, first: Value) -> None:
        left = [a.at((first + i) * ROWS * a_stride) for i in range(count)]
        out = [c.at((first + i) * (ROWS * c_stride)) for i in range(count)]
        for i in range(count):
            tile[i].load(out[i], c_stride) if add else tile[i].clear()
        with e.loop(whole) as step:
            tile[6].load(b.at(step * BYTES))
            for i in range(count):
                tile[3 + i % 2].load(left[i].at(step * (2 * DEPTH)), a_stride)
                tile[i].add_products(tile[3 + i % 2], tile[6])
        tile[7].load(b.at(whole * BYTES))
        for i in range(count):
            tile[5].load(left[i].at(whole * (2 * DEPTH)), a_stride)
            tile[i].add_products(tile[5], tile[7])
            tile[i].store(out[i], c_stride)

    full = blocks / _TOGETHER
    with e.loop(full) as group:
        some(_TOGETHER, group * _TOGETHER)
    for count in range(1, _TOGETHER):
        with e.when((blocks - full * _TOGETHER).compare("==", count)):
            some(count, full * _TOGETHER)


def _last(pairs: Value) -> Value:
    """Pairs of the last tile."""
    return ((pairs - 1) & (PAIRS - 1)) + 1


# ---------------------------------------------------------------------------------------------------------- keys


@micro_kernel
def _round_query(e, q, row, scale, vectors):  # type: ignore[no-untyped-def]
    """Vectors of a query, times `scale`, → bfloat16."""
    factor = scale.splat(e.F32)
    with e.loop(vectors) as i:
        row.at(i * (2 * LANES)).store(e.to_bf16(q.at(i * (4 * LANES)).load(e.F32) * factor))


@micro_kernel
def _scores(e, panel, keys, scores, blocks, key_tiles, tile_bytes, pairs, row_bytes, fetch):  # type: ignore[no-untyped-def]
    """Rows of queries times tiles of keys → scores, a row every KEY_BLOCK floats."""
    with tiles(e, _last(pairs)) as registers, e.loop(key_tiles) as number:
        there = keys.at(number * tile_bytes)
        with e.when(fetch.compare("!=", 0)), e.loop(tile_bytes >> 6) as line:
            e.prefetch(there.at(line * 64).at(AHEAD), near=False)
        out = scores.at(number * (4 * LANES))
        _products(e, registers, blocks, panel, there, out, (row_bytes, 4 * KEY_BLOCK), pairs, add=False)


@generated("amx")
def row_words(head_dim):  # type: ignore[no-untyped-def]
    """Words that a query row takes in s.panel."""
    return (head_dim + DEPTH - 1) // DEPTH * PAIRS


@generated("amx")
def load(q, s, row, rows, scale):  # type: ignore[no-untyped-def]
    """Put a query, (head_dim,) float32, times `scale` into row `row` of `rows`."""
    words = row_words(q.size)
    for d in range(2 * words):
        s.query[d] = q[d] if d < q.size else np.float32(0)
    _round_query((s.query, s.panel[row * words :], scale, 2 * words // LANES))


@generated("amx")
def score(s, rows, keys, values, key_tiles, head_dim, fetch):  # type: ignore[no-untyped-def]
    """s.scores of the first so many tiles: see `qattn.cpu.attend_sides.Keys`."""
    few = rows < TARGET.rows  # memory binds
    blocks, tile_bytes = (rows + ROWS - 1) // ROWS, 2 * keys.shape[1]
    _scores((s.panel, keys, s.scores, blocks, key_tiles, tile_bytes, (head_dim + 1) // 2, 4 * row_words(head_dim),
             1 if few else 0))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- values


@micro_kernel
def _copy(e, values, out, key_tiles, slices, tile_bytes, ahead):  # type: ignore[no-untyped-def]
    """Tiles of values, slice by slice, so that the keys of a slice follow each other."""
    half = BYTES // 2
    with e.loop(key_tiles) as number, e.loop(slices) as part:
        there = values.at(number * tile_bytes).at(part * half)
        for line in range(half // 64):
            with e.when(ahead.compare("!=", 0)):
                e.prefetch(there.at(64 * line).at(ahead), near=False)
            out.at(part * (2 * LANES * KEY_BLOCK)).at(number * half).at(64 * line).store(there.at(64 * line).load(e.U8))


@micro_kernel
def _rescale(e, out, factors, rows, slices, slice_bytes):  # type: ignore[no-untyped-def]
    """out *= the rows' factors."""
    with e.loop(rows) as row:
        factor = factors.at(row * 4).load(e.F32S)
        with e.when(factor.compare("!=", 1.0)), e.loop(slices) as part:
            there = out.at(part * slice_bytes).at(row * (4 * LANES))
            there.store(there.load(e.F32) * factor.splat(e.F32))


@micro_kernel
def _add(e, weights, values, out, blocks, slices, pairs, slice_bytes):  # type: ignore[no-untyped-def]
    """out += rows of weights times values, slice by slice."""
    with tiles(e, _last(pairs)) as registers, e.loop(slices) as part:
        there, to = values.at(part * (2 * LANES * KEY_BLOCK)), out.at(part * slice_bytes)
        _products(e, registers, blocks, weights, there, to, (2 * KEY_BLOCK, 4 * LANES), pairs, add=True)


@generated("amx")
def slices_of(value_dim):  # type: ignore[no-untyped-def]
    """Slices of 16 elements that a row takes in s.out."""
    return (value_dim + LANES - 1) // LANES


@generated("amx")
def add(s, rows, values, key_tiles, follow, value_dim):  # type: ignore[no-untyped-def]
    """s.out = s.out · s.factor + weights times the first so many tiles: see `qattn.cpu.attend_sides.Values`."""
    slices, tile_bytes, slice_bytes = slices_of(value_dim), 2 * values.shape[1], 4 * LANES * s.row_max.size
    ahead = key_tiles * tile_bytes if follow and rows < TARGET.rows else 0  # where memory binds
    _copy((values, s.copied, key_tiles, slices, tile_bytes, ahead))
    _rescale((s.out, s.factor, rows, slices, slice_bytes))
    _add((s.weights, s.copied, s.out, (rows + ROWS - 1) // ROWS, slices, key_tiles * (LANES // 2), slice_bytes))
