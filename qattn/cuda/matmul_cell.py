"""What a warp does with a cell of packed weights: load its words, make factors of them, multiply.

A warp multiplies two tiles, 32 rows, at a time.  Its lane 16 t + 4 s + c reads, of tile t, the words of rows 4 s to
4 s + 3 and of two quads: 16 bytes at once, and all bytes of a cell exactly once where a plane has as many.  A word is
four neighbouring columns of a row, as the fragments of a product want them.  Which rows and columns these are doesn't
matter to a tensor core, as long as both factors agree: its "rows r and r + 8" are our rows 4 s, 4 s + 1 of one product,
and 4 s + 2, 4 s + 3 of another, and its "elements 4 c and 4 c + 16" are quads 2 c and 2 c + 1, which share a byte of a
4-bit plane.  Where a group has 16 columns, its products are half as deep, so that the quads are c and c + 4.  The
columns of a product are 8 tokens; a lane loads levels of token 4 t + s, and gets results of tokens 2 c and 2 c + 1.

The functions that kernels call are written with an `Emitter`: Python's loops are unrolled, and what depends on the
layout is decided while they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from qattn.cuda import ptx
from qattn.cuda.activations import BLOCK, MAGIC, TILE
from qattn.cuda.emitter import Emitter, function
from qattn.layout import CELL, PLANES, Layout

_U32, _F32 = types.uint32, types.float32
_MINUS_MAGIC = -float(np.uint32(MAGIC).view(np.float32))


def groups_of(layout: Layout) -> int:
    """Groups in a cell."""
    return CELL // min(layout.group, CELL)


# ---------------------------------------------------------------------------------------------------------- weights


def _plane_words(layout: Layout) -> list[tuple[int, int, bool, int, int]]:
    """For each plane: its bits, where it begins in the cell, whether a lane's two quads share its words, and how far
    apart, in bits of a row, the first quads of two lanes are, and the two quads of a lane."""
    planes, start = [], 0
    for plane in PLANES[layout.bits]:
        first, apart = (2 * plane, plane) if groups_of(layout) == 1 else (plane, 4 * plane)
        planes.append((plane, start, apart < 8, first, apart))
        start += 64 * plane
    return planes


class _Array(NamedTuple):
    """What a lane reads of one of the arrays for each cell."""

    load: Any
    stride: int
    """Bytes from cell to cell, or from one to the next that has elements of its own, `shift` cells' bits further."""
    shift: int
    offsets: tuple[int, ...]
    """Where it reads, in bytes from the place of the cell."""


