"""What micro-kernels are written in, see `qattn.cpu.simd`: vectors, addresses, and instructions for any machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

LANES = 16  # 32-bit lanes of one 512-bit register
Lanes = np.ndarray[Any, Any]  # constants, one for each lane


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


def vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(element, count)


def _is_float(type_: ir.Type) -> bool:
    return isinstance(getattr(type_, "element", type_), (ir.FloatType, ir.HalfType, ir.DoubleType))


class Value:
    """A scalar or a vector in flight, with Python's operators.  Integers are signed unless a method says otherwise."""

    def __init__(self, emitter: Language, value: ir.Value) -> None:
        self.e, self.ir = emitter, value

    @property
    def type(self) -> ir.Type:
        return self.ir.type

    def _binary(self, other: Value | int | float | Lanes, on_ints: str, on_floats: str | None = None) -> Value:
        right = other if isinstance(other, Value) else self.e.constant(other, self.type)
        name = on_floats if _is_float(self.type) else on_ints
        if name is None:
            raise TypeError(f"{on_ints} needs integers, not {self.type}")
        return Value(self.e, getattr(self.e.builder, name)(self.ir, right.ir))

    def __add__(self, other: Value | int | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | int | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Value | int | float) -> Value:
        return self._binary(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: Value | int | float) -> Value:
        return self._binary(other, "sdiv", "fdiv")

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and_")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or_")

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "xor")

    def __lshift__(self, other: int | Lanes) -> Value:
        return self._binary(other, "shl") if np.any(other) else self

    def __rshift__(self, other: int | Lanes) -> Value:
        """Shift right, filling with zeros."""
        return self._binary(other, "lshr") if np.any(other) else self

    def shift_signed(self, other: int) -> Value:
        """Shift right, filling with the sign."""
        return self._binary(other, "ashr") if other else self

    def compare(self, operator: str, other: Value | int | float) -> Value:
        """A mask: `operator` is one of ``< <= > >= == !=``; signed on integers, ordered on floats."""
        right = other if isinstance(other, Value) else self.e.constant(other, self.type)
        emit = self.e.builder.fcmp_ordered if _is_float(self.type) else self.e.builder.icmp_signed
        return Value(self.e, emit(operator, self.ir, right.ir))

    def where(self, if_true: Value, if_false: Value) -> Value:
        """Choose by this mask."""
        return Value(self.e, self.e.builder.select(self.ir, if_true.ir, if_false.ir))

    def bits(self, type_: ir.Type) -> Value:
        """The same bits as another type of the same size."""
        return Value(self.e, self.e.builder.bitcast(self.ir, type_))

    def to(self, type_: ir.Type) -> Value:
        """Convert: integers are signed, floats to integers truncate, widths change by extension or truncation."""
        b, source = self.e.builder, self.type
        if source == type_:
            return self
        wide = _width(type_) > _width(source)
        if _is_float(source) and _is_float(type_):
            converted = b.fpext(self.ir, type_) if wide else b.fptrunc(self.ir, type_)
        elif _is_float(type_):
            converted = b.sitofp(self.ir, type_)
        elif _is_float(source):
            converted = b.fptosi(self.ir, type_)
        else:
            converted = b.sext(self.ir, type_) if wide else b.trunc(self.ir, type_)
        return Value(self.e, converted)

    def zero_extend(self, type_: ir.Type) -> Value:
        """Widen unsigned integers."""
        return Value(self.e, self.e.builder.zext(self.ir, type_))

    def splat(self, type_: ir.VectorType) -> Value:
        """Every lane is this scalar."""
        b = self.e.builder
        first = b.insert_element(ir.Constant(type_, ir.Undefined), self.ir, _I32(0))
        zeros = ir.Constant(vector(_I32, type_.count), [0] * type_.count)
        return Value(self.e, b.shuffle_vector(first, ir.Constant(type_, ir.Undefined), zeros))

    def lanes(self, *index: int) -> Value:
        """The lanes named, in that order."""
        mask = ir.Constant(vector(_I32, len(index)), list(index))
        return Value(self.e, self.e.builder.shuffle_vector(self.ir, ir.Constant(self.type, ir.Undefined), mask))

    def lane(self, index: int) -> Value:
        """One lane, a scalar."""
        return Value(self.e, self.e.builder.extract_element(self.ir, _I32(index)))

    def with_lane(self, index: int, scalar: Value) -> Value:
        """The same with another number in one lane."""
        return Value(self.e, self.e.builder.insert_element(self.ir, scalar.ir, _I32(index)))

    def joined(self, other: Value) -> Value:
        """This vector's lanes, then the other's."""
        mask = ir.Constant(vector(_I32, 2 * self.type.count), list(range(2 * self.type.count)))
        return Value(self.e, self.e.builder.shuffle_vector(self.ir, other.ir, mask))


