"""A small language for micro-kernels: 16-lane vectors, written in Python, emitted as LLVM IR.

A micro-kernel is a Python function over an `Emitter`.  It runs once, when Numba compiles its caller, and every
operation on a `Value` appends one LLVM instruction::

    @micro_kernel
    def axpy(e, x, y, a, n):                   # x, y: arrays; a: float32; n: int64
        factor = a.splat(e.F32)
        with e.loop(n) as i:
            there = y.at(i * 64)
            there.store(e.fma(factor, x.at(i * 64).load(e.F32), there.load(e.F32)))

    axpy((x, y, a, n))                         # inside an njit function: one tuple of arguments

So Python's own ``for`` is unrolled at compile time, a Python list of values is a set of registers, and ``e.loop`` is
the loop that runs.  A vector has 16 lanes of 32 bits (one AVX-512 register; LLVM splits it into two or four on smaller
machines), and offsets are in bytes.  This file alone knows instruction sets: the dot products at its end take the
instruction that the target has, and fall back to plain vector arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from qattn.cpu.target import TARGET

LANES = 16  # 32-bit lanes of one 512-bit register
Lanes = np.ndarray[Any, Any]  # constants, one for each lane


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


def _vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, count)


def _is_float(type_: ir.Type) -> bool:
    return isinstance(getattr(type_, "element", type_), (ir.FloatType, ir.HalfType, ir.DoubleType))


class Value:
    """A scalar or a vector in flight, with Python's operators.  Integers are signed unless a method says otherwise."""

    def __init__(self, emitter: Emitter, value: ir.Value) -> None:
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
        zeros = ir.Constant(_vector(_I32, type_.count), [0] * type_.count)
        return Value(self.e, b.shuffle_vector(first, ir.Constant(type_, ir.Undefined), zeros))

    def lanes(self, *index: int) -> Value:
        """The lanes named, in that order."""
        mask = ir.Constant(_vector(_I32, len(index)), list(index))
        return Value(self.e, self.e.builder.shuffle_vector(self.ir, ir.Constant(self.type, ir.Undefined), mask))

    def lane(self, index: int) -> Value:
        """One lane, a scalar."""
        return Value(self.e, self.e.builder.extract_element(self.ir, _I32(index)))

    def with_lane(self, index: int, scalar: Value) -> Value:
        """The same with another number in one lane."""
        return Value(self.e, self.e.builder.insert_element(self.ir, scalar.ir, _I32(index)))

    def joined(self, other: Value) -> Value:
        """This vector's lanes, then the other's."""
        mask = ir.Constant(_vector(_I32, 2 * self.type.count), list(range(2 * self.type.count)))
        return Value(self.e, self.e.builder.shuffle_vector(self.ir, other.ir, mask))


def _width(type_: ir.Type) -> int:
    element = getattr(type_, "element", type_)
    if isinstance(element, ir.IntType):
        return int(element.width)
    return {ir.HalfType: 16, _BFloat: 16, ir.FloatType: 32, ir.DoubleType: 64}[type(element)]


class Pointer:
    """An address; offsets are in bytes, and loads and stores may be unaligned."""

    def __init__(self, emitter: Emitter, address: ir.Value) -> None:
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

    def __init__(self, emitter: Emitter, initial: Value) -> None:
        self.e = emitter
        self._slot = cgutils.alloca_once(emitter.builder, initial.type)
        self.set(initial)

    def get(self) -> Value:
        return Value(self.e, self.e.builder.load(self._slot))

    def set(self, value: Value) -> None:
        self.e.builder.store(value.ir, self._slot)


