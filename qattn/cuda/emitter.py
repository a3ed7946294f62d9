"""Functions for kernels that Python writes instruction by instruction.

Where dozens of registers are at work, and a layout decides which of them, a loop of Python that writes the instructions
is shorter than code that Numba would have to unroll and simplify, and is compiled ten times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cuda.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Emitter:
    """Writes the instructions of a function.  Values are LLVM's; numbers become constants."""

    def __init__(self, context: Any, builder: Any) -> None:
        self._context, self._builder = context, builder

    def __call__(self, instruction: Any, *args: Any) -> Any:
        """An instruction of `qattn.cuda.ptx` → its result, or the list of its results."""
        signature, codegen = instruction._defn(None, *([types.int64] * len(args)))
        out = codegen(self._context, self._builder, signature, [self.word(arg) for arg in args])
        return cgutils.unpack_tuple(self._builder, out) if isinstance(signature.return_type, types.BaseTuple) else out

    def load(self, instruction: Any, address: Any) -> list[Any]:
        """The words at an address, int64."""
        pointer = self._builder.inttoptr(address, ir.IntType(8).as_pointer())
        out = self(instruction, pointer, ir.Constant(_I64, 0))
        return out if isinstance(out, list) else [out]

    def address(self, pointer: Any, index: Any, size: int) -> Any:
        """Where pointer[index] lies: elements of `size` bytes, index int64."""
        return self.add(self._builder.ptrtoint(pointer, _I64), self.mul(index, size))

    def word(self, value: Any) -> Any:
        """A number as 32 bits, or as a float."""
        if isinstance(value, float):
            return ir.Constant(ir.FloatType(), value)
        return ir.Constant(_I32, value) if isinstance(value, int) else value

    def _same(self, a: Any, b: Any) -> tuple[Any, Any]:
        return a, ir.Constant(a.type, b) if isinstance(b, int) else b

    def add(self, a: Any, b: Any) -> Any:
        return self._builder.add(*self._same(a, b))

    def mul(self, a: Any, b: Any) -> Any:
        return self._builder.mul(*self._same(a, b))

    def both(self, a: Any, b: Any) -> Any:
        return self._builder.and_(*self._same(a, b))

    def either(self, a: Any, b: Any) -> Any:
        return self._builder.or_(*self._same(a, b))

    def left(self, a: Any, b: Any) -> Any:
        return a if isinstance(b, int) and b == 0 else self._builder.shl(*self._same(a, b))

    def right(self, a: Any, b: Any) -> Any:
        return a if isinstance(b, int) and b == 0 else self._builder.lshr(*self._same(a, b))

    def flip(self, a: Any, b: Any) -> Any:
        return self._builder.xor(*self._same(a, b))

    def wide(self, a: Any) -> Any:
        """int32 → int64."""
        return self._builder.sext(a, _I64)

    def half(self, a: Any, i: int) -> Any:
        """The lower or the upper 16 bits."""
        return self._builder.trunc(self.right(a, 16 * i), ir.IntType(16))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self._builder.fma(a, b, c)

    def unpack(self, value: Any) -> list[Any]:
        return cgutils.unpack_tuple(self._builder, value)


def function(names: str, returns: Any, write: Callable[..., Any]) -> Any:
    """The function that kernels call: its arguments' LLVM values go to write(e, …), which returns a tuple's elements.

    Tuples arrive as lists.  Integers become int32, but a place in memory and a stride int64.
    """
    integers = [types.int64 if name in ("place", "stride") else types.int32 for name in names.split(", ")]

    def define(context: Any, *given: Any) -> Any:
        takes = [
            type_ if isinstance(type_, (types.BaseTuple, types.CPointer)) else integer
            for type_, integer in zip(given, integers, strict=True)
        ]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(context, builder)
            lists = [
                e.unpack(arg) if isinstance(type_, types.BaseTuple) else arg
                for type_, arg in zip(signature.args, args, strict=True)
            ]
            return context.make_tuple(builder, signature.return_type, write(e, *lists))

        return returns(*takes), codegen

    scope: dict[str, Any] = {"define": define}
    exec(f"def {write.__name__}(context, {names}):\n    return define(context, {names})", scope)
    made = scope[write.__name__]
    made.__module__ = write.__module__
    return intrinsic(made)