def _width(type_: ir.Type) -> int:
    element = getattr(type_, "element", type_)
    if isinstance(element, ir.IntType):
        return int(element.width)
    return {ir.HalfType: 16, BFloat: 16, ir.FloatType: 32, ir.DoubleType: 64}[type(element)]


class Pointer:
    """An address; offsets are in bytes, and loads and stores may be unaligned."""

    def __init__(self, emitter: Language, address: ir.Value) -> None:
        self.e, self.ir = emitter, address

    def at(self, offset: Value | int) -> Pointer:
        if isinstance(offset, int):
            if offset == 0:
                return self
            offset = self.e.constant(offset, _I64)
        return Pointer(self.e, self.e.builder.gep(self.ir, [offset.ir]))

    def load(self, type_: ir.Type) -> Value:
        typed = self.e.builder.bitcast(self.ir, type_.as_pointer())
        return Value(self.e, self.e.builder.load(typed, align=1))

    def store(self, value: Value) -> None:
        typed = self.e.builder.bitcast(self.ir, value.type.as_pointer())
        self.e.builder.store(value.ir, typed, align=1)


class Register:
    """A variable that survives a loop.  LLVM keeps it in a machine register."""

    def __init__(self, emitter: Language, initial: Value) -> None:
        self.e = emitter
        self._slot = cgutils.alloca_once(emitter.builder, initial.type)
        self.set(initial)

    def get(self) -> Value:
        return Value(self.e, self.e.builder.load(self._slot))

    def set(self, value: Value) -> None:
        self.e.builder.store(value.ir, self._slot)


class Language:
    """Appends instructions to the function that Numba is compiling: those that all machines have."""

    I8, I16, I32, I64, F32S = _I8, _I16, _I32, _I64, _F32
    U8 = vector(_I8, 64)  # the 64 bytes of one register
    I32V = vector(_I32)
    F32 = vector(_F32)
    I8V, I16V, F16 = vector(_I8), vector(_I16), vector(ir.HalfType())
    BF16_PAIRS = vector(BFloat(), 32)
    QUADS, OCTET = vector(_I32, 4), vector(_I32, 8)

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def constant(self, value: int | float | list[int] | Lanes, type_: ir.Type) -> Value:
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, np.broadcast_to(value, type_.count).tolist()))
        return Value(self, ir.Constant(type_, value))

    def bytes(self, count: int) -> ir.VectorType:
        """The type of so many bytes."""
        return vector(_I8, count)

    def register(self, initial: Value) -> Register:
        return Register(self, initial)

    @contextlib.contextmanager
    def loop(self, count: Value | int, start: Value | int = 0) -> Iterator[Value]:
        """Run the body for index = start … count - 1 (int64)."""
        begin, end = (x.ir if isinstance(x, Value) else _I64(x) for x in (start, count))
        with cgutils.for_range(self.builder, end, start=begin, intp=_I64) as body:
            yield Value(self, body.index)

    def when(self, condition: Value) -> contextlib.AbstractContextManager[Any]:
        """Run the body if a scalar condition holds."""
        return self.builder.if_then(condition.ir)

    def intrinsic(self, name: str, result: ir.Type, *args: Value, **call: Any) -> Value:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return Value(self, self.builder.call(function, [arg.ir for arg in args], **call))

    def prefetch(self, there: Pointer) -> None:
        """Ask for a cache line that will be read soon; an address past the end of an array does no harm.

        Into the second-level cache: there is room for more than in the first, and more can be asked for at once.
        """
        read, second, data = (Value(self, _I32(i)) for i in (0, 2, 1))
        self.intrinsic("llvm.prefetch.p0i8", ir.VoidType(), Value(self, there.ir), read, second, data)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.intrinsic("llvm.fma.v16f32", self.F32, a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of each lane; b where either is NaN, as the machine's instruction has it."""
        return a.compare(">", b).where(a, b)

    def absolute(self, a: Value) -> Value:
        return (a.bits(self.I32V) & 0x7FFFFFFF).bits(self.F32)

    def rounded(self, a: Value) -> Value:
        """The nearest integer, ties to even."""
        return self.intrinsic("llvm.roundeven.v16f32", self.F32, a)

    def sum(self, a: Value) -> Value:
        """Add the lanes pairwise, always in the same order."""
        while a.type.count > 1:
            half = a.type.count // 2
            a = a.lanes(*range(half)) + a.lanes(*range(half, 2 * half))
        return a.lane(0)

    def largest(self, a: Value) -> Value:
        """The largest lane of a float vector."""
        while a.type.count > 1:
            half = a.type.count // 2
            low, high = a.lanes(*range(half)), a.lanes(*range(half, 2 * half))
            a = low.compare(">", high).where(low, high)
        return a.lane(0)
