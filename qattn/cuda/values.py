"""Numbers as memory has them, to float32 and back: what kernels that make or read values share.

float32 results keep subnormal numbers, and products are not joined with sums, so that their bits are those of the CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qattn.cuda import ptx
from qattn.cuda.kernel import device

KINDS = {"float32": "f32", "float16": "f16", "uint16": "bf16"}
"""What an output of this dtype holds."""
ELEMENTS = {"f32": "f32*", "f16": "u16*", "bf16": "u16*", "f64": "f64*"}
"""A pointer to such numbers in a kernel's signature."""


@functools.cache
def store_for(kind: str) -> Any:
    """store(out, at, low, high): twice four float32, narrowed, to out[at : at + 8], 16 bytes at a time."""
    pack = ptx.pack_bf16 if kind == "bf16" else ptx.pack_f16

    @device
    def halves(out, at, low, high):
        a, b, c, d = low
        e, f, g, h = high
        ptx.store_16(out, at, pack(a, b), pack(c, d), pack(e, f), pack(g, h))

    @device
    def words(out, at, low, high):
        store_four(out, at, low)
        store_four(out, at + 4, high)

    return words if kind == "f32" else halves


@device
def load_four(x, at):
    """Four neighbouring float32, of which the first is aligned to 16 bytes."""
    a, b, c, d = ptx.load_16(x, at)
    return ptx.float_of(a), ptx.float_of(b), ptx.float_of(c), ptx.float_of(d)


@device
def store_four(out, at, values):
    """out[at : at + 4] = four float32."""
    a, b, c, d = values
    ptx.store_16(out, at, ptx.bits_of(a), ptx.bits_of(b), ptx.bits_of(c), ptx.bits_of(d))


@functools.cache
def narrow_for(kind: str) -> Any:
    """A float32 as an element of the output."""

    @device
    def same(x):
        return x

    @device
    def f16(x):
        return ptx.f32_to_f16(x)

    @device
    def bf16(x):
        return np.uint16(ptx.pack_bf16(x, np.float32(0)) & 0xFFFF)

    @device
    def f8(x):
        word = ptx.bits_of(x)
        magnitude = np.uint32(word & 0x7FFF_FFFF)
        code = np.uint32((magnitude - (120 << 23) + 0x7_FFFF + (magnitude >> 20 & 1)) >> 20)
        if magnitude < 121 << 23:  # 2**14 lines a subnormal's last bit, 2**-9, up with the sum's, which rounds it
            code = np.uint32(ptx.bits_of(ptx.add(ptx.float_of(magnitude), np.float32(2.0**14))) - (141 << 23))
        return np.uint8(min(code, np.uint32(0x7E)) | (word >> 24 & 0x80))

    return {"f32": same, "f16": f16, "bf16": bf16, "f8": f8}[kind]


@functools.cache
def widen_for(kind: str) -> Any:
    """A float of an array, or the bits of a scale, as a float32."""

    @device
    def f16(x):
        return ptx.f16_to_f32(np.uint16(x))

    @device
    def bf16(x):
        return ptx.float_of(np.uint32(x) << 16)

    @device
    def f32(x):
        return np.float32(x)

    @device
    def f64(x):
        return ptx.f64_to_f32(x)

    @device
    def f8(bits):
        half = (int(bits) & 0x80) << 8 | (int(bits) & 0x7F) << 7  # float16's fields; exponents are 8 too small
        return ptx.multiply(ptx.f16_to_f32(np.uint16(half)), np.float32(256))

    @device
    def e8m0(bits):
        if bits < 2:  # 2**(bits - 128) is subnormal
            return ptx.float_of(np.uint32(1 << 21) << np.uint32(bits))
        return ptx.float_of(np.uint32(bits - 1) << np.uint32(23))

    @device
    def ue4m3(bits):
        # a float16 has the same fields, with three bits more of mantissa, and a bias of 15 instead of 7
        value = ptx.multiply(ptx.f16_to_f32(np.uint16((bits & 127) << 7)), np.float32(128))
        return value if bits != 127 else np.float32(0)

    return {"f16": f16, "bf16": bf16, "f32": f32, "f64": f64, "f8": f8, "e8m0": e8m0, "ue4m3": ue4m3}[kind]


def key(*parts: str) -> str:
    """What a kernel was generated for, as a part of its name."""
    return "_".join(filter(None, parts)).replace("-", "_")


@functools.cache
def load_four_of(base: str) -> Any:
    """load(array, at): four float32 of an array of `base` that nobody writes meanwhile; `at` is a multiple of 4."""
    widen, is_wide = widen_for(base), base == "f32"

    @device
    def load(array, at):
        if is_wide:
            a, b, c, d = ptx.load_16_constant(array, at)
            return ptx.float_of(a), ptx.float_of(b), ptx.float_of(c), ptx.float_of(d)
        a, b = ptx.load_8_constant(array, at)
        return widen(a & 0xFFFF), widen(a >> 16), widen(b & 0xFFFF), widen(b >> 16)

    return load
