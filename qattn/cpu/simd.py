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
machines), and offsets are in bytes.  Values and what all machines have are in `qattn.cpu.language`.  This file, and
`qattn.cpu.amx` for tile registers, alone know instruction sets: operations take the instruction that the target has,
and fall back to plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from qattn.cpu.language import LANES as LANES
from qattn.cpu.language import BFloat, Language, vector
from qattn.cpu.language import Pointer as Pointer
from qattn.cpu.language import Value as Value
from qattn.cpu.target import TARGET

_I1, _I8, _I16, _I32 = (ir.IntType(bits) for bits in (1, 8, 16, 32))


class Emitter(Language):
    """Appends instructions to the function that Numba is compiling, as its target has them."""

    def settled(self, values: list[Value]) -> list[Value]:
        """The same vectors, once they are computed: what follows stays behind.

        Where registers are few, LLVM would compute all that a row is multiplied by, spill it, and go row by row.
        """
        if TARGET.level != "avx2":
            return values
        halves = [v.lanes(*range(i, i + v.type.count // 2)) for v in values for i in (0, v.type.count // 2)]
        result = ir.LiteralStructType([half.type for half in halves])
        constraint = ",".join(["=x"] * len(halves) + [str(i) for i in range(len(halves))])
        asm = ir.InlineAsm(ir.FunctionType(result, list(result.elements)), "", constraint, side_effect=True)
        both = self.builder.call(asm, [half.ir for half in halves])
        halves = [Value(self, self.builder.extract_value(both, i)) for i in range(len(halves))]
        return [low.joined(high) for low, high in zip(halves[::2], halves[1::2], strict=True)]

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
        if PAIRS:
            return self.add_pairs(acc, self.pair_products(codes, x))
        return self._by_parts(self._dot4_part, self.I32V, acc, codes.bits(self.I32V), x.bits(self.I32V))

    def pair_products(self, codes: Value, x: Value) -> Value:
        """Products of 64 unsigned bytes and signed ones, two of them added: 32 int16.  For machines with `PAIRS`."""
        return self._by_parts(self._pair_products_part, vector(_I16, 32), codes.bits(self.U8), x.bits(self.U8))

    def add_pairs(self, acc: Value, pairs: Value) -> Value:
        """acc + two of 32 int16 added, for 16 lanes of int32."""
        return acc + self._by_parts(self._add_pairs_part, self.I32V, pairs)

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
            half = vector(BFloat(), 16)
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
            return self.intrinsic("llvm.x86.avx2.pshuf.b", vector(_I8, 32), table, index)
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.tbl1.v16i8", vector(_I8, 16), table, index)
        result = self.constant(0, index.type)
        for i in range(16):
            found = index.compare("==", i)
            result = found.where(table.lanes(*[i] * index.type.count), result)
        return result

    def _dot4_part(self, acc: Value, codes: Value, x: Value) -> Value:
        if TARGET.level == "avx2":
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.256", acc.type, acc, *_bytes(codes, x))
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, *_bytes(codes, x))
        return _dot4_plain(acc, codes, x, signed=False)

    def _dot4_signed_part(self, acc: Value, levels: Value, x: Value) -> Value:
        if TARGET.level == "avx2":  # |level| ≤ 128 and |x| ≤ 127, so a pair stays below 2**15
            magnitude = self.intrinsic("llvm.abs.v32i8", vector(_I8, 32), *_bytes(levels), self.constant(0, _I1))
            signed = self.intrinsic("llvm.x86.avx2.psign.b", vector(_I8, 32), *_bytes(x, levels))
            return acc + self._add_pairs_part(self._pair_products_part(magnitude, signed))
        if TARGET.level == "neon":
            return self.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, *_bytes(levels, x))
        return _dot4_plain(acc, levels, x, signed=True)

    def _pair_products_part(self, codes: Value, x: Value) -> Value:
        return self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", vector(_I16, 16), codes, x)

    def _add_pairs_part(self, pairs: Value) -> Value:
        return self.intrinsic("llvm.x86.avx2.pmadd.wd", vector(_I32, 8), pairs, self.constant(1, pairs.type))


PAIRS = TARGET.level == "avx2" and not TARGET.vnni  # products of bytes are added two by two, as saturated int16
MAX_CODE = 127 if PAIRS or TARGET.level == "neon" else 255  # the largest left byte of `dot4`; NEON's are signed

# 2**f on [-1/2, 1/2], highest power first: least squares on the relative error, reweighted until its peaks are level
_EXP2 = {
    4: (9.57010143e-3, 5.59178603e-2, 2.40247448e-1, 6.93121815e-1, 9.99999261e-1),
    5: (1.32764715e-3, 9.67554133e-3, 5.55071327e-2, 2.40221197e-1, 6.93146967e-1, 1.00000007),
}


def _bytes(*words: Value) -> tuple[Value, ...]:
    """Vectors of 32-bit words as vectors of bytes."""
    return tuple(word.bits(vector(_I8, 4 * word.type.count)) for word in words)


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