class Emitter:
    """Appends instructions to the function that Numba is compiling."""

    I8, I16, I32, I64, F32S = _I8, _I16, _I32, _I64, _F32
    U8 = _vector(_I8, 64)  # the 64 bytes of one register
    I32V = _vector(_I32)
    F32 = _vector(_F32)
    I8V, I16V, F16 = _vector(_I8), _vector(_I16), _vector(ir.HalfType())
    BF16_PAIRS = _vector(_BFloat(), 32)
    QUADS, OCTET = _vector(_I32, 4), _vector(_I32, 8)

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def constant(self, value: int | float | list[int] | Lanes, type_: ir.Type) -> Value:
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, np.broadcast_to(value, type_.count).tolist()))
        return Value(self, ir.Constant(type_, value))

    def bytes(self, count: int) -> ir.VectorType:
        """The type of so many bytes."""
        return _vector(_I8, count)

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
        return self.builder.if_then(condition.ir)  # type: ignore[no-any-return]

    def intrinsic(self, name: str, result: ir.Type, *args: Value, **call: Any) -> Value:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return Value(self, self.builder.call(function, [arg.ir for arg in args], **call))

    def prefetch(self, there: Pointer, near: bool = True) -> None:
        """Ask for a cache line that will be read soon; an address past the end of an array does no harm.

        Into the second-level cache unless `near`: there is room for more, and more can be asked for at once.
        """
        zero, near_, data = (Value(self, _I32(i)) for i in (0, 3 if near else 2, 1))
        self.intrinsic("llvm.prefetch.p0i8", ir.VoidType(), Value(self, there.ir), zero, near_, data)

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

    def exp2(self, x: Value, degree: int = 5) -> Value:
        """2**x for x ≤ 0, 0 below -150.  Relative error below 3e-7, or 3e-6 with degree 4.

        2**x = 2**n · 2**f with n = round(x), |f| ≤ 1/2, and a polynomial for 2**f.
        """
        x = self.maximum(x, self.constant(-200.0, self.F32))
        whole = self.rounded(x)
        f = x - whole
        p = self.constant(_EXP2[degree][0], self.F32)
        for coefficient in _EXP2[degree][1:]:
            p = self.fma(p, f, self.constant(coefficient, self.F32))
        return self._times_power_of_2(p, whole)

    # ------------------------------------------------------------------ what differs between instruction sets

    def _times_power_of_2(self, x: Value, whole: Value) -> Value:
        """x · 2**whole, for whole numbers -200 … 0."""
        if TARGET.level == "avx512":
            all_lanes, current_rounding = self.constant(-1, ir.IntType(16)), self.constant(4, _I32)
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return self.intrinsic(name, self.F32, x, whole, x, all_lanes, current_rounding)
        # In two steps, since a float's exponent ends at -126.
        half = whole.to(self.I32V).shift_signed(1)
        for power in (half, whole.to(self.I32V) - half):
            x = x * ((power + 127) << 23).bits(self.F32)
        return x

    def lookup(self, table: Value, index: Value, bits: int = 4) -> Value:
        """The `table`'s bytes at the lowest `bits` of 64 indices, 4 at most; the table repeats itself to 64 bytes."""
        if TARGET.vbmi:
            return self.intrinsic("llvm.x86.avx512.permvar.qi.512", self.U8, table, index)
        index = index & ((1 << bits) - 1)
        if TARGET.level == "avx512":
            return self.intrinsic("llvm.x86.avx512.pshuf.b.512", self.U8, table, index)
        return self._by_parts(self._lookup_part, self.U8, table, index)

    def dot4(self, acc: Value, codes: Value, x: Value) -> Value:
        """acc + the dot products of four unsigned bytes with four signed ones, for 16 lanes of int32.

        Codes must not exceed `MAX_CODE`.
        """
        if TARGET.level == "avx512":
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", self.I32V, acc, codes.bits(self.U8), x.bits(self.U8))
        return self._by_parts(self._dot4_part, self.I32V, acc, codes.bits(self.I32V), x.bits(self.I32V))

    def dot4_signed(self, acc: Value, levels: Value, x: Value) -> Value:
        """Like `dot4` with signed bytes -128 … 127 on the left, for machines whose `MAX_CODE` is 127."""
        return self._by_parts(self._dot4_signed_part, self.I32V, acc, levels.bits(self.I32V), x.bits(self.I32V))

    def dot2_bf16(self, acc: Value, a: Value, b: Value) -> Value:
        """acc + the dot products of two bfloat16 with two, for 16 lanes of float32."""
        if TARGET.bf16:
            pairs = self.BF16_PAIRS
            return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", self.F32, acc, a.bits(pairs), b.bits(pairs))
        (a0, a1), (b0, b1) = self.split_bf16(a), self.split_bf16(b)
        return self.fma(a1, b1, self.fma(a0, b0, acc))

    def split_bf16(self, pairs: Value) -> tuple[Value, Value]:
        """The even and the odd elements of 16 bfloat16 pairs, as float32 (exact)."""
        word = pairs.bits(self.I32V)
        return (word << 16).bits(self.F32), (word & -65536).bits(self.F32)

    def from_f16(self, bits: Value) -> Value:
        """16 float16, given as int16, to float32 (exact)."""
        if TARGET.level != "plain":
            return bits.bits(self.F16).to(self.F32)
        word = bits.zero_extend(self.I32V)
        magnitude = word & 0x7FFF
        # Moved to float32's place, exponents are 112 too small; multiplying mends denormals as well.
        value = ((magnitude << 13).bits(self.F32) * 2.0**112).bits(self.I32V)
        special = magnitude.compare(">=", 0x7C00).where((magnitude << 13) | 0x7F800000, value)
        return (special | ((word & 0x8000) << 16)).bits(self.F32)

    def to_f16(self, x: Value) -> Value:
        """16 float32 rounded to float16, ties to even, as int16.  Too large ones become infinite."""
        if TARGET.level != "plain":
            return x.to(self.F16).bits(self.I16V)
        word = x.bits(self.I32V)
        magnitude = word & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
        # Adding 1/2 lines a denormal's last bit up with the sum's, so that the addition rounds it.
        tiny = (magnitude.bits(self.F32) + 0.5).bits(self.I32V) - (126 << 23)
        half = magnitude.compare("<", 113 << 23).where(tiny, normal)
        infinite = magnitude.compare(">", 255 << 23).where(
            self.constant(0x7E00, self.I32V), self.constant(0x7C00, self.I32V)
        )
        half = magnitude.compare(">=", 143 << 23).where(infinite, half)
        return (half | ((word >> 16) & 0x8000)).to(self.I16V)

    def to_bf16(self, x: Value) -> Value:
        """16 float32 rounded to bfloat16, ties to even, as int16.  NaN is not kept."""
        if TARGET.bf16:
            half = _vector(_BFloat(), 16)
            return self.intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", half, x).bits(self.I16V)
        word = x.bits(self.I32V)
        return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(self.I16V)

    def round_bf16(self, x: Value) -> Value:
        """One float32 rounded to bfloat16, ties to even, in the low half of an int32."""
        word = x.bits(self.I32)
        return (word + 0x7FFF + ((word >> 16) & 1)) >> 16

    def _by_parts(self, part: Callable[..., Value], type_: ir.VectorType, *args: Value) -> Value:
        """Apply an operation to registers of the machine's own size and join the results."""
        parts = {"avx2": 2, "neon": 4}.get(TARGET.level, 1)
        results = []
        for i in range(parts):
            pieces = []
            for arg in args:
                size = arg.type.count // parts
                pieces.append(arg.lanes(*range(i * size, (i + 1) * size)))
            results.append(part(*pieces))
        while len(results) > 1:
            results = [low.joined(high) for low, high in zip(results[::2], results[1::2], strict=True)]
        return results[0]

    def _lookup_part(self, table: Value, index: Value) -> Value:
        if TARGET.level == "avx2":
            return self.intrinsic("llvm.x86.avx2.pshuf.b", _vector(_I8, 32), table, index)
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.tbl1.v16i8", _vector(_I8, 16), table, index)
        result = self.constant(0, index.type)
        for i in range(16):
            found = index.compare("==", i)
            result = found.where(table.lanes(*[i] * index.type.count), result)
        return result

    def _dot4_part(self, acc: Value, codes: Value, x: Value) -> Value:
        if TARGET.level == "avx2" and TARGET.vnni:
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.256", acc.type, acc, *_bytes(codes, x))
        if TARGET.level == "avx2":
            pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", _vector(_I16, 16), *_bytes(codes, x))
            return acc + self._add_pairs(pairs)
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, *_bytes(codes, x))
        return _dot4_plain(acc, codes, x, signed=False)

    def _dot4_signed_part(self, acc: Value, levels: Value, x: Value) -> Value:
        if TARGET.level == "avx2":  # |level| ≤ 128 and |x| ≤ 127, so a pair stays below 2**15
            magnitude = self.intrinsic("llvm.abs.v32i8", _vector(_I8, 32), *_bytes(levels), self.constant(0, _I1))
            signed = self.intrinsic("llvm.x86.avx2.psign.b", _vector(_I8, 32), *_bytes(x, levels))
            pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", _vector(_I16, 16), magnitude, signed)
            return acc + self._add_pairs(pairs)
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, *_bytes(levels, x))
        return _dot4_plain(acc, levels, x, signed=True)

    def _add_pairs(self, pairs: Value) -> Value:
        return self.intrinsic("llvm.x86.avx2.pmadd.wd", _vector(_I32, 8), pairs, self.constant(1, pairs.type))


