"""What threads tell each other through memory: int64 numbers that are read and written in one piece."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _first(context: Any, builder: ir.IRBuilder, type_: types.Array, array: Any) -> ir.Value:
    """A pointer to an array's first element."""
    return context.make_array(type_)(context, builder, array).data


@intrinsic
def add_one(typing_context: Any, counter: Any) -> Any:
    """Add 1 to the first element of an int64 array, and return what it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = _first(context, builder, signature.args[0], args[0])
        return builder.atomic_rmw("add", data, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(counter), codegen


@intrinsic
def read(typing_context: Any, number: Any) -> Any:
    """The first element of an int64 array, and all that was written before it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_first(context, builder, signature.args[0], args[0]), "acquire", 8)

    return types.int64(number), codegen


@intrinsic
def write(typing_context: Any, number: Any, value: Any) -> Any:
    """Set the first element of an int64 array; who reads it sees all that was written before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _first(context, builder, signature.args[0], args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(number, types.int64), codegen


@intrinsic
def exchange(typing_context: Any, number: Any, old: Any, new: Any) -> Any:
    """Set the first element of an int64 array to `new` if it is `old` → whether it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = _first(context, builder, signature.args[0], args[0])
        return builder.extract_value(builder.cmpxchg(data, args[1], args[2], "acq_rel", "acquire"), 1)

    return types.boolean(number, types.int64, types.int64), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that this is a loop which waits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            builder.call(cgutils.get_or_insert_function(builder.module, _NOTHING, "llvm.x86.sse2.pause"), [])
        elif builder.module.triple.startswith(("aarch64", "arm64")):  # ARM's `yield` takes no time, this barrier does
            barrier = cgutils.get_or_insert_function(builder.module, _BARRIER, "llvm.aarch64.isb")
            builder.call(barrier, [_WHOLE_SYSTEM])
        return context.get_dummy_value()

    return types.void(), codegen


_NOTHING = ir.FunctionType(ir.VoidType(), [])
_BARRIER = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
_WHOLE_SYSTEM = ir.Constant(ir.IntType(32), 15)
