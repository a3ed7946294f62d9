"""Integer and bit instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx_emulator.parser import Instruction, PTXError
from tests.ptx_emulator.values import TYPES, U32, UNSIGNED, Array, Type, pure


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.itemsize < 8:
        double = np.dtype(f"{a.dtype.kind}{a.itemsize * 2}")
        return (a.astype(double) * b.astype(double) >> double.type(a.itemsize * 8)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def shift(a: Array, amount: Array, left: bool) -> Array:
    """Shift by an unsigned 32-bit amount; amounts past the width count as the width."""
    amount = np.minimum(amount, np.uint32(a.itemsize * 8)).astype(a.dtype)
    return np.left_shift(a, amount) if left else np.right_shift(a, amount)


def split_bytes(a: Array, dtype: Any) -> Array:
    """Numbers as rows of smaller ones, the lowest first."""
    return np.ascontiguousarray(a).view(dtype).reshape(len(a), -1)


def count_ones(a: Array) -> Array:
    return np.unpackbits(split_bytes(a, np.uint8), axis=1).sum(1, dtype=np.uint32)


def highest_one(a: Array) -> Array:
    """The position of the highest set bit, all ones if there is none."""
    bits = np.unpackbits(split_bytes(a, np.uint8), axis=1, bitorder="little")[:, ::-1]
    return np.where(a == 0, -1, a.itemsize * 8 - 1 - np.argmax(bits, axis=1)).astype(np.uint32)


def reverse_bits(a: Array) -> Array:
    bits = np.unpackbits(split_bytes(a, np.uint8), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)


def find_highest(a: Array, shift_amount: bool) -> Array:
    """bfind: the highest bit that differs from the sign; with .shiftamt the shift that brings it to the top."""
    found = highest_one(np.where(a < 0, ~a, a).view(UNSIGNED[a.itemsize * 8]))
    return np.where(found == 0xFFFFFFFF, found, np.uint32(a.itemsize * 8 - 1) - found) if shift_amount else found


def extract_field(a: Array, start: Array, length: Array) -> Array:
    """bfe: length bits from start on; bits past the end are the sign, or 0."""
    bits = np.uint32(a.itemsize * 8)
    start, length = np.minimum(start & np.uint32(255), bits), length & np.uint32(255)
    above = bits - np.minimum(start + length, bits)
    field = shift(shift(a, above, True), above + start, False)
    beyond = shift(a, bits, False)
    return np.where(length == 0, a.dtype.type(0), np.where(start == bits, beyond, field))


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: b with length bits of it, from start on, replaced by the low bits of a."""
    start, length = start & np.uint32(255), length & np.uint32(255)
    field = shift(~shift(np.full_like(a, np.iinfo(a.dtype).max), length, True), start, True)
    return b & ~field | shift(a, start, True) & field


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of (b, a), or its sign spread over it."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(1, np.uint32)
    for index in range(4):
        nibble = selector >> np.uint32(4 * index)
        byte = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * index)
    return result


def funnel(a: Array, b: Array, amount: Array, mods: list[str]) -> Array:
    """shf: shift the 64 bits (b, a); the upper half of the result for .l, the lower for .r."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    amount = np.minimum(amount, np.uint32(32)) if "clamp" in mods else amount & np.uint32(31)
    both = shift(both, amount, "l" in mods)
    return (both >> np.uint64(32) if "l" in mods else both).astype(np.uint32)


def dot_product(made: Instruction) -> None:
    """dp4a: c plus the dot product of four bytes."""
    signs = [name[0].replace("s", "i") for name in made.types]
    result = TYPES["s32" if "i" in signs else "u32"]

    def run(a: Array, b: Array, c: Array) -> Array:
        return c + (split_bytes(a, f"{signs[0]}1").astype(np.int64) * split_bytes(b, f"{signs[1]}1")).sum(1)

    pure(made, result, [U32, U32, result], run)


def multiply(made: Instruction, type_: Type) -> None:
    """mul and mad: .lo, .hi or .wide; mad adds its last operand."""
    wide = "wide" in made.mods
    result = TYPES[f"{type_.name[0]}{type_.bits * 2}"] if wide else type_

    def product(a: Array, b: Array) -> Array:
        if wide:
            return a.astype(result.dtype) * b.astype(result.dtype)
        return multiply_high(a, b) if "hi" in made.mods else a * b

    if made.op == "mul":
        pure(made, result, [type_, type_], product)
    else:
        pure(made, result, [type_, type_, result], lambda a, b, c: product(a, b) + c)


# Instructions on numbers of one type.  Division by zero, which PTX leaves open, gives 0.
SAME: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "rem": np.fmod, "neg": np.negative,
    "abs": np.abs, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "div": lambda a, b: (a - np.fmod(a, b)) // b, "brev": reverse_bits,
}  # fmt: skip


def decode(made: Instruction) -> bool:
    """Decode an integer instruction; False if it is none."""
    op = made.op
    if not made.types or TYPES[made.types[-1]].kind not in ("int", "pred"):
        return False
    type_ = TYPES[made.types[-1]]
    # what takes operands of several types: the result, the sources, the function
    mixed: dict[str, tuple[Type, list[Type], Callable[..., Array]]] = {
        "shl": (type_, [type_, U32], lambda a, amount: shift(a, amount, True)),
        "shr": (type_, [type_, U32], lambda a, amount: shift(a, amount, False)),
        "shf": (type_, [type_, type_, U32], lambda a, b, amount: funnel(a, b, amount, made.mods)),
        "popc": (U32, [type_], count_ones),
        "clz": (U32, [type_], lambda a: np.uint32(type_.bits - 1) - highest_one(a)),
        "bfind": (U32, [type_], lambda a: find_highest(a, "shiftamt" in made.mods)),
        "bfe": (type_, [type_, U32, U32], extract_field),
        "bfi": (type_, [type_, type_, U32, U32], insert_field),
        "prmt": (type_, [type_, type_, U32], permute),
    }
    if {"relu", "sat", "cc"} & {*made.mods} or (op == "prmt" and len(made.mods) > 1):
        raise PTXError("this form is not supported")
    if op == "dp4a":
        dot_product(made)
    elif op in ("mul", "mad"):
        multiply(made, type_)
    elif op in mixed:
        pure(made, *mixed[op])
    elif op in SAME:
        pure(made, type_, [type_] * (len(made.operands) - 1), SAME[op])
    else:
        return False
    return True
