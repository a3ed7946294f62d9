"""Attention over a bfloat16 cache, in tile registers: what `qattn.cpu.attend_sides` needs of keys and of values.

A tile of 16 keys, pairs of whose elements lie side by side, is a column of tiles B; 16 values are a row of tiles B half
as deep.  Queries, and the weights, are tiles A: rows of bfloat16.  Rows come in blocks of 16; what lies beyond the last
row in its block is computed with it, and nobody reads the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qattn.cpu import attend_tiles
from qattn.cpu._jit import generated
from qattn.cpu.amx import DEPTH, PAIRS, ROWS, Tile, add_tiles, tiles
from qattn.cpu.attend_tiles import KEY_BLOCK, STREAMED
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel


class _Matrix(NamedTuple):
    """Where tiles lie: bytes from row to row of one, to the next tile below or along the sum, and to that beside it."""

    start: Pointer
    row: Value | int
    step: Value | int
    beside: Value | int

    def at(self, step: Value, number: Value) -> Pointer:
        return self.start.at(step * self.step).at(number * self.beside)


class _Shape(NamedTuple):
    """Of a product of tiles."""

    blocks: Value
    """Blocks of 16 rows of A and C."""
    columns: Value
    """Columns of tiles of B and C."""
    steps: Value
    """Tiles along the sum."""
    depth: Value | int
    """Pairs that each of them is deep."""


def _products(e: Emitter, shape: _Shape, a: _Matrix, b: _Matrix, c: _Matrix, add: bool, ahead: Value) -> None:
    """C = A @ B, or += with `add`: two by two tiles, so that each one loaded is multiplied twice.

    ahead : bytes from a tile B to what to ask memory for meanwhile, or 0
    """
    with tiles(e, shape.depth) as registers:

        def some(rows: int, columns: int, block: Value, column: Value) -> None:
            def load_a(register: Tile, step: Value, i: int) -> None:
                register.load(a.at(step, block + i), a.row)

            def load_b(register: Tile, step: Value, j: int) -> None:
                there = b.at(step, column + j)
                register.load(there, b.row)
                with e.when(ahead.compare("!=", 0)), e.loop(shape.depth) as line:
                    e.prefetch(there.at(ahead).at(line * 64))

            sums = [(registers[2 * i + j], c.at(block + i, column + j)) for i in range(rows) for j in range(columns)]
            for total, there in sums:
                total.load(there, c.row) if add else total.clear()
            add_tiles(e, registers, rows, columns, shape.steps, load_a, load_b)
            for total, there in sums:
                total.store(there, c.row)

        for columns, column in _by_twos(e, shape.columns):
            for rows, block in _by_twos(e, shape.blocks):
                some(rows, columns, block, column)


def _by_twos(e: Emitter, count: Value) -> Iterator[tuple[int, Value]]:
    """The bodies of a loop over `count`: for two at once and where they begin, then for one that is left."""
    with e.loop(count >> 1) as i:
        yield 2, i * 2
    with e.when((count & 1).compare("==", 1)):
        yield 1, count - 1


@generated("amx")
def _depth(pairs):
    """How deep tiles are: the most, up to 16 pairs, that so many pairs are a multiple of."""
    depth = PAIRS
    while pairs % depth:
        depth -= 1
    return depth


# ---------------------------------------------------------------------------------------------------------- keys


@micro_kernel
def _round_query(e, q, row, scale, vectors):
    """Vectors of a query, times `scale`, → bfloat16."""
    factor = scale.splat(e.F32)
    with e.loop(vectors) as i:
        row.at(i * (2 * LANES)).store(e.to_bf16(q.at(i * (4 * LANES)).load(e.F32) * factor))


@micro_kernel
def _scores(e, panel, keys, scores, blocks, key_tiles, tile_bytes, depth, steps, row_bytes, ahead):
    """Rows of queries times tiles of keys → scores, a row every KEY_BLOCK floats."""
    a = _Matrix(panel, row_bytes, depth * 4, row_bytes * ROWS)
    b = _Matrix(keys, 64, depth * 64, tile_bytes)
    c = _Matrix(scores, 4 * KEY_BLOCK, ROWS * 4 * KEY_BLOCK, 4 * LANES)
    _products(e, _Shape(blocks, key_tiles, steps, depth), a, b, c, False, ahead)


@generated("amx")
def row_words(head_dim):
    """Words that a query row takes in s.panel."""
    return (head_dim + DEPTH - 1) // DEPTH * PAIRS


@generated("amx")
def load(q, s, row, rows, scale):
    """Put a query, (head_dim,) float32, times `scale` into row `row` of `rows`."""
    words, whole = row_words(q.size), q.size // DEPTH
    _round_query((q, s.panel[row * words :], scale, 2 * whole))
    if whole * PAIRS < words:
        for d in range(DEPTH):
            s.query[d] = q[whole * DEPTH + d] if whole * DEPTH + d < q.size else np.float32(0)
        _round_query((s.query, s.panel[row * words + whole * PAIRS :], scale, 2))


@generated("amx")
def score(s, rows, keys, values, key_tiles, head_dim, fetch):
    """s.scores of the first so many tiles: see `qattn.cpu.attend_sides.Keys`."""
    blocks, tile_bytes, pairs = (rows + ROWS - 1) // ROWS, 2 * keys.shape[1], (head_dim + 1) // 2
    few, depth = rows <= STREAMED, _depth(pairs)
    if few and fetch:
        attend_tiles.fetch((values, key_tiles * 2 * values.shape[1]))
    _scores((s.panel, keys, s.scores, blocks, key_tiles, tile_bytes, depth, pairs // depth, 4 * row_words(head_dim),
             key_tiles * tile_bytes if few else 0))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- values


@micro_kernel
def _rescale(e, out, factors, rows, slices, slice_bytes):
    """out *= the rows' factors."""
    with e.loop(rows) as row:
        factor = factors.at(row * 4).load(e.F32S)
        with e.when(factor.compare("!=", 1.0)), e.loop(slices) as part:
            there = out.at(part * slice_bytes).at(row * (4 * LANES))
            there.store(there.load(e.F32) * factor.splat(e.F32))


@micro_kernel
def _add(e, weights, values, out, blocks, slices, key_tiles, tile_bytes, slice_bytes, ahead):
    """out += rows of weights times tiles of values, slice by slice."""
    a = _Matrix(weights, 2 * KEY_BLOCK, 2 * LANES, ROWS * 2 * KEY_BLOCK)
    b = _Matrix(values, 64, tile_bytes, 2 * LANES * LANES)
    c = _Matrix(out, 4 * LANES, ROWS * 4 * LANES, slice_bytes)
    _products(e, _Shape(blocks, slices, key_tiles, LANES // 2), a, b, c, True, ahead)


@generated("amx")
def slices_of(value_dim):
    """Slices of 16 elements that a row takes in s.out."""
    return (value_dim + LANES - 1) // LANES


@generated("amx")
def add(s, rows, values, key_tiles, follow, value_dim):
    """s.out = s.out · s.factor + weights times the first so many tiles: see `qattn.cpu.attend_sides.Values`."""
    slices, tile_bytes, slice_bytes = slices_of(value_dim), 2 * values.shape[1], 4 * LANES * s.row_max.size
    ahead = key_tiles * tile_bytes if follow and rows <= STREAMED else 0
    _rescale((s.out, s.factor, rows, slices, slice_bytes))
    _add((s.weights, values, s.out, (rows + ROWS - 1) // ROWS, slices, key_tiles, tile_bytes, slice_bytes, ahead))
