"""Instructions that Numba has no name for, as inline PTX: the one file that writes PTX.

All of them exist from compute capability 8.0 on.  Registers that hold several small numbers are uint32: four bytes, or
two float16 or bfloat16, the first in the lowest bits.  Source: NVIDIA's PTX ISA, section "Instruction Set".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cuda.extending import intrinsic

_I32, _U32, _F32, _U16 = types.int32, types.uint32, types.float32, types.uint16
_I64, _U64, _F64 = types.int64, types.uint64, types.float64
_LETTERS = {_I32: "r", _U32: "r", _F32: "f", _I64: "l", _U64: "l", _U16: "h", _F64: "d"}
_LLVM = {type_: ir.IntType(type_.bitwidth) for type_ in (_I32, _U32, _I64, _U64, _U16)}
_LLVM |= {_F32: ir.FloatType(), _F64: ir.DoubleType()}


def _call(builder: Any, text: str, takes: Sequence[Any], args: Sequence[Any], gives: Sequence[Any], pure: bool) -> Any:
    """Inline PTX whose operands $0, $1, … are first the results, then the arguments."""
    results = [_LLVM[type_] for type_ in gives]
    llvm: Any = ir.VoidType() if not results else results[0] if len(results) == 1 else ir.LiteralStructType(results)
    constraints = ["=" + _LETTERS[type_] for type_ in gives] + [_LETTERS[type_] for type_ in takes]
    if not pure:
        constraints.append("~{memory}")
    function = ir.FunctionType(llvm, [_LLVM[type_] for type_ in takes])
    return builder.call(ir.InlineAsm(function, text, ",".join(constraints), side_effect=not pure), args)


def _instruction(name: str, text: str, takes: Sequence[Any], gives: Sequence[Any] = (), pure: bool = True) -> Any:
    """An intrinsic for one instruction; arguments are converted to the types that it takes.

    `gives` are the types of the results: a tuple if there are several.  One that isn't `pure` reads or writes memory,
    or concerns other threads, and stays where it stands.
    """
    names = [f"a{i}" for i in range(len(takes))]

    def define(context: Any, *given: Any) -> Any:
        returns = types.void if not gives else gives[0] if len(gives) == 1 else types.UniTuple(gives[0], len(gives))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out = _call(builder, text, takes, args, gives, pure)
            if not gives:
                return context.get_dummy_value()
            if len(gives) == 1:
                return out
            return context.make_tuple(builder, signature.return_type, cgutils.unpack_tuple(builder, out))

        return returns(*takes), codegen

    scope: dict[str, Any] = {"define": define}
    arguments = ", ".join(["context", *names])
    exec(f"def {name}({arguments}):\n    return define({arguments})", scope)  # an intrinsic's arguments need names
    function = scope[name]
    function.__module__ = __name__
    return intrinsic(function)


def _operands(first: int, *sizes: int) -> list[str]:
    """Numbered operands in braces: "{$0,$1}", …"""
    groups = []
    for size in sizes:
        groups.append("{" + ",".join(f"${i}" for i in range(first, first + size)) + "}")
        first += size
    return groups


# ------------------------------------------------------------------------------------------------- small integers

permute = _instruction("permute", "prmt.b32 $0, $1, $2, $3;", [_U32, _U32, _U32], [_U32])
"""Four of the eight bytes of (a, b), as the four nibbles of the third argument say."""

# --------------------------------------------------------------------------------------------------- small floats

f16_to_f32 = _instruction("f16_to_f32", "cvt.f32.f16 $0, $1;", [_U16], [_F32])
f64_to_f32 = _instruction("f64_to_f32", "cvt.rn.f32.f64 $0, $1;", [_F64], [_F32])
f32_to_f16 = _instruction("f32_to_f16", "cvt.rn.f16.f32 $0, $1;", [_F32], [_U16])
pack_f16 = _instruction("pack_f16", "cvt.rn.f16x2.f32 $0, $2, $1;", [_F32, _F32], [_U32])
"""Two float32 → two float16, the first one low."""
pack_bf16 = _instruction("pack_bf16", "cvt.rn.bf16x2.f32 $0, $2, $1;", [_F32, _F32], [_U32])
bits_of = _instruction("bits_of", "mov.b32 $0, $1;", [_F32], [_U32])
float_of = _instruction("float_of", "mov.b32 $0, $1;", [_U32], [_F32])

exp2 = _instruction("exp2", "ex2.approx.ftz.f32 $0, $1;", [_F32], [_F32])
"""2**x, to a relative error of 2**-22."""
log2 = _instruction("log2", "lg2.approx.ftz.f32 $0, $1;", [_F32], [_F32])
rsqrt = _instruction("rsqrt", "rsqrt.approx.ftz.f32 $0, $1;", [_F32], [_F32])
reciprocal = _instruction("reciprocal", "rcp.rn.f32 $0, $1;", [_F32], [_F32])
"""1 / x, correctly rounded."""
multiply = _instruction("multiply", "mul.rn.f32 $0, $1, $2;", [_F32, _F32], [_F32])
"""a · b, never joined with an addition: where the bits of products and sums matter."""
divide = _instruction("divide", "div.rn.f32 $0, $1, $2;", [_F32, _F32], [_F32])
subtract_f16 = _instruction("subtract_f16", "sub.rn.f16x2 $0, $1, $2;", [_U32, _U32], [_U32])
"""a - b for two pairs of float16."""
multiply_f16 = _instruction("multiply_f16", "mul.rn.f16x2 $0, $1, $2;", [_U32, _U32], [_U32])
multiply_add_f16 = _instruction("multiply_add_f16", "fma.rn.f16x2 $0, $1, $2, $3;", [_U32, _U32, _U32], [_U32])
"""a · b + c, rounded once."""
minimum = _instruction("minimum", "min.NaN.f32 $0, $1, $2;", [_F32, _F32], [_F32])
"""The smaller of two, or NaN if one of them is."""
maximum = _instruction("maximum", "max.NaN.f32 $0, $1, $2;", [_F32, _F32], [_F32])
add = _instruction("add", "add.rn.f32 $0, $1, $2;", [_F32, _F32], [_F32])

# --------------------------------------------------------------------------------------------------------- memory


def _pointer_instruction(name: str, text: str, takes: Sequence[Any] = (), gives: Sequence[Any] = ()) -> Any:
    """Like `_instruction`, for f(pointer, index, …): the operand before the others is the address of pointer[index]."""
    names = [f"a{i}" for i in range(len(takes))]

    def define(typing_context: Any, pointer: Any, index: Any, *given: Any) -> Any:
        returns = types.UniTuple(gives[0], len(gives)) if len(gives) > 1 else gives[0] if gives else types.void

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            wide = context.cast(builder, args[1], signature.args[1], types.int64)
            address = builder.ptrtoint(builder.gep(args[0], [wide]), ir.IntType(64))
            out = _call(builder, text, [_U64, *takes], [address, *args[2:]], gives, pure=False)
            if len(gives) > 1:
                return context.make_tuple(builder, signature.return_type, cgutils.unpack_tuple(builder, out))
            return out if gives else context.get_dummy_value()

        return returns(pointer, index, *takes), codegen

    scope: dict[str, Any] = {"define": define}
    arguments = ", ".join(["context", "pointer", "index", *names])
    exec(f"def {name}({arguments}):\n    return define({arguments})", scope)
    scope[name].__module__ = __name__
    return intrinsic(scope[name])


address = _pointer_instruction("address", "mov.u64 $0, $1;", gives=[_U64])
"""Where pointer[index] lies."""
load_16 = _pointer_instruction("load_16", "ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", gives=[_U32] * 4)
"""16 bytes at pointer[index], which are aligned → four uint32."""
load_16_constant = _pointer_instruction(
    "load_16_constant", "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", gives=[_U32] * 4
)
"""The same, of memory that nobody writes while the kernel runs: weights."""
load_8_constant = _pointer_instruction("load_8_constant", "ld.global.nc.v2.u32 {$0,$1}, [$2];", gives=[_U32] * 2)
load_4_constant = _pointer_instruction("load_4_constant", "ld.global.nc.u32 $0, [$1];", gives=[_U32])
load_8 = _pointer_instruction("load_8", "ld.global.v2.u32 {$0,$1}, [$2];", gives=[_U32] * 2)
store_16 = _pointer_instruction("store_16", "st.global.v4.u32 [$0], {$1,$2,$3,$4};", [_U32] * 4)
store_8 = _pointer_instruction("store_8", "st.global.v2.u32 [$0], {$1,$2};", [_U32] * 2)
store_4 = _pointer_instruction("store_4", "st.global.u32 [$0], $1;", [_U32])
atomic_max_64 = _pointer_instruction("atomic_max_64", "red.global.max.s64 [$0], $1;", [_I64])
"""pointer[index] = max(pointer[index], value), for int64."""


@intrinsic
def shared_address(typing_context: Any, array: Any, index: Any) -> Any:
    """The address of an element of a shared array in the shared window, for the instructions that want such."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        wide = context.cast(builder, args[1], signature.args[1], types.int64)
        element = builder.gep(data, [wide])
        shared = builder.addrspacecast(element, ir.PointerType(element.type.pointee, 3))
        return builder.trunc(builder.ptrtoint(shared, ir.IntType(64)), ir.IntType(32))

    return _U32(array, index), codegen


