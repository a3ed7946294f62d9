"""The codes of a block, taken out of its bytes 16 at a time.

A snippet (`qattn.formats`) computes one code, from an index and the bytes of a block.  Here it runs once, when a kernel
is compiled: on 16 indices in a NumPy array, so that all that follows from them is a constant, and on a block whose
bytes are vectors, so that what it does with those becomes instructions.  What some neighbours have in common, such as
an index into a code book, is no vector but a scalar for each few of them.
"""

from __future__ import annotations

import functools
import hashlib
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir

from qattn.cpu.language import Language
from qattn.cpu.simd import LANES, Emitter, Pointer, Value

Array = np.ndarray[Any, Any]
_ALIKE = 4  # neighbours that are worth a scalar


def taken(e: Emitter, format: Any, b: Pointer) -> list[Value]:
    """The codes of a block of this format that begins at b, in vectors of 16 bytes."""
    snippet, block = format.code, _Block(e, b)
    scope = {name: _Book(e, v) if isinstance(v, np.ndarray) else v for name, v in snippet.__globals__.items()}
    code = FunctionType(snippet.__code__, scope, snippet.__name__, None, snippet.__closure__)
    starts = range(0, format.block, LANES)
    return [code(block, np.arange(first, first + LANES).view(_Indices)).to(e.I8V) for first in starts]


class _Indices(np.ndarray):
    """16 indices.  A snippet may branch on what holds for all of them, or for none."""

    def __bool__(self) -> bool:
        truths = set(self.ravel().tolist())
        if len(truths) > 1:
            raise ValueError("a snippet branches between indices that are computed together")
        return bool(truths.pop())


class _Alike(Value):
    """16 int32, neighbours of which are the same number: these numbers, scalars, to look something up with.

    Whoever asks for the vector gets it.  Where it is to be had for little, it is computed beside the numbers: what
    nobody uses, LLVM leaves out.
    """

    def __init__(self, e: Language, numbers: list[Value], vector: Value | None = None) -> None:
        self.e, self.numbers = e, numbers
        self._vector = numbers[0].splat(e.I32V) if len(numbers) == 1 else vector

    @functools.cached_property
    def ir(self) -> ir.Value:  # type: ignore[override]
        """The vector: the numbers one after the other."""
        if self._vector is not None:
            return self._vector.ir
        count = len(self.numbers)
        few = self.e.constant(0, ir.VectorType(self.e.I32, count))
        for i, number in enumerate(self.numbers):
            few = few.with_lane(i, number)
        return few.lanes(*np.repeat(range(count), LANES // count).tolist()).ir

    def spread(self, count: int) -> list[Value]:
        """So many numbers, each for fewer neighbours."""
        return [self.numbers[i * len(self.numbers) // count] for i in range(count)]

    def _binary(self, other: Any, on_ints: str, on_floats: str | None = None) -> Value:
        if isinstance(other, _Alike):
            count, vector = max(len(self.numbers), len(other.numbers)), other._vector
            numbers = other.spread(count)
        elif isinstance(other, Value) or _alike(other) < _ALIKE:
            return super()._binary(other, on_ints, on_floats)
        else:
            count, vector = max(len(self.numbers), LANES // _alike(other)), other
            numbers = np.broadcast_to(other, LANES)[:: LANES // count].tolist()
        both = None if self._vector is None or vector is None else self._vector._binary(vector, on_ints)
        return _Alike(self.e, [a._binary(b, on_ints) for a, b in zip(self.spread(count), numbers, strict=True)], both)


def _alike(constants: Any) -> int:
    """How many neighbours are alike in 16 numbers."""
    lanes = np.broadcast_to(constants, LANES)
    return next(n for n in (16, 8, 4, 2, 1) if (lanes.reshape(-1, n) == lanes[::n, None]).all())


class _Block:
    """The bytes of a block, as snippets see them."""

    def __init__(self, e: Emitter, start: Pointer) -> None:
        self.e, self.start = e, start

    def __getitem__(self, index: Any) -> Any:
        at, alike = np.broadcast_to(index, LANES), _alike(index)
        first, last = int(at.min()), int(at.max())
        found = self.start.at(first).load(self.e.bytes(last - first + 1))
        if not np.array_equal(at, np.arange(first, last + 1)):
            found = found.lanes(*(at - first).tolist())
        vector = found.zero_extend(self.e.I32V)
        if alike < _ALIKE:
            return vector
        each = [self.start.at(i).load(self.e.I8).zero_extend(self.e.I32) for i in at[::alike].tolist()]
        return _Alike(self.e, each, vector)


class _Book:
    """A table of bytes, or of rows of 4 or 8 of them, as snippets see it: the twin of `qattn.cuda.snippets.Book`."""

    def __init__(self, e: Emitter, values: Array) -> None:
        self.e, self.values = e, values

    def __getitem__(self, index: Any) -> Any:
        row, column = index if isinstance(index, tuple) else (index, None)
        if not isinstance(row, Value):
            return self.values[index]
        if not isinstance(row, _Alike):
            row = _Alike(self.e, [row.lane(i) for i in range(LANES)])
        e, start = self.e, self._start()
        if column is None:
            places = [start.at(number.zero_extend(e.I64)) for number in row.numbers]
            return _Alike(e, [place.load(e.I8).zero_extend(e.I32) for place in places])
        width = self.values.shape[1]
        count = LANES // width
        if count < len(row.numbers) or (column != np.arange(LANES) % width).any():
            raise ValueError("a snippet doesn't read the rows of a code book from their first element to the last")
        words = e.constant(0, ir.VectorType(ir.IntType(8 * width), count))
        for i, number in enumerate(row.spread(count)):
            words = words.with_lane(i, start.at(number.zero_extend(e.I64) * width).load(words.type.element))
        return words.bits(e.I8V).zero_extend(e.I32V)

    def _start(self) -> Pointer:
        """The module's only copy."""
        data, module = self.values.astype(np.uint8, casting="safe").tobytes(), self.e.builder.module
        name = f"book_{hashlib.sha256(data).hexdigest()[:12]}"
        if name not in module.globals:
            made = ir.GlobalVariable(module, ir.ArrayType(self.e.I8, len(data)), name)
            made.linkage, made.global_constant, made.align = "internal", True, 64
            made.initializer = ir.Constant(made.value_type, bytearray(data))
        return Pointer(self.e, self.e.builder.bitcast(module.globals[name], self.e.I8.as_pointer()))
