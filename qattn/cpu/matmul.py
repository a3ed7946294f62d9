"""Activations times packed weights.

One micro-kernel shape serves every format and any number of tokens: *R rows of activations, broadcast four bytes at a
time, times a tile of 16 weight rows*, one weight row a lane.  `qattn.layout` says how a tile's codes lie.

Activations are rounded to int8 with one scale per 32 columns, see `qattn.cpu.activations`.  For a cell,

    y[row, lane] += x_scale · Σ_groups scale[lane] · (Σ code · x_level - zero · Σ x_level)  +  offset[lane] · Σ x

where the inner sum is exact integer arithmetic, the zero point enters as the integer sum's initial value, and the
offset costs one multiply-add a group.  ``exact`` kernels have the same loops on float32 activations.

Rows come in blocks of `TARGET.rows`; what remains is one smaller block, padded.  Each block of activations is stored
column by column (`Activations`), so that a kernel reads it with constant displacements from one pointer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.activations import BLOCKS, Activations, arrange_rows, block_filler, block_size
from qattn.cpu.dots import Dots
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.planes import quad_codes
from qattn.cpu.scratch import aligned
from qattn.cpu.simd import LANES, MAX_CODE, Emitter, Pointer, Value, micro_kernel
from qattn.cpu.target import TARGET
from qattn.layout import CELL, OCTET, Layout

OfCell = Callable[[int], Value]  # by the number of a quad, or of a part

# ---------------------------------------------------------------------------------------------- the micro-kernel


class Weights:
    """Reads one tile: codes, scales and offsets of the cell that the loop is at.  Codes may be `unpacked` already."""

    def __init__(self, e: Emitter, layout: Layout, packed: list[Pointer], cell: Value, unpacked: bool = False) -> None:
        self.e, self.layout, self.cell, self._unpacked = e, layout, cell, unpacked
        self._codes, self._scales, self._steps, self._offsets, self._offset_steps, self._table = packed
        self._cell_codes = self._codes.at(cell * (64 * (8 if unpacked else layout.bits)))
        self._vectors: dict[int, Value] = {}

    def codes(self, quad: int) -> Value:
        """(64,) bytes: four codes for each of 16 lanes."""
        layout = self.layout
        if self._unpacked:
            return self._vector(quad).bits(self.e.U8)
        code = quad_codes(self._vector, layout.bits, quad, clean=not layout.table, up=layout.up)
        if layout.shared:
            code = code | self._shared(quad)
        code = code.bits(self.e.U8)
        return self.e.lookup(self._table.load(self.e.U8), code, layout.bits) if layout.table else code

    def _shared(self, quad: int) -> Value:
        """What a quad's codes gain."""
        group, column = divmod(4 * quad, self.layout.group)
        bit = self._step(self._steps, group) << 27 - column // OCTET  # now the sign, which fills the lane
        return bit.shift_signed(31) & self.layout.shared * 0x01010101

    def _vector(self, number: int) -> Value:
        if number not in self._vectors:
            self._vectors[number] = self._cell_codes.at(64 * number).load(self.e.I32V)
        return self._vectors[number]

    def prefetch(self) -> None:
        """Ask for codes that lie further on, in this tile or the next."""
        for line in range(self.layout.bits):
            self.e.prefetch(self._cell_codes.at(_AHEAD + 64 * line))

    def scale(self, part: int) -> Value:
        base = self._base(self._scales, part)
        if not self.layout.step:
            return base
        step = self._step(self._steps, part)
        return base * (step & 15 if self.layout.nibbles else step).to(self.e.F32)

    def offset(self, part: int) -> Value:
        base, paired = self._base(self._offsets, part), self.layout.paired
        if not self.layout.step:
            return base
        step = self._step(self._steps, part) >> 4 & 15 if paired else self._step(self._offset_steps, part)
        return base * step.to(self.e.F32)

    def _base(self, bases: Pointer, part: int) -> Value:
        layout = self.layout
        base = _load_float(self.e, bases, self._index(layout.base_group, part), layout.base)
        return base * 2.0**-layout.down if layout.down else base

    def _step(self, steps: Pointer, part: int) -> Value:
        return steps.at(self._index(self.layout.group, part) * LANES).load(self.e.I8V).to(self.e.I32V)

    def _index(self, group: int, part: int) -> Value:
        """The number of the group that the cell's part lies in."""
        if group >= CELL:
            return self.cell >> (group // CELL).bit_length() - 1
        return self.cell * (CELL // group) + part


def _load_float(e: Emitter, array: Pointer, index: Value, kind: str) -> Value:
    """16 lanes at index · 16, as float32."""
    if kind == "f32":
        return array.at(index * (4 * LANES)).load(e.F32)
    there = array.at(index * (2 * LANES))
    if kind == "f16":
        return e.from_f16(there.load(e.I16V))
    return (there.load(e.I16V).zero_extend(e.I32V) << 16).bits(e.F32)


def _quantized_micro_kernel(layout: Layout, rows: int, unpacked: bool = False) -> Any:
    """`rows` rows of int8 activations times one tile, perhaps `unpacked`, into a (rows, 16) float32 buffer."""
    parts = max(1, CELL // layout.group)
    quads = 8 // parts  # of a part of a cell
    # Where groups have 16 columns, the products of one half wait for the other: those of many rows not in registers.
    together = 2 if parts > 1 and rows > 4 else rows

    @micro_kernel
    def run(e, *arguments):
        *packed, x, x_scales, starts, sums, cells, out, slots, stride = arguments
        zeros = e.constant(0.0, e.F32)
        totals = [e.register(zeros) for _ in range(rows)]

        def at(array: Pointer, slot: Value, row: int, part: int = 0, each: int = 1) -> Pointer:
            """Where a row's number for the slot is, or for one of `each` of its parts."""
            return array.at((slot * each + part) * (4 * rows)).at(4 * row)

        def add_cell(slot: Value, some: range, codes: OfCell, scale: OfCell, offset: OfCell) -> None:
            products = [zeros] * len(some)
            for part in range(parts):
                first = [e.constant(0, e.I32V)] * len(some)
                if layout.zero:
                    first = [at(starts, slot, m, part, parts).load(e.I32).splat(e.I32V) for m in some]
                dots = Dots(e, first, quads, layout.largest, layout.signed)

                def quad_x(quad: int, i: int) -> Value:
                    return at(x, slot, some[i], quad, 8).load(e.I32).splat(e.I32V)

                dots.add_all(range(quads * part, quads * (part + 1)), codes, quad_x)
                for i, m in enumerate(some):
                    product = dots.total(i).to(e.F32)
                    products[i] = e.fma(product, scale(part), products[i]) if part else product * scale(part)
                    if layout.offset:
                        group_sum = at(sums, slot, m, part, parts).load(e.F32S).splat(e.F32)
                        totals[m].set(e.fma(offset(part), group_sum, totals[m].get()))
            for product, m in zip(products, some, strict=True):
                x_scale = at(x_scales, slot, m).load(e.F32S).splat(e.F32)
                totals[m].set(e.fma(product, x_scale, totals[m].get()))

        with e.loop(slots) as slot:
            cell = cells.at(slot * 4).load(e.I32).to(e.I64)
            weights = Weights(e, layout, packed, cell, unpacked)
            if not unpacked:
                weights.prefetch()
            codes, scale, offset = map(functools.cache, (weights.codes, weights.scale, weights.offset))
            for m in range(0, rows, together):
                add_cell(slot, range(m, min(m + together, rows)), codes, scale, offset)
        for m in range(rows):
            out.at(stride * m).store(totals[m].get())

    return run


def _unpacker(layout: Layout) -> Any:
    """The codes of one tile as bytes: (cells, 8 quads, 16 rows, 4)."""

    @micro_kernel
    def run(e, *arguments):
        *packed, out, cells = arguments
        with e.loop(cells) as cell:
            weights = Weights(e, layout, packed, cell)
            weights.prefetch()
            for quad in range(8):
                out.at(cell * (CELL * LANES)).at(64 * quad).store(weights.codes(quad))

    return run


def _unpacked_micro_kernel(layout: Layout, rows: int) -> Any:
    return _quantized_micro_kernel(layout, rows, unpacked=True)


def _exact_micro_kernel(layout: Layout, rows: int) -> Any:
    """The same with float32 activations; codes become float32 levels, exactly."""
    parts = max(1, CELL // layout.group)

    @micro_kernel
    def run(e, *arguments):
        *packed, x, sums, out, cells, stride = arguments
        zeros = e.constant(0.0, e.F32)
        totals = [e.register(zeros) for _ in range(rows)]
        with e.loop(cells) as cell:
            weights = Weights(e, layout, packed, cell)
            cell_x = x.at(cell * (4 * CELL * rows))
            for part in range(parts):
                products = [zeros] * rows
                for quad in range(8 // parts * part, 8 // parts * (part + 1)):
                    word = weights.codes(quad).bits(e.I32V)
                    for i in range(4):
                        level = (word << (24 - 8 * i)).shift_signed(24) if layout.signed else (word >> (8 * i)) & 255
                        level = (level - layout.zero).to(e.F32)
                        for m in range(rows):
                            value = cell_x.at(4 * ((4 * quad + i) * rows + m)).load(e.F32S).splat(e.F32)
                            products[m] = e.fma(level, value, products[m])
                scale = weights.scale(part)
                for m in range(rows):
                    totals[m].set(e.fma(products[m], scale, totals[m].get()))
                if layout.offset:
                    offset = weights.offset(part)
                    for m in range(rows):
                        group_sum = sums.at((cell * parts + part) * (4 * rows)).at(4 * m).load(e.F32S).splat(e.F32)
                        totals[m].set(e.fma(offset, group_sum, totals[m].get()))
        for m in range(rows):
            out.at(stride * m).store(totals[m].get())

    return run


def _float_micro_kernel(layout: Layout, rows: int) -> Any:
    """`rows` rows of float32 activations times one tile of float weights."""

    @micro_kernel
    def run(e, weights, x, out, columns, stride):
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(columns) as k:
            weight = _load_float(e, weights, k, layout.base)
            for m in range(rows):
                value = x.at(k * (4 * rows)).at(4 * m).load(e.F32S).splat(e.F32)
                totals[m].set(e.fma(weight, value, totals[m].get()))
        for m in range(rows):
            out.at(stride * m).store(totals[m].get())

    return run


# ------------------------------------------------------------------------------------------------------- drivers


def by_size(make: Callable[[Any, int], Any], layout: Any) -> Any:
    """One njit function for the micro-kernels of all block sizes: run(size, arguments)."""
    one, *some, full = (make(layout, size) for size in BLOCKS)
    few, many = some[0], some[-1]

    @generated(f"{make.__name__}-{layout}")
    def run(size, arguments):
        if size == TARGET.rows:
            full(arguments)
        elif size == 1:
            one(arguments)
        elif size == BLOCKS[1]:
            few(arguments)
        else:
            many(arguments)

    return run


def _block_times_tile(layout: Layout, exact: bool, unpacked: bool = False) -> Any:
    """The njit function that multiplies the block of activations at `row` by one tile: rows `stride` bytes apart.

    codes : the tile's, as they are packed, or `unpacked`
    """
    group, parts = min(layout.group, CELL), max(1, CELL // layout.group)
    if layout.bits >= 16:
        float_kernel = by_size(_float_micro_kernel, layout)

        @generated(f"{layout}-{exact}")
        def multiply(p, tile, codes, x, row, size, out, stride):
            columns = p.codes.shape[1]
            float_kernel(size, (codes, x.levels[row * columns :], out, columns, stride))

    elif exact:
        exact_kernel = by_size(_exact_micro_kernel, layout)

        @generated(f"{layout}-{exact}")
        def multiply(p, tile, codes, x, row, size, out, stride):
            columns = p.codes.shape[1] * CELL
            exact_kernel(size, (codes, p.scales[tile], p.steps[tile], p.offsets[tile], p.offset_steps[tile],
                                p.table, x.levels[row * columns :], x.sums[row * (columns // group) :], out,
                                columns // CELL, stride))  # fmt: skip

    else:
        int8_kernel = by_size(_unpacked_micro_kernel if unpacked else _quantized_micro_kernel, layout)

        @generated(f"{layout}-{unpacked}")
        def multiply(p, tile, codes, x, row, size, out, stride):
            block, slots = row // TARGET.rows, x.cells.shape[1]
            first = row * slots
            int8_kernel(size, (codes, p.scales[tile], p.steps[tile], p.offsets[tile], p.offset_steps[tile],
                               p.table, x.levels[first * CELL :], x.scales[first:], x.starts[first * parts :],
                               x.sums[first * parts :], x.cells[block], out, x.slots[block], stride))  # fmt: skip

    return multiply


def _name(layout: Layout, exact: bool) -> str:
    return f"{layout.name()}-{'exact' if exact else 'int8'}"


def _shares(layout: Layout, exact: bool) -> bool:
    """Whether a tile is unpacked once for many blocks of activations.

    Where registers are few, blocks have few rows.  Else they multiply while codes are unpacked: it costs nothing.
    """
    return TARGET.level == "avx2" and not exact and (layout.bits < 8 or layout.table)


def _block_of_tiles(layout: Layout, exact: bool) -> Any:
    """The njit function that multiplies by `tiles` tiles from `tile0` on, of which this is one of `parts` parts."""
    multiply, cell = _block_times_tile(layout, exact), 1 if layout.bits >= 16 else CELL
    shares = _shares(layout, exact)
    unpack, multiply_bytes = _unpacker(layout), _block_times_tile(layout, exact, unpacked=True)

    # Counting references would take as long as a few hundred columns of a tile.
    @generated(_name(layout, exact), _nrt=False)
    def run_tiles(packed, tile0, tiles, x, out, buffer, codes, part, parts):
        rows, width, flat, columns = out.shape[0], out.shape[1], out.reshape(-1), packed.codes.shape[1] * cell
        chunk = max(1, _CACHE // columns // TARGET.rows) * TARGET.rows
        for first in range(0, rows, chunk):
            many = min(chunk, rows - first) >= _MANY * TARGET.rows
            for number in share(tiles, part, parts):
                tile = tile0 + number
                lanes = packed.targets[tile * LANES : (tile + 1) * LANES]
                together = lanes.size == LANES and lanes[-1] - lanes[0] == LANES - 1
                if shares and many:
                    unpack((packed.codes[tile], packed.scales[tile], packed.steps[tile], packed.offsets[tile],
                            packed.offset_steps[tile], packed.table, codes, packed.codes.shape[1]))  # fmt: skip
                for row in range(first, min(first + chunk, rows), TARGET.rows):
                    size = block_size(rows - row)
                    direct = together and row + size <= rows
                    there, stride = buffer, 4 * LANES
                    if direct:
                        there, stride = flat[row * width + lanes[0] :], 4 * width
                    if shares and many:
                        multiply_bytes(packed, tile, codes, x, row, size, there, stride)
                    else:
                        multiply(packed, tile, packed.codes[tile], x, row, size, there, stride)
                    if not direct:
                        for m in range(min(size, rows - row)):
                            for lane in range(lanes.size):
                                out[row + m, lanes[lane]] = buffer[m * LANES + lane]

    return run_tiles


@functools.cache
def product(layout: Layout, exact: bool) -> Kernel:
    """The kernel for weights of a layout: ``run(packed, x, out)`` with ``out[:, packed.targets]`` overwritten.

    packed : `Packed`;  x : `Activations`;  out : (tokens, n) float32, C-contiguous
    Cost: reads the packed weights once for every ``_CACHE / K`` tokens.  Each output depends on its own row and tile
    only, so the bits do not depend on the number of threads, nor on the rows computed beside it.
    """
    run_tiles, shares = _block_of_tiles(layout, exact), _shares(layout, exact)

    @kernel(_name(layout, exact))
    def run(packed, x, out, part, parts):
        buffer = np.empty(TARGET.rows * LANES, np.float32)
        codes = aligned(packed.codes.shape[1] * CELL * LANES if shares else 0)
        run_tiles(packed, 0, packed.codes.shape[0], x, out, buffer, codes, part, parts)

    return run


@functools.cache
def product_each(layout: Layout, exact: bool) -> Kernel:
    """The kernel for a matrix for each head, each with activations of its own: ``run(packed, heads, x, room, out)``.

    packed : `Packed`, the heads' rows one after the other, whole tiles of each
    x : (tokens, heads · K) float32;  out : (tokens, n) float32, all rows of a head side by side; both C-contiguous
    room : `Activations` of the tokens of one head for each part, one after the other along a new first axis
    """
    run_tiles, shares = _block_of_tiles(layout, exact), _shares(layout, exact)
    floats, group = layout.bits >= 16, min(layout.group, CELL)
    fill_block, group_sums = None if floats or exact else block_filler(layout.zero, group), 0 if floats else group

    @kernel(f"each-{_name(layout, exact)}")
    def run(packed, heads, x, room, out, part, parts):
        buffer = np.empty(TARGET.rows * LANES, np.float32)
        tiles, columns = packed.codes.shape[0] // heads, x.shape[1] // heads
        codes = aligned(columns * LANES if shares else 0)
        a = Activations(room.levels[part], room.scales[part], room.starts[part], room.sums[part], room.cells[part],
                        room.slots[part])  # fmt: skip
        for head in share(heads, part, parts):
            mine = x[:, head * columns : (head + 1) * columns]
            if fill_block is None:
                arrange_rows(mine, group_sums, a, 0, 1)
            else:
                for block in range(a.slots.size):
                    fill_block(mine, block, a)
            run_tiles(packed, head * tiles, tiles, a, out, buffer, codes, 0, 1)

    return run


_AHEAD = 16384  # bytes; the hardware's own prefetch ends with each page of 4096
_MANY = 8  # blocks of activations that are worth unpacking a tile into memory for, where they `_shares`
_CACHE = 1 << 19  # bytes of int8 activations that stay in a core's second-level cache while tiles pass by


def wants_signed(bits: int, largest_code: int) -> bool:
    """Whether codes up to `largest_code` must be stored as signed bytes on this machine."""
    return bits == 8 and largest_code > MAX_CODE