_I1 = ir.IntType(1)
# The largest left byte that `dot4` takes: without VNNI, AVX2 saturates sums of two products; NEON's bytes are signed.
MAX_CODE = 127 if TARGET.level == "neon" or (TARGET.level == "avx2" and not TARGET.vnni) else 255

# 2**f on [-1/2, 1/2], highest power first: least squares on the relative error, reweighted until its peaks are level
_EXP2 = {
    4: (9.57010143e-3, 5.59178603e-2, 2.40247448e-1, 6.93121815e-1, 9.99999261e-1),
    5: (1.32764715e-3, 9.67554133e-3, 5.55071327e-2, 2.40221197e-1, 6.93146967e-1, 1.00000007),
}


def _bytes(*words: Value) -> tuple[Value, ...]:
    """Vectors of 32-bit words as vectors of bytes."""
    return tuple(word.bits(_vector(_I8, 4 * word.type.count)) for word in words)


def _dot4_plain(acc: Value, left: Value, x: Value, signed: bool) -> Value:
    """Four bytes a lane by shifts and multiplications, on any machine."""
    for i in range(4):
        a = (left << (24 - 8 * i)).shift_signed(24) if signed else (left >> (8 * i)) & 255
        acc = acc + a * (x << (24 - 8 * i)).shift_signed(24)
    return acc


def micro_kernel(body: Callable[..., None]) -> Any:
    """Make a function over an `Emitter` callable from Numba code, with one tuple of arguments.

    Arrays arrive as a `Pointer` to their first element, numbers as a `Value`.  Nothing is returned: results go to
    memory.
    """

    @intrinsic  # type: ignore[misc]
    def call(typing_context: Any, args: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            emitter = Emitter(builder)
            unpacked: list[Value | Pointer] = []
            for i, type_ in enumerate(args.types):
                value = builder.extract_value(values[0], i)
                if isinstance(type_, types.Array):
                    data = context.make_array(type_)(context, builder, value).data
                    unpacked.append(Pointer(emitter, builder.bitcast(data, _I8.as_pointer())))
                else:
                    unpacked.append(Value(emitter, value))
            body(emitter, *unpacked)
            return context.get_dummy_value()

        return types.void(args), codegen

    return call
