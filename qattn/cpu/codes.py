"""The codes of a block, taken out of its bytes 16 at a time.

A snippet (`qattn.formats`) computes one code, from an index and the bytes of a block.  Here it runs once, when a kernel
is compiled: on 16 indices in a NumPy array, so that all that follows from them is a constant, and on a block whose
bytes are vectors, so that what it does with those becomes instructions.  What some neighbours have in common, such as
an index into a code book, is no vector but a scalar for each few of them.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
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
    return [code(block, np.arange(first, first + LANES).view(_Indices)).vector().to(e.I8V) for first in starts]


class _Indices(np.ndarray):
    """16 indices.  A snippet may branch on what holds for all of them, or for none."""

    def __bool__(self) -> bool:
        truths = set(self.ravel().tolist())
        if len(truths) > 1:
            raise ValueError("a snippet branches between indices that are computed together")
        return bool(truths.pop())


class _Vector(Value):
    """16 int32."""

    def vector(self) -> _Vector:
        """Itself: what a snippet gives may be either of two kinds."""
        return self

    def _binary(self, other: Any, on_ints: str, on_floats: str | None = None) -> Value:
        other = other.vector() if isinstance(other, _Alike) else other
        return _Vector(self.e, super()._binary(other, on_ints, on_floats).ir)

    __rmul__ = Value.__mul__


class _Alike:
    """16 int32, neighbours of which are the same number: these numbers, scalars, to look something up with.

    Where a vector is to be had for little, it is computed as well: what nobody uses, LLVM leaves out.
    """

    def __init__(self, e: Language, numbers: list[Value], vector: _Vector | None = None) -> None:
        self.e, self.numbers, self._vector = e, numbers, vector
        if len(numbers) == 1:
            self._vector = _Vector(e, numbers[0].splat(e.I32V).ir)

    def vector(self) -> _Vector:
        """One after the other."""
        if self._vector is not None:
            return self._vector
        count = len(self.numbers)
        few = self.e.constant(0, ir.VectorType(self.e.I32, count))
        for i, number in enumerate(self.numbers):
            few = few.with_lane(i, number)
        return _Vector(self.e, few.lanes(*np.repeat(range(count), LANES // count).tolist()).ir)

    def spread(self, count: int) -> list[Value]:
        """So many numbers, each for fewer neighbours."""
        return [self.numbers[i * len(self.numbers) // count] for i in range(count)]

    def _with(self, other: Any, operate: Callable[[Any, Any], Any]) -> Any:
        if isinstance(other, Value) or (not isinstance(other, _Alike) and _alike(other) < _ALIKE):
            return operate(self.vector(), other)
        if isinstance(other, _Alike):
            count, vector = max(len(self.numbers), len(other.numbers)), other._vector
            numbers = other.spread(count)
        else:
            count, vector = max(len(self.numbers), LANES // _alike(other)), other
            numbers = np.broadcast_to(other, LANES)[:: LANES // count].tolist()
        both = None if self._vector is None or vector is None else operate(self._vector, vector)
        return _Alike(self.e, list(map(operate, self.spread(count), numbers)), both)

    def __add__(self, other: Any) -> Any:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, operator.mul)

    def __and__(self, other: Any) -> Any:
        return self._with(other, operator.and_)

    def __or__(self, other: Any) -> Any:
        return self._with(other, operator.or_)

    def __xor__(self, other: Any) -> Any:
        return self._with(other, operator.xor)

    def __lshift__(self, other: Any) -> Any:
        return self._with(other, operator.lshift)

    def __rshift__(self, other: Any) -> Any:
        return self._with(other, operator.rshift)

    __rmul__ = __mul__


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
        vector = _Vector(self.e, found.zero_extend(self.e.I32V).ir)
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
        if isinstance(row, _Vector):
            row = _Alike(self.e, [row.lane(i) for i in range(LANES)])
        if not isinstance(row, _Alike):
            return self.values[index]
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
        return _Vector(e, words.bits(e.I8V).zero_extend(e.I32V).ir)

    def _start(self) -> Pointer:
        """The module's only copy."""
        data, module = self.values.astype(np.uint8, casting="safe").tobytes(), self.e.builder.module
        name = f"book_{hashlib.sha256(data).hexdigest()[:12]}"
        if name not in module.globals:
            made = ir.GlobalVariable(module, ir.ArrayType(self.e.I8, len(data)), name)
            made.linkage, made.global_constant, made.align = "internal", True, 64
            made.initializer = ir.Constant(made.value_type, bytearray(data))
        return Pointer(self.e, self.e.builder.bitcast(module.globals[name], self.e.I8.as_pointer()))
