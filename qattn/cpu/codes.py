"""The codes of a block, taken out of its bytes 16 at a time.

A snippet (`qattn.formats`) computes one code, from an index and the bytes of a block.  Here it runs once, when a kernel
is compiled: on 16 indices in a NumPy array, so that all that follows from them is a constant, and on a block whose
bytes are vectors, so that what it does with those becomes instructions.  Neighbours that share an index into a code
book look it up together.
"""

from __future__ import annotations

import hashlib
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir

from qattn.cpu.language import Language
from qattn.cpu.simd import LANES, Emitter, Pointer, Value

Array = np.ndarray[Any, Any]


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


class _Integers(Value):
    """16 int32 of which so many neighbours, from the first on, are `alike`."""

    def __init__(self, e: Language, value: ir.Value, alike: int) -> None:
        super().__init__(e, value)
        self.alike = alike

    def _binary(self, other: Any, on_ints: str, on_floats: str | None = None) -> Value:
        alike = other.alike if isinstance(other, _Integers) else _alike(other)
        return _Integers(self.e, super()._binary(other, on_ints, on_floats).ir, min(self.alike, alike))

    __rmul__ = Value.__mul__


def _alike(constants: Any) -> int:
    """How many neighbours are alike in 16 numbers."""
    lanes = np.broadcast_to(constants, LANES)
    return next(n for n in (16, 8, 4, 2, 1) if (lanes.reshape(-1, n) == lanes[::n, None]).all())


class _Block:
    """The bytes of a block, as snippets see them."""

    def __init__(self, e: Emitter, start: Pointer) -> None:
        self.e, self.start = e, start

    def __getitem__(self, index: Any) -> Value:
        at = np.broadcast_to(index, LANES)
        first, last = int(at.min()), int(at.max())
        found = self.start.at(first).load(self.e.bytes(last - first + 1))
        if not np.array_equal(at, np.arange(first, last + 1)):
            found = found.lanes(*(at - first).tolist())
        return _Integers(self.e, found.zero_extend(self.e.I32V).ir, _alike(at))


class _Book:
    """A table of bytes, or of rows of 4 or 8 of them, as snippets see it: the twin of `qattn.cuda.snippets.Book`."""

    def __init__(self, e: Emitter, values: Array) -> None:
        self.e, self.values = e, values

    def __getitem__(self, index: Any) -> Any:
        row, column = index if isinstance(index, tuple) else (index, None)
        if not isinstance(row, _Integers):
            return self.values[index]
        e, start, width = self.e, self._start(), row.alike
        if column is not None:  # whole rows
            width = self.values.shape[1]
            if width > row.alike or (column != np.arange(LANES) % width).any():
                raise ValueError("a snippet doesn't read the rows of a code book from their first element to the last")
        word = ir.IntType(8 * width)
        words = e.constant(0, ir.VectorType(word, LANES // width))
        for i in range(LANES // width):
            at = row.lane(i * width).zero_extend(e.I64)
            if column is None:
                found = start.at(at).load(e.I8).zero_extend(word) * int.from_bytes(b"\1" * width, "little")
            else:
                found = start.at(at * width).load(word)
            words = words.with_lane(i, found)
        return _Integers(e, words.bits(e.I8V).zero_extend(e.I32V).ir, row.alike if column is None else 1)

    def _start(self) -> Pointer:
        """The module's only copy."""
        data, module = self.values.astype(np.uint8, casting="safe").tobytes(), self.e.builder.module
        name = f"book_{hashlib.sha256(data).hexdigest()[:12]}"
        if name not in module.globals:
            made = ir.GlobalVariable(module, ir.ArrayType(self.e.I8, len(data)), name)
            made.linkage, made.global_constant, made.align = "internal", True, 64
            made.initializer = ir.Constant(made.value_type, bytearray(data))
        return Pointer(self.e, self.e.builder.bitcast(module.globals[name], self.e.I8.as_pointer()))
