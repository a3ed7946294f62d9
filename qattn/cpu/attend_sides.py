"""What a job of attention does with keys, and with values, for each way to store them.

A job works on the first `rows` rows of its scratch `s`, see `qattn.cpu.attention`, in blocks of `TARGET.rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qattn.cache_types import BLOCK
from qattn.cpu import amx_attention, attend_codes, attend_tiles
from qattn.cpu._jit import generated
from qattn.cpu.activations import block_size
from qattn.cpu.attend_codes import SCALES
from qattn.cpu.attend_tiles import KEY_BLOCK, STREAMED, Storage
from qattn.cpu.matmul import by_size
from qattn.cpu.simd import LANES
from qattn.cpu.target import TARGET


class Keys(NamedTuple):
    """Compiled functions for keys."""

    row_words: Callable[..., Any]
    """head_dim → words that a query row takes in s.panel."""
    load: Callable[..., Any]
    """(q, s, row, rows, scale): put a query, (head_dim,) float32, times `scale` into row `row` of `rows`."""
    score: Callable[..., Any]
    """(s, rows, keys, values, tiles, head_dim, fetch): s.scores of the first so many tiles of keys; memory may be asked
    for as many of values if `fetch`."""
    early: bool
    """Whether memory should be asked for most of the keys that follow while the softmax is computed."""


class Values(NamedTuple):
    """Compiled functions for values."""

    slices: Callable[..., Any]
    """value_dim → slices of 16 elements that a row takes in s.out."""
    add: Callable[..., Any]
    """(s, rows, values, tiles, follow, value_dim): s.out = s.out · s.factor + weights times the first so many tiles;
    as many will be wanted next if they `follow`, and memory may be asked for them."""
    ahead: bool
    """Whether it is."""


@functools.cache
def keys(storage: Storage) -> Keys:
    """The functions for keys that are stored and multiplied like this."""
    if storage.compute == "amx":
        return Keys(amx_attention.row_words, amx_attention.load, amx_attention.score, early=False)
    in_blocks, rounds, name = storage.type.in_blocks, storage.compute == "int8", f"{storage.kind}-{storage.compute}"
    packed, words = storage.pack, storage.words
    load_row = (attend_codes if rounds else attend_tiles).query_kernel(storage)
    made: Any = attend_tiles.scores_kernel
    if in_blocks:
        made = attend_codes.scores_kernel if rounds else attend_codes.exact_scores_kernel
    scores = by_size(made, storage)

    @generated(name)
    def steps_of(head_dim):
        return (head_dim + BLOCK - 1) // BLOCK if in_blocks else (head_dim + packed - 1) // packed

    @generated(name)
    def row_words(head_dim):
        steps = steps_of(head_dim)
        if in_blocks:
            return steps * (attend_codes.QUERY_WORDS if rounds else BLOCK)
        return steps * words

    @generated(name)
    def load(q, s, row, rows, scale):
        block, head_dim = row // TARGET.rows * TARGET.rows, q.size
        size, steps = block_size(rows - block), steps_of(head_dim)
        panel = s.panel[block * row_words(head_dim) + row - block :]
        if rounds:
            for d in range(steps * BLOCK):
                s.query[d] = q[d] if d < head_dim else np.float32(0)
            load_row((s.query, panel, scale, steps, 4 * size))
        else:
            load_row((q, panel, scale, head_dim, steps * BLOCK if in_blocks else steps, 4 * size))

    @generated(name)
    def score(s, rows, keys, values, tiles, head_dim, fetch):
        steps, size_of_row = steps_of(head_dim), row_words(head_dim)
        lines = (values[0].nbytes + 63) // 64 if fetch and rows <= STREAMED else 0
        for block in range(0, rows, TARGET.rows):
            scores(block_size(rows - block), (
                s.panel[block * size_of_row :], keys[0], s.scores[block * KEY_BLOCK :], steps,
                tiles, keys[0].nbytes, values[0], values[0].nbytes, lines))  # fmt: skip

    return Keys(row_words, load, score, early=rounds)  # floats take longer to come than the softmax does


@functools.cache
def values(storage: Storage) -> Values:
    """The functions for values that are stored and multiplied like this."""
    if storage.compute == "amx":
        return Values(amx_attention.slices_of, amx_attention.add, ahead=True)
    name = f"{storage.kind}-{storage.compute}"
    if storage.type.in_blocks:
        if storage.compute == "int8":
            return Values(_whole_cells, _add_codes(storage, name), ahead=True)
        return Values(_whole_cells, _add_exact_codes(storage, name), ahead=False)
    return Values(_slices, _add_floats(storage, name), ahead=True)


@generated("floats")
def _slices(value_dim):
    return (value_dim + LANES - 1) // LANES


@generated("codes")
def _whole_cells(value_dim):
    return (value_dim + BLOCK - 1) // BLOCK * (BLOCK // LANES)


def _add_floats(storage: Storage, name: str) -> Any:
    kernel = by_size(attend_tiles.values_kernel, storage)
    step = LANES * LANES  # elements of one slice of a tile
    item, half_weights = storage.type.bits // 8, storage.compute == "bf16"

    @generated(name)
    def add(s, rows, values, tiles, follow, value_dim):
        weights, tile_bytes = s.weights.view(np.uint16) if half_weights else s.weights, values.shape[1] * item
        ahead = tiles * tile_bytes if follow else 0
        for part in range(_slices(value_dim)):
            for block in range(0, rows, TARGET.rows):
                kernel(block_size(rows - block), (weights[block * KEY_BLOCK :], values[0, part * step :],
                       s.out[(part * s.row_max.size + block) * LANES :], s.factor[block:], tiles,
                       tile_bytes, ahead))  # fmt: skip

    return add


def _add_codes(storage: Storage, name: str) -> Any:
    round_weights = attend_tiles.some_rows(attend_codes.weights_kernel, storage)
    kernel, size = by_size(attend_codes.values_kernel, storage), attend_codes.cell_bytes(storage.type)

    @generated(name)
    def add(s, rows, values, tiles, follow, value_dim):
        cells, tile_bytes, slice_of_rows = (value_dim + BLOCK - 1) // BLOCK, values.shape[1], s.row_max.size * LANES
        ahead = tiles * tile_bytes if follow else 0
        for cell in range(cells):
            row = 0
            while row < rows:
                row += round_weights(rows - row, (
                    s.weights[row * KEY_BLOCK :], values, s.rounded[row * KEY_BLOCK :], s.units[row:],
                    s.constants[row:], cell, cells, tiles, tile_bytes, ahead if row == 0 else 0))  # fmt: skip
            for block in range(0, rows, TARGET.rows):
                kernel(block_size(rows - block), (
                    s.rounded[block * KEY_BLOCK :], values[0, cell * size :], values[0, cells * size + cell * SCALES :],
                    s.out[2 * cell * slice_of_rows + block * LANES :], s.factor[block:], s.units[block:],
                    s.constants[block:], tiles, tile_bytes, 4 * slice_of_rows, ahead))  # fmt: skip

    return add


def _add_exact_codes(storage: Storage, name: str) -> Any:
    kernel, size = by_size(attend_codes.exact_values_kernel, storage), attend_codes.cell_bytes(storage.type)

    @generated(name)
    def add(s, rows, values, tiles, follow, value_dim):
        cells, tile_bytes, slice_of_rows = (value_dim + BLOCK - 1) // BLOCK, values.shape[1], s.row_max.size * LANES
        for cell in range(cells):
            scales_at = cells * size + cell * SCALES
            for block in range(0, rows, TARGET.rows):
                kernel(block_size(rows - block), (
                    s.weights[block * KEY_BLOCK :], values[0, cell * size :], values[0, scales_at:],
                    values[0, scales_at + cells * SCALES :], s.out[2 * cell * slice_of_rows + block * LANES :],
                    s.factor[block:], tiles, tile_bytes, 4 * slice_of_rows))  # fmt: skip

    return add
