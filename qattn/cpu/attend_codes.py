"""The micro-kernels of attention over a cache that stores codes in blocks of 32.

Codes lie in *cells* of 32 elements times 16, as those of packed weights do (see `qattn.layout`): 8 quads of 4 codes for
each of 16 lanes.  A tile of 16 keys has a cell for each 32 elements of a head: quads are neighbours in the head, lanes
are keys.  A tile of 16 values likewise: its quads are 4 keys each, first for the lower 16 elements, then for the upper
ones, which are the lanes.  Behind a tile's cells lie its scales, 16 float16 for each cell, one for each key or value;
then its offsets, if the type has any.

Products are dot products of bytes, as in `qattn.cpu.matmul`.  Queries are rounded to int8 with a scale per 32 elements:

    score[row, key] += q_scale[row] · (scale[key] · Σ level · q_level + offset[key] · Σ q_level)

Values have a scale each, and the sum is over values, so that scales join the weights, which are never negative.  For a
block of keys and 32 elements, the products of weight and scale are rounded to unsigned bytes relative to the largest:

    out[row, element] += unit[row] · Σ_keys rounded[row, key] · level[key, element]
                         + Σ_keys weight[row, key] · offset[key]

where levels are counted from the middle one, and offsets are that of it.  The sign of a scale goes to the levels.
Exact kernels have the same loops on float32 levels.
"""

from __future__ import annotations

import itertools
from typing import Any

from qattn.cache_types import CacheType
from qattn.cpu.activations import round_cell
from qattn.cpu.attend_tiles import AHEAD, KEY_BLOCK, STREAMED, Storage, each_tile
from qattn.cpu.dots import Dots
from qattn.cpu.planes import quad_codes
from qattn.cpu.simd import LANES, MAX_CODE, Emitter, Pointer, Value, micro_kernel
from qattn.layout import CELL

QUERY_WORDS = 11  # of a cell of a query: its 8 quads, scale, start of the sum, and sum
SCALES = 2 * LANES  # bytes of the scales of a cell, or of its offsets
_ROUND = 1.5 * 2.0**23  # added to a small number, it rounds that to an integer and leaves it in the lowest bits
_TINY = 1e-30  # sums of weights below it are nothing beside the largest weight of the row, which is 1


class _Cell:
    """Reads the codes of one cell, given the first byte of the first one of its type."""

    def __init__(self, e: Emitter, type_: CacheType, there: Pointer) -> None:
        self.e, self.type, self._there = e, type_, there

    def biased(self, quad: int) -> Value:
        """64 unsigned bytes: levels plus `_bias`."""
        table = self.type.table
        return self._looked_up(quad, [level + _bias(self.type) for level in table]) if table else self._codes(quad)

    def levels(self, quad: int, zero: int | None = None) -> Value:
        """64 signed bytes: codes minus the type's zero, or another."""
        if self.type.table:
            return self._looked_up(quad, list(self.type.table))
        zero, codes = self.type.zero if zero is None else zero, self._codes(quad)
        return codes - zero if zero else codes

    def floats(self, quad: int) -> list[Value]:
        """Four vectors of float32 levels, one for each byte of the lanes."""
        word = self.levels(quad).bits(self.e.I32V)
        return [(word << (24 - 8 * i)).shift_signed(24).to(self.e.F32) for i in range(4)]

    def _looked_up(self, quad: int, table: list[int]) -> Value:
        return self.e.lookup(self.e.constant(table * 4, self.e.U8), self._codes(quad, clean=False))

    def _codes(self, quad: int, clean: bool = True) -> Value:
        return quad_codes(self._vector, self.type.bits, quad, clean).bits(self.e.U8)

    def _vector(self, number: int) -> Value:
        return self._there.at(64 * number).load(self.e.I32V)


def cell_bytes(type_: CacheType) -> int:
    """Bytes of a cell's codes."""
    return 2 * CELL * type_.bits


def _bias(type_: CacheType) -> int:
    """What makes levels unsigned."""
    return 128 if type_.table else type_.zero