load_shared_16 = _instruction("load_shared_16", "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", [_U32], [_U32] * 4, pure=False)
"""16 bytes at a `shared_address`, which is aligned → four uint32."""
load_shared_8 = _instruction("load_shared_8", "ld.shared.v2.u32 {$0,$1}, [$2];", [_U32], [_U32] * 2, pure=False)
load_shared_4 = _instruction("load_shared_4", "ld.shared.u32 $0, [$1];", [_U32], [_U32], pure=False)
store_shared_4 = _instruction("store_shared_4", "st.shared.u32 [$0], $1;", [_U32, _U32], pure=False)
store_shared_16 = _instruction("store_shared_16", "st.shared.v4.u32 [$0], {$1,$2,$3,$4};", [_U32] * 5, pure=False)
copy_async_16 = _pointer_instruction("copy_async_16", "cp.async.cg.shared.global [$1], [$0], 16;", [_U32])
"""Begin to copy the 16 bytes at pointer[index] to a `shared_address`."""
copy_async_8 = _pointer_instruction("copy_async_8", "cp.async.ca.shared.global [$1], [$0], 8;", [_U32])
copy_async_4 = _pointer_instruction("copy_async_4", "cp.async.ca.shared.global [$1], [$0], 4;", [_U32])
commit_copies = _instruction("commit_copies", "cp.async.commit_group;", [], [], pure=False)
"""The copies begun by this thread since the last call are a group."""
wait_for_copies = _instruction("wait_for_copies", "cp.async.wait_group 0;", [], [], pure=False)
"""Wait until all groups of this thread have arrived."""
wait_for_older_copies = _instruction("wait_for_older_copies", "cp.async.wait_group 1;", [], [], pure=False)
"""Wait until all groups of this thread but the last have arrived."""