def _weight_arrays(layout: Layout) -> list[_Array]:
    """For each plane of codes, for scales and their steps, and for offsets and theirs."""
    planes = _plane_words(layout)
    arrays = [
        _Array(ptx.load_16_constant, 64 * layout.bits, 0, (0,) if shared else (0, apart // 8 * 64))
        for _, _, shared, _, apart in planes
    ]

    def rows(load: Any, group: int, size: int) -> _Array:
        many, shift = CELL // min(group, CELL), max(group // CELL, 1).bit_length() - 1
        return _Array(load, 16 * size * many, shift, tuple(16 * size * i for i in range(many)))

    for of_offsets in (False, True)[: 1 + layout.offset]:
        arrays.append(rows(ptx.load_8_constant, layout.base_group, 2))
        if layout.step and not (of_offsets and layout.paired):
            arrays.append(rows(ptx.load_4_constant, layout.group, 1))
    return arrays


def weight_placer(layout: Layout) -> Any:
    """``place_weights(w, tile, cells, lane)`` → the addresses of what a lane reads of the tile's first cell.

    w : the pointers of `Packed`, up to the steps of offsets
    """
    planes, arrays = _plane_words(layout), _weight_arrays(layout)

    def place_weights(e: Emitter, w: Any, tile: Any, cells: Any, lane: Any) -> list[Any]:
        row, c, tile = e.wide(e.both(lane, 12)), e.wide(e.both(lane, 3)), e.wide(tile)
        places = []
        for _, start, _, first, _ in planes:
            within = e.add(e.mul(e.right(e.mul(c, first), 3), 64), e.add(e.mul(row, 4), start))
            places.append(e.address(w[0], e.add(e.mul(e.mul(tile, e.wide(cells)), 64 * layout.bits), within), 1))
        factors = [w[1], w[2], w[3], w[4]] if layout.step else [w[1], w[3]]
        for array, pointer in zip(arrays[len(planes) :], factors, strict=False):
            one = 1 if pointer in (w[2], w[4]) else 2
            groups = e.wide(e.right(e.mul(cells, array.stride // (16 * one)), array.shift))
            places.append(e.address(pointer, e.add(e.mul(e.mul(tile, groups), 16), row), one))
        return places

    return function("w, tile, cells, lane", types.UniTuple(types.int64, len(arrays)), place_weights)


def weight_fetcher(layout: Layout) -> Any:
    """``fetch_weights(places, cell)`` → the words of a cell that a lane needs, as they lie in memory."""
    arrays = _weight_arrays(layout)

    def fetch_weights(e: Emitter, places: Any, cell: Any) -> list[Any]:
        words = []
        for array, place in zip(arrays, places, strict=True):
            at = e.add(place, e.mul(e.wide(e.right(cell, array.shift)), array.stride))
            for offset in array.offsets:
                words += e.load(array.load, e.add(at, offset))
        return words

    codes = sum(4 if shared else 8 for _, _, shared, _, _ in _plane_words(layout))
    count = codes + _factor_words(layout) * (1 + layout.offset) - groups_of(layout) * layout.paired
    return function("places, cell", types.UniTuple(_U32, count), fetch_weights)


def _factor_words(layout: Layout) -> int:
    """Words that the scales, or offsets, of a lane's rows and a cell take."""
    bases = CELL // min(layout.base_group, CELL) * 2
    return bases + (groups_of(layout) if layout.step else 0)


def weight_maker(layout: Layout) -> Any:
    """``ready(words, lane, table)`` → codes, scales, the scales times minus the magic number, offsets.

    codes : of rows 4 s … 4 s + 3 of the lane's first quad, then those of its second: 8 words
    others : float32 of these rows, for the first group, then the second if a cell has two
    """

    def ready(e: Emitter, words: Any, lane: Any, table: Any) -> list[Any]:
        words = list(words)
        codes = _codes(e, layout, words, e.both(lane, 3), table)
        # With two bits less, a scale times the magic number, 3 · 2**22, is exact.  So where a sum s of integers began
        # at MAGIC, and its bits are those of the float 1.5 · 2**23 + s, one multiply-add gives s · scale.
        scales, offsets = _scales_and_offsets(e, layout, words)
        scales = [e(ptx.float_of, e.both(e(ptx.bits_of, scale), 0xFFFFFFFC)) for scale in scales]
        biases = [e(ptx.multiply, scale, _MINUS_MAGIC) for scale in scales]
        return codes + scales + biases + offsets

    floats = 4 * groups_of(layout) * (2 + layout.offset)
    return function("words, lane, table", types.Tuple((_U32,) * 8 + (_F32,) * floats), ready)


def value_maker(layout: Layout) -> Any:
    """``values(words, lane, table)`` → the weights, 32 float32: by quad, then row, then column."""

    def values(e: Emitter, words: Any, lane: Any, table: Any) -> list[Any]:
        words = list(words)
        codes = _codes(e, layout, words, e.both(lane, 3), table)
        scales, offsets = _scales_and_offsets(e, layout, words)
        out = []
        for i, code in enumerate(codes):
            code = e.flip(code, 0x80808080) if layout.signed else code
            factor = i % len(scales)  # of the row, in the group that the quad lies in
            for column in range(4):
                level = e(ptx.float_of, e(ptx.permute, code, 0x4B000000, 0x7540 + column))
                level = e(ptx.add, level, -float(2**23 + (128 if layout.signed else layout.zero)))
                value = e(ptx.multiply, level, scales[factor])
                out.append(e(ptx.add, value, offsets[factor]) if offsets else value)
        return out

    return function("words, lane, table", types.UniTuple(_F32, 32), values)


def _codes(e: Emitter, layout: Layout, words: list[Any], c: Any, table: Any) -> list[Any]:
    """Take a cell's words of codes off the list → 8 words of four codes, or of the levels that they stand for."""
    planes = _plane_words(layout)
    if layout.table and layout.bits == 4 and planes[0][2]:
        pairs = [_pair_of_levels(e, words.pop(0), table) for _ in range(4)]
        return [levels[k] for k in range(2) for levels in pairs]
    codes: list[Any] = [None] * 8
    up = layout.up
    for plane, _, shared, first, apart in planes:
        these = [words.pop(0) for _ in range(4 if shared else 8)]
        low: Any = e.both(e.mul(c, first), 7) if first % 8 else 0
        for i in range(8):
            code = these[i % len(these)]
            if plane < 8:
                shift = low if i < 4 else e.add(low, apart % 8) if first % 8 else apart % 8
                code = e.left(e.both(e.right(code, shift), (1 << plane) * 0x01010101 - 0x01010101), up)
            codes[i] = code if codes[i] is None else e.either(codes[i], code)
        up += plane
    if layout.shared:
        codes = [e.either(code, gain) for code, gain in zip(codes, _shared(e, layout, words, c), strict=True)]
    return [_levels(e, layout.bits, code, table) for code in codes] if layout.table else codes


def _shared(e: Emitter, layout: Layout, words: list[Any], c: Any) -> list[Any]:
    """What the codes of 8 words gain; `words` are those behind the codes."""
    groups, out = groups_of(layout), []
    octet = c if groups == 1 else e.right(c, 1)
    for steps in words[_factor_words(layout) - groups :][:groups] * (2 // groups):
        rows = e.mul(e.both(e.right(steps, e.add(octet, 4)), 0x01010101), layout.shared)
        out += [e(ptx.permute, rows, 0, 0x1111 * row) for row in range(4)]
    return out


def _levels(e: Emitter, bits: int, code: Any, table: Any) -> Any:
    """The levels that four codes stand for."""
    nibbles = e(ptx.permute, e.either(code, e.right(code, 4)), 0, 0x4420)  # four nibbles, as `permute` wants them
    if bits < 4:
        return e(ptx.permute, table[0], table[1], nibbles)
    below = e.both(nibbles, 0x7777)
    halves = [e(ptx.permute, table[i], table[i + 1], below) for i in (0, 2)]
    return e(ptx.permute, *halves, e.either(e.both(e.right(nibbles, 1), 0x4444), 0x3210))


def _pair_of_levels(e: Emitter, word: Any, table: Any) -> list[Any]:
    """The levels of both quads of a word of a 4-bit plane, whose nibbles take turns."""
    below, half = e.both(word, 0x77777777), e.either(e.both(e.right(word, 1), 0x44444444), 0x32103210)
    turns = []
    for shift in (0, 16):
        halves = [e(ptx.permute, table[i], table[i + 1], e.right(below, shift)) for i in (0, 2)]
        turns.append(e(ptx.permute, *halves, e.right(half, shift)))
    return [e(ptx.permute, *turns, order) for order in (0x6420, 0x7531)]


def _scales_and_offsets(e: Emitter, layout: Layout, words: list[Any]) -> tuple[list[Any], list[Any]]:
    """Take the words of scales, and offsets, off the list → float32 of four rows, for each group; [] for no offsets."""
    groups = groups_of(layout) if layout.step else 0
    bases, steps = _bases(e, layout, words), [words.pop(0) for _ in range(groups)]
    scales = _stepped(e, layout, bases, [e.both(step, 0x0F0F0F0F) if layout.nibbles else step for step in steps])
    if not layout.offset:
        return scales, []
    bases = _bases(e, layout, words)
    steps = [e.both(e.right(step, 4), 0x0F0F0F0F) if layout.paired else words.pop(0) for step in steps]
    return scales, _stepped(e, layout, bases, steps)


def _bases(e: Emitter, layout: Layout, words: list[Any]) -> list[Any]:
    bases: list[Any] = []
    for _ in range(CELL // min(layout.base_group, CELL)):
        for word in (words.pop(0), words.pop(0)):
            if layout.base == "f16":
                bases += [e(ptx.f16_to_f32, e.half(word, i)) for i in range(2)]
            else:
                bases += [e(ptx.float_of, e.left(word, 16)), e(ptx.float_of, e.both(word, 0xFFFF0000))]
    return [e(ptx.multiply, base, 2.0**-layout.down) for base in bases] if layout.down else bases


def _stepped(e: Emitter, layout: Layout, bases: list[Any], steps: list[Any]) -> list[Any]:
    """Four rows' bases times their steps, for each group."""
    if not layout.step:
        return bases if len(bases) == 4 * groups_of(layout) else 2 * bases
    factors = []
    for group, word in enumerate(steps):
        # An int8 plus 128 is a byte, which becomes a float as the low mantissa bits of 2**23: cheaper than converting.
        flipped = e.flip(word, 0x80808080)
        for i in range(4):
            step = e(ptx.float_of, e(ptx.permute, flipped, 0x4B000000, 0x7540 + i))
            step = e(ptx.add, step, -8388736.0)
            factors.append(e(ptx.multiply, bases[(4 * group + i) % len(bases)], step))
    return factors


# ------------------------------------------------------------------------------------------ activations and products

# A cell of `TILE` tokens in shared memory: levels, then scales, starts and sums, each block by block.
SCALES_AT = TILE * CELL
STARTS_AT = SCALES_AT + 4 * TILE


def shared_cell(layout: Layout) -> int:
    """Bytes of that."""
    return STARTS_AT + 2 * 4 * TILE * groups_of(layout)


def _token_arrays(layout: Layout) -> list[tuple[int, int, int]]:
    """Of `Activations`, what a lane reads: the array's number, bytes for each cell, and loads of 8 bytes."""
    groups = groups_of(layout)
    arrays = [(0, BLOCK * CELL, 1), (1, 4 * BLOCK, 1)]
    arrays += [(2, 4 * BLOCK * groups, groups)] if layout.zero else []
    return arrays + ([(3, 4 * BLOCK * groups, groups)] if layout.offset else [])


def _token_places(e: Emitter, layout: Layout, a: Any, place: Any, lane: Any, row: Any) -> list[Any]:
    """The addresses of what a lane reads of 8 tokens' activations in the cell at `place`, in the arrays' order."""
    c = e.wide(e.both(lane, 3))
    levels = e.add(e.mul(e.wide(row), CELL), e.mul(c, 8))
    return [
        e.address(a[i], e.add(e.mul(place, size), e.mul(c, 8) if i else levels), 1)
        for i, size, _ in _token_arrays(layout)
    ]


def _tokens(e: Emitter, layout: Layout, places: list[Any], cell: Any) -> list[Any]:
    """A lane's words of 8 tokens' activations, so many cells further.

    Returns two words of levels, scales of two tokens, starts and sums of two tokens for each group that there are.
    """
    words = []
    for (_, size, loads), place in zip(_token_arrays(layout), places, strict=True):
        at = e.add(place, e.mul(e.wide(cell), size))
        for i in range(loads):
            words += e.load(ptx.load_8_constant, e.add(at, 4 * BLOCK * i))
    return words


def _shared_tokens(e: Emitter, layout: Layout, address: Any, lane: Any, block: int) -> list[Any]:
    """The same of a block in shared memory, at the address of the cell."""
    groups = groups_of(layout)
    column = e.add(address, e.mul(e.both(lane, 3), 8))
    words = e(ptx.load_shared_8, e.add(e.add(address, e.mul(lane, 8)), BLOCK * CELL * block))
    words += e(ptx.load_shared_8, e.add(column, SCALES_AT + 4 * BLOCK * block))
    starts = [STARTS_AT] if layout.zero else []
    for array in starts + ([STARTS_AT + 4 * TILE * groups] if layout.offset else []):
        for group in range(groups):
            words += e(ptx.load_shared_8, e.add(column, array + 4 * BLOCK * (groups * block + group)))
    return words


def _token_words(layout: Layout) -> int:
    return 4 + 2 * groups_of(layout) * ((layout.zero != 0) + layout.offset)


def _multiply(e: Emitter, layout: Layout, totals: list[Any], w: list[Any], x: list[Any]) -> list[Any]:
    """Totals plus a cell of 32 rows times one of 8 tokens.

    totals : of the lane's four rows, and of each for its two tokens, or for the first of them if there are but four
    """
    groups, tokens = groups_of(layout), len(totals) // 4
    factors = w[8:]
    scales, biases, offsets = (factors[4 * groups * i :][: 4 * groups] for i in range(3))
    x_scales = [e(ptx.float_of, word) for word in x[2:4]]
    starts = x[4:][: 2 * groups] if layout.zero else []
    sums = [e(ptx.float_of, word) for word in x[-2 * groups :]]
    halves = "_half" if groups == 2 else ""
    mma = getattr(ptx, ("mma_s8" if layout.signed else "mma_u8") + halves)
    totals = list(totals)
    for group in range(groups):
        # all quads of the lane at once, or those of the group
        quads = range(2) if groups == 1 else [group]
        begin = [e.add(word, MAGIC) for word in starts[2 * group :][:2]] or [MAGIC, MAGIC]
        for pair in range(2):
            left = [w[4 * quad + 2 * pair + i] for quad in quads for i in range(2)]
            numbers = e(mma, *left, *(x[quad] for quad in quads), *begin, *begin)
            for i in range(2):
                row = 2 * pair + i
                factor = 4 * group + row
                for token in range(tokens):
                    total = totals[tokens * row + token]
                    if layout.offset:
                        total = e.fma(offsets[factor], sums[2 * group + token], total)
                    product = e.fma(e(ptx.float_of, numbers[2 * i + token]), scales[factor], biases[factor])
                    totals[tokens * row + token] = e.fma(product, x_scales[token], total)
    return totals


class Multipliers:
    """The functions that multiply a warp's 32 rows by some blocks of tokens, from where these are.

    ``totals`` are, for each block, those of the lane's four rows, and of each for two tokens, or one if `single`.
    """

    def __init__(self, layout: Layout, blocks: int, single: bool = False) -> None:
        numbers, words, arrays = 4 if single else 8, _token_words(layout), len(_token_arrays(layout))

        def each(e: Emitter, totals: Any, w: Any, tokens: Callable[[int], Any]) -> list[Any]:
            out = []
            for block in range(blocks):
                out += _multiply(e, layout, totals[numbers * block :][:numbers], w, tokens(block))
            return out

        def place_tokens(e: Emitter, a: Any, place: Any, stride: Any, lane: Any, row: Any) -> list[Any]:
            return [
                address
                for block in range(blocks)
                for address in _token_places(e, layout, a, e.add(place, e.mul(stride, block)), lane, row)
            ]

        def fetch_tokens(e: Emitter, places: Any, cell: Any) -> list[Any]:
            return [word for b in range(blocks) for word in _tokens(e, layout, places[arrays * b :][:arrays], cell)]

        def multiply(e: Emitter, totals: Any, w: Any, x: Any) -> list[Any]:
            return each(e, totals, w, lambda block: x[words * block :][:words])

        def multiply_shared(e: Emitter, totals: Any, w: Any, address: Any, lane: Any) -> list[Any]:
            return each(e, totals, w, lambda block: _shared_tokens(e, layout, address, lane, block))

        def multiply_memory(e: Emitter, totals: Any, w: Any, places: Any, cell: Any) -> list[Any]:
            return each(e, totals, w, lambda b: _tokens(e, layout, places[arrays * b :][:arrays], cell))

        totals = types.UniTuple(_F32, numbers * blocks)
        addresses = types.UniTuple(types.int64, arrays * blocks)
        self.zeros = (np.float32(0),) * (numbers * blocks)
        self.place = function("a, place, stride, lane, row", addresses, place_tokens)
        """place(a, place, stride, lane, row) → addresses of what a lane reads of the blocks of tokens whose first cells
        are at `place`, `stride` apart, where a is the pointers of `Activations`, and row the token whose levels it
        loads."""
        self.fetch = function("places, cell", types.UniTuple(_U32, words * blocks), fetch_tokens)
        """fetch(places, cell) → the blocks' words of a cell."""
        self.multiply = function("totals, w, x", totals, multiply)
        """multiply(totals, w, x) → totals plus the products with these words."""
        self.multiply_shared = function("totals, w, address, lane", totals, multiply_shared)
        """The same with a cell in shared memory."""
        self.multiply_memory = function("totals, w, places, cell", totals, multiply_memory)
        """The same with a cell in memory, whose words are loaded block by block."""