def _signed(type_: CacheType) -> bool:
    """Whether keys are multiplied as signed levels, since unsigned ones would be too large for the machine."""
    return _largest(type_) > MAX_CODE


def _largest(type_: CacheType) -> int:
    """The largest byte that `_Cell.biased` gives."""
    return 255 if type_.table else (1 << type_.bits) - 1


def _middle(type_: CacheType) -> int:
    """What is subtracted from the codes of values, so that errors of rounded weights meet small levels."""
    return 1 << (type_.bits - 1) if type_.offset else type_.zero


def _far(type_: CacheType) -> int:
    """The largest magnitude of a value's level, counted from the middle."""
    return 128 if type_.table else 1 << (type_.bits - 1)


def _floats(e: Emitter, there: Pointer) -> Value:
    """16 scales or offsets as float32."""
    return e.from_f16(there.load(e.I16V))


# ---------------------------------------------------------------------------------------------------------- keys


def query_kernel(storage: Storage) -> Any:
    """Round one query row, times `scale`, into a column-major block: `QUERY_WORDS` words for each cell.

    q : float32, padded to whole cells
    """
    bias = 0 if _signed(storage.type) else _bias(storage.type)

    @micro_kernel
    def run(e, q, panel, scale, cells, stride):
        factor = scale.splat(e.F32)
        with e.loop(cells) as cell:
            there = panel.at(cell * stride * QUERY_WORDS)
            unit, rounded = round_cell(e, [q.at(cell * (4 * CELL)).at(64 * i).load(e.F32) * factor for i in range(2)])
            integers = [half.to(e.I32V) for half in rounded]
            for i, half in enumerate(integers):
                quads = half.to(e.I8V).bits(e.QUADS)
                for quad in range(4):
                    there.at(stride * (4 * i + quad)).store(quads.lane(quad))
            total = e.sum(integers[0] + integers[1])
            for word, value in ((8, unit), (9, total * -bias), (10, unit * total.to(e.F32S))):
                there.at(stride * word).store(value)

    return run


def scores_kernel(storage: Storage, rows: int) -> Any:
    """`rows` query rows, rounded, times one tile of keys → scores, a row every KEY_BLOCK floats."""
    type_, size = storage.type, cell_bytes(storage.type)
    all_bytes, signed = size + SCALES * (1 + type_.offset), _signed(type_)

    @each_tile
    def run(e, q, keys, scores, cells):
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(cells) as k:
            at, cell = q.at(k * (4 * QUERY_WORDS * rows)), _Cell(e, type_, keys.at(k * size))

            def word(w: int, m: int, at: Pointer = at) -> Pointer:
                return at.at(4 * (w * rows + m))

            dots = Dots(e, [word(9, m).load(e.I32).splat(e.I32V) for m in range(rows)], 8, _largest(type_), signed)

            def codes(quad: int, cell: _Cell = cell, k: Value = k) -> Value:
                if rows <= STREAMED:
                    for line in range(quad * 64, all_bytes, 8 * 64):
                        e.prefetch(keys.at(k * all_bytes).at(line + AHEAD))
                return cell.levels(quad) if signed else cell.biased(quad)

            dots.add_all(range(8), codes, lambda quad, m: word(quad, m).load(e.I32).splat(e.I32V))
            there = keys.at(cells * size + k * SCALES)
            scale = _floats(e, there)
            for m in range(rows):
                product = dots.total(m).to(e.F32) * scale
                total = e.fma(product, word(8, m).load(e.F32S).splat(e.F32), totals[m].get())
                if type_.offset:
                    offset = _floats(e, there.at(cells * SCALES))
                    total = e.fma(offset, word(10, m).load(e.F32S).splat(e.F32), total)
                totals[m].set(total)
        for m in range(rows):
            scores.at(m * 4 * KEY_BLOCK).store(totals[m].get())

    return run