# -------------------------------------------------------------------------------------------------- tensor cores


def _mma(name: str, shape: str, kinds: str, a: int, b: int, number: Any) -> Any:
    d, *others = _operands(0, 4, a, b, 4)
    text = f"mma.sync.aligned.{shape}.row.col.{kinds} {d}, {', '.join(others)};"
    return _instruction(name, text, [_U32] * (a + b) + [number] * 4, [number] * 4, pure=False)


# The fragments of a 16 × 8 product, for lane = 4 r + c of a warp, as the PTX ISA lays them out:
#   result   rows r, r, r + 8, r + 8; columns 2 c, 2 c + 1, 2 c, 2 c + 1
#   left     16-bit: rows r, r + 8, r, r + 8, elements 2 c, 2 c + 1 and, from the third on, 8 further
#            8-bit: the same with elements 4 c … 4 c + 3, and 16 further; depth 16 has the first two only
#   right    column r; elements as in the left one
mma_s8 = _mma("mma_s8", "m16n8k32", "s32.s8.s8.s32", 4, 2, _I32)
mma_u8 = _mma("mma_u8", "m16n8k32", "s32.u8.s8.s32", 4, 2, _I32)
"""The left factor is unsigned."""
mma_s8_half = _mma("mma_s8_half", "m16n8k16", "s32.s8.s8.s32", 2, 1, _I32)
"""Depth 16."""
mma_u8_half = _mma("mma_u8_half", "m16n8k16", "s32.u8.s8.s32", 2, 1, _I32)
mma_f16 = _mma("mma_f16", "m16n8k16", "f32.f16.f16.f32", 4, 2, _F32)
mma_bf16 = _mma("mma_bf16", "m16n8k16", "f32.bf16.bf16.f32", 4, 2, _F32)

load_matrix = _instruction(
    "load_matrix", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];", [_U32], [_U32] * 4, pure=False
)
"""Four 8 × 8 matrices of 16-bit elements; lane l has the `shared_address` of row l % 8 of matrix l // 8."""
load_matrix_transposed = _instruction(
    "load_matrix_transposed",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
    [_U32],
    [_U32] * 4,
    pure=False,
)
