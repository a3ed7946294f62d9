"""Tile registers, and the unit that multiplies them: Intel's AMX.

There are eight, of 16 rows of 64 bytes.  One instruction adds to a tile C of 16 × 16 float32 the products of a tile A
of 16 × 32 bfloat16, which lies row by row, with a tile B of 32 × 16, whose columns lie side by side in pairs of rows:
16 vectors of 16 lanes, a pair a lane.  It takes 16 cycles for 8192 products; vectors of 16 pairs take some 300.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from qattn.cpu.simd import LANES, Emitter, Pointer, Value
from qattn.cpu.target import TARGET

ROWS = 16  # of A and C
DEPTH = 32  # columns of A
BYTES = 1024  # of a tile
PAIRS = DEPTH // 2  # rows of B, as it lies in memory
_NOTHING = ir.VoidType()


class Tile:
    """One of the registers; on other machines 1 KiB of the stack, and loops, so that what uses it can be tested there.

    rows, words : how many rows of how many words of 4 bytes it has
    """

    def __init__(self, e: Emitter, number: int, rows: Value | int = ROWS, words: Value | int = 16) -> None:
        self.e, self._number, self.rows, self._words = e, Value(e, ir.IntType(8)(number)), rows, words
        self._memory = None if TARGET.amx else _stacked(e, BYTES)

    def clear(self) -> None:
        if self._memory is None:
            self.e.intrinsic("llvm.x86.tilezero", _NOTHING, self._number)
            return
        for row in range(ROWS):
            self._memory.at(64 * row).store(self.e.constant(0, self.e.I32V))

    def load(self, there: Pointer, stride: Value | int = 64) -> None:
        """Rows that lie `stride` bytes apart."""
        if self._memory is None:
            self._move("llvm.x86.tileloadd64", there, stride)
        else:
            self._copy((there, stride), (self._memory, 64))

    def store(self, there: Pointer, stride: Value | int = 64) -> None:
        if self._memory is None:
            self._move("llvm.x86.tilestored64", there, stride)
        else:
            self._copy((self._memory, 64), (there, stride))

    def add_products(self, a: Tile, b: Tile) -> None:
        """C += A @ B.  Even and odd columns are summed apart, each in order; denormals count as 0."""
        e = self.e
        if self._memory is None or a._memory is None or b._memory is None:
            e.intrinsic("llvm.x86.tdpbf16ps", _NOTHING, self._number, a._number, b._number)
            return
        with e.loop(ROWS) as row:
            there = self._memory.at(row * 64)
            total = e.register(there.load(e.F32))
            with e.loop(b.rows) as pair:
                left = a._memory.at(row * 64).at(pair * 4).load(e.I32).splat(e.I32V)
                total.set(e.dot2_bf16(total.get(), b._memory.at(pair * 64).load(e.I32V), left))
            there.store(total.get())

    def _move(self, name: str, there: Pointer, stride: Value | int) -> None:
        stride = stride if isinstance(stride, Value) else self.e.constant(stride, self.e.I64)
        self.e.intrinsic(name, _NOTHING, self._number, Value(self.e, there.ir), stride)

    def _copy(self, source: tuple[Pointer, Value | int], target: tuple[Pointer, Value | int]) -> None:
        with self.e.loop(self.rows) as row, self.e.loop(self._words) as word:
            (old, new) = (there.at(row * stride).at(word * 4) for there, stride in (source, target))
            new.store(old.load(self.e.I32))


Load = Callable[[Tile, Value, int], None]


def _stacked(e: Emitter, size: int) -> Pointer:
    """So many bytes of the stack."""
    return Pointer(e, e.builder.bitcast(cgutils.alloca_once(e.builder, e.bytes(size)), e.I8.as_pointer()))


@contextlib.contextmanager
def tiles(e: Emitter, depth: Value | int = PAIRS) -> Iterator[list[Tile]]:
    """The registers, for a while: numbers 0 … 3 for C, 4 and 5 for A, 6 and 7 for B; these are `depth` pairs deep.

    Afterwards they are shaped as before, though empty.  Others may rely on that (llama.cpp shapes them once for each
    thread), and where nobody else uses them the system need not save them.
    """
    registers = [Tile(e, n, rows=depth if n >= 6 else ROWS, words=depth if n in (4, 5) else 16) for n in range(8)]
    if not TARGET.amx:
        yield registers
        return
    shape = np.zeros(64, np.uint8)  # "palette 1"; at 16 each register's bytes of a row, uint16; at 48 its rows
    shape[0], shape[16:32:2], shape[48:56] = 1, 64, ROWS
    before, there = _stacked(e, 64), _stacked(e, 64)
    e.intrinsic("llvm.x86.sttilecfg", _NOTHING, Value(e, before.ir))
    there.store(e.constant(shape, e.U8))
    pairs = depth if isinstance(depth, Value) else e.constant(depth, e.I64)
    for a, b in ((4, 6), (5, 7)):
        there.at(16 + 2 * a).store((pairs << 2).to(e.I8))
        there.at(48 + b).store(pairs.to(e.I8))
    e.intrinsic("llvm.x86.ldtilecfg", _NOTHING, Value(e, there.ir))
    yield registers
    e.intrinsic("llvm.x86.ldtilecfg", _NOTHING, Value(e, before.ir))


def add_tiles(
    e: Emitter, registers: list[Tile], rows: int, columns: int, steps: Value, load_a: Load, load_b: Load
) -> None:
    """Add the products of `rows` tiles A and `columns` tiles B, two of each at most, step by step along the sum.

    The sum of row i and column j is register 2 i + j.
    load_a, load_b : called as (register, step, i or j)
    """
    with e.loop(steps) as step:
        for j in range(columns):
            load_b(registers[6 + j], step, j)
        for i in range(rows):
            load_a(registers[4 + i], step, i)
            for j in range(columns):
                registers[2 * i + j].add_products(registers[4 + i], registers[6 + j])


def bf16_pairs(e: Emitter, low: Value, high: Value) -> Value:
    """Two vectors of 16 bfloat16, as int16, side by side: lanes of pairs."""
    return low.joined(high).lanes(*(lane + LANES * half for lane in range(LANES) for half in range(2)))