def exact_scores_kernel(storage: Storage, rows: int) -> Any:
    """The same with queries in float32."""
    type_, size = storage.type, cell_bytes(storage.type)

    @each_tile
    def run(e, q, keys, scores, cells):
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(cells) as k:
            at, cell, there = q.at(k * (4 * CELL * rows)), _Cell(e, type_, keys.at(k * size)), keys.at(cells * size)
            scale = _floats(e, there.at(k * SCALES))
            offset = _floats(e, there.at((cells + k) * SCALES)) if type_.offset else None
            sums = [total.get() for total in totals]
            for quad in range(8):
                for i, level in enumerate(cell.floats(quad)):
                    key = level * scale if offset is None else e.fma(level, scale, offset)
                    for m in range(rows):
                        query = at.at(4 * ((4 * quad + i) * rows + m)).load(e.F32S).splat(e.F32)
                        sums[m] = e.fma(query, key, sums[m])
            for total, value in zip(totals, sums, strict=True):
                total.set(value)
        for m in range(rows):
            scores.at(m * 4 * KEY_BLOCK).store(totals[m].get())

    return run


# -------------------------------------------------------------------------------------------------------- values


def weights_kernel(storage: Storage, rows: int) -> Any:
    """Round rows of weights, times the scales of a cell of each tile: a byte a key, a unit and a constant for each row.

    weights, rounded : a row every KEY_BLOCK;  values : the first tile;  cell, cells : which, of how many
    ahead : bytes from a tile to the one to ask memory for meanwhile, half of this cell
    """
    type_, size = storage.type, cell_bytes(storage.type)
    lines = size // 64  # of a cache

    @micro_kernel
    def run(e, weights, values, rounded, units, constants, cell, cells, tiles, tile_bytes, ahead):
        first, zeros = values.at(cells * size + cell * SCALES), e.constant(0.0, e.F32)

        def products(tile: Value) -> list[tuple[Value, Value]]:
            """The weights of a tile, and these times the scales, for each row."""
            scale, there = _floats(e, first.at(tile * tile_bytes)), weights.at(tile * (4 * LANES))
            scale = e.absolute(scale) if type_.signed_scale else scale
            of_rows = [there.at(m * 4 * KEY_BLOCK).load(e.F32) for m in range(rows)]
            return [(weight, weight * scale) for weight in of_rows]

        def prefetch(tile: Value, lines: range) -> None:
            there = values.at(tile * tile_bytes + ahead)
            for line in lines:
                e.prefetch(there.at(cell * size + 64 * line))

        largest, totals = ([e.register(zeros) for _ in range(rows)] for _ in range(2))
        with e.loop(tiles) as tile:
            prefetch(tile, range(lines // 4))
            for i in range(1 + type_.offset):
                e.prefetch(first.at(tile * tile_bytes + cells * (i * SCALES)).at(ahead))
            offset = _floats(e, first.at(tile * tile_bytes).at(cells * SCALES)) if type_.offset else None
            for m, (weight, product) in enumerate(products(tile)):
                largest[m].set(e.maximum(product, largest[m].get()))
                if offset is not None:
                    totals[m].set(totals[m].get() + e.fma(weight, offset, product * float(_middle(type_))))
        inverses, nothing = [], e.constant(0.0, e.F32S)
        for m in range(rows):
            step = e.largest(largest[m].get()) * (1 / MAX_CODE)
            inverses.append(step.compare(">", _TINY).where(e.constant(1.0, e.F32S) / step, nothing).splat(e.F32))
            units.at(4 * m).store(step)
            constants.at(4 * m).store(e.sum(totals[m].get()))
        with e.loop(tiles) as tile:
            prefetch(tile, range(lines // 4, lines // 2))
            for m, (_, product) in enumerate(products(tile)):
                word = e.fma(product, inverses[m], e.constant(_ROUND, e.F32))
                rounded.at(m * KEY_BLOCK).at(tile * LANES).store(word.bits(e.I32V).to(e.I8V))

    return run


def values_kernel(storage: Storage, rows: int) -> Any:
    """out = out · factor + constant + unit · rounded weights times one cell of each tile.

    out : a row every 16 floats, for the lower 16 elements, and `slice_bytes` further on for the upper ones
    ahead : bytes from a tile to the one to ask memory for meanwhile, the other half of this cell
    """
    type_, lines = storage.type, cell_bytes(storage.type) // 64

    @micro_kernel
    def run(e, rounded, codes, scales, out, factors, units, constants, tiles, tile_bytes, slice_bytes, ahead):
        sums = [[e.register(e.constant(0, e.I32V)) for _ in range(rows)] for _ in range(2)]
        with e.loop(tiles) as tile:
            cell, at = _Cell(e, type_, codes.at(tile * tile_bytes)), rounded.at(tile * LANES)
            signs = scales.at(tile * tile_bytes).load(e.I16V).shift_signed(15).to(e.I8V).bits(e.QUADS)
            dots = [Dots(e, [sum_.get() for sum_ in half], 4, MAX_CODE, x=_far(type_)) for half in sums]
            for quad in range(4):
                for line in range(lines // 2 + quad, lines if rows <= STREAMED else 0, 4):
                    e.prefetch(codes.at(tile * tile_bytes + 64 * line).at(ahead))
                levels = [cell.levels(4 * half + quad, _middle(type_)) for half in range(2)]
                if type_.signed_scale:  # -1 where it is negative: level ^ -1 = -level - 1
                    sign = signs.lane(quad).splat(e.I32V).bits(e.U8)
                    levels = [(level ^ sign) - sign for level in levels]
                for m in range(rows):
                    weight = at.at(m * KEY_BLOCK + 4 * quad).load(e.I32).splat(e.I32V)
                    for half in range(2):
                        dots[half].add(m, weight, levels[half])
            for half in range(2):
                for m in range(rows):
                    sums[half][m].set(dots[half].total(m))
        for m in range(rows):
            factor, unit, constant = (a.at(4 * m).load(e.F32S).splat(e.F32) for a in (factors, units, constants))
            for half in range(2):
                there = out.at(slice_bytes * half).at(m * 4 * LANES)
                total = there.load(e.F32) * factor
                if type_.offset:
                    total = total + constant
                there.store(e.fma(sums[half][m].get().to(e.F32), unit, total))

    return run


def exact_values_kernel(storage: Storage, rows: int) -> Any:
    """The same with weights in float32, a row every KEY_BLOCK floats, and without units and constants."""
    type_ = storage.type

    @micro_kernel
    def run(e, weights, codes, scales, offsets, out, factors, tiles, tile_bytes, slice_bytes):
        outputs = [[out.at(slice_bytes * half).at(m * 4 * LANES) for m in range(rows)] for half in range(2)]
        factor = [factors.at(4 * m).load(e.F32S).splat(e.F32) for m in range(rows)]
        totals = [
            [e.register(there.load(e.F32) * by) for there, by in zip(half, factor, strict=True)] for half in outputs
        ]
        with e.loop(tiles) as tile:
            cell, at = _Cell(e, type_, codes.at(tile * tile_bytes)), weights.at(tile * (4 * LANES))
            scale = _floats(e, scales.at(tile * tile_bytes))
            offset = _floats(e, offsets.at(tile * tile_bytes)) if type_.offset else None
            for half in range(2):
                sums = [total.get() for total in totals[half]]
                for key in range(LANES):
                    level = cell.floats(4 * half + key // 4)[key % 4]
                    value = level * scale.lane(key).splat(e.F32)
                    if offset is not None:
                        value = value + offset.lane(key).splat(e.F32)
                    for m in range(rows):
                        weight = at.at(4 * (m * KEY_BLOCK + key)).load(e.F32S).splat(e.F32)
                        sums[m] = e.fma(weight, value, sums[m])
                for total, register in zip(sums, totals[half], strict=True):
                    register.set(total)
        for there, total in zip(itertools.chain(*outputs), itertools.chain(*totals), strict=True):
            there.store(total.get())

    return run
