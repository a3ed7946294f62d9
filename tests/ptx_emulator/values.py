"""PTX types, and readers and writers: how an instruction gets at the numbers in its operands.

A register is an array of unsigned integers of its width (predicates: bool), with one element per thread, or a single
element if it is the same for all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx_emulator.parser import BITS, Imm, Instruction, Mem, PTXError, Reg, Special, Vec

Array = np.ndarray
Machine = Any  # machine.Machine, which imports this file
UNSIGNED = {1: np.dtype(bool)} | {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}


class Type(NamedTuple):
    """A fundamental type.  kind is "int", "float", "bf16" or "pred"; lanes is 2 for packed pairs."""

    name: str
    kind: str
    bits: int
    dtype: np.dtype
    lanes: int = 1


def make_type(name: str, bits: int) -> Type:
    """The type of a name: a letter and the bits."""
    if name.startswith("bf16"):
        return Type(name, "bf16", bits, np.dtype(np.float32), bits // 16)
    if name[0] == "f":
        return Type(
            name, "float", bits, np.dtype(np.float16 if "16" in name else f"f{bits // 8}"), 1 + name.endswith("x2")
        )
    return Type(
        name, "int" if bits > 1 else "pred", bits, np.dtype(f"i{bits // 8}") if name[0] == "s" else UNSIGNED[bits]
    )


TYPES = {name: make_type(name, bits) for name, bits in BITS.items()}
PRED, U32, U64 = TYPES["pred"], TYPES["u32"], TYPES["u64"]


def from_bits(bits: Array, type_: Type) -> Array:
    """The numbers in a register; packed pairs get a second axis of length 2, low half first."""
    if type_.kind == "pred":
        return bits
    if bits.itemsize * 8 != type_.bits:
        bits = bits.astype(UNSIGNED[type_.bits])
    if type_.kind == "bf16":
        bits = bits.view(np.uint16).astype(np.uint32) << np.uint32(16)
    values = bits.view(type_.dtype)
    return values if type_.lanes == 1 else values.reshape(-1, 2)


def to_bits(values: Array, type_: Type, width: int) -> Array:
    """The bits of numbers, as a register of this width holds them: sign-extended if the type is signed."""
    values = bf16_bits(values) if type_.kind == "bf16" else values.astype(type_.dtype, copy=False)
    if type_.lanes == 2:
        values = np.ascontiguousarray(values).reshape(-1)
    if width == type_.bits:
        return values.view(UNSIGNED[width])
    signed = values.dtype.kind == "i"
    return (values if signed else values.view(UNSIGNED[type_.bits])).astype(UNSIGNED[width])


def bf16_bits(values: Array) -> Array:
    """Float32 rounded to bfloat16, to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def constant(value: int | float, type_: Type) -> Array:
    """An immediate operand: one element for all threads."""
    if isinstance(value, float):
        size = 64 if type_.bits == 64 else 32
        return from_bits(np.array([value], f"f{size // 8}").view(UNSIGNED[size]), type_)
    return from_bits(np.array([value & (1 << type_.bits) - 1], np.uint64).astype(UNSIGNED[type_.bits]), type_)


def reader(operand: Any, type_: Type) -> Callable[[Machine], Array]:
    """A function that gives an operand's numbers."""
    if isinstance(operand, Imm):
        value = constant(operand.value, type_)
        return lambda machine: value
    if isinstance(operand, Special):
        return lambda machine: machine.special(operand.name).astype(type_.dtype)
    if isinstance(operand, Vec):
        return packer(operand, type_)
    check(operand, type_)
    number, negated, dtype = operand.number, operand.negated, type_.dtype
    if type_.kind == "pred":
        return lambda machine: ~machine.registers[number] if negated else machine.registers[number]
    if type_.bits == operand.width and type_.kind != "bf16" and type_.lanes == 1:
        return lambda machine: machine.registers[number].view(dtype)
    return lambda machine: from_bits(machine.registers[number], type_)


def writer(operand: Any, type_: Type) -> Callable[[Machine, Array], None]:
    """A function that puts numbers into a register of the active threads."""
    if operand is None:
        return lambda machine, values: None
    if isinstance(operand, Vec):
        return unpacker(operand, type_)
    check(operand, type_)
    return lambda machine, values: machine.write(operand.number, to_bits(values, type_, operand.width))


def check(operand: Any, type_: Type) -> None:
    """Raise unless an operand is a register that can hold the type."""
    if not isinstance(operand, Reg):
        raise PTXError(f"a register is needed, not {operand}")
    if (type_.kind == "pred") != (operand.width == 1) or type_.bits > operand.width:
        raise PTXError(f"a register of {operand.width} bits is used as .{type_.name}")


def packer(operand: Vec, type_: Type) -> Callable[[Machine], Array]:
    """Reads {a, b, …} as one number, a in the lowest bits."""
    each, whole = type_.bits // len(operand.items), UNSIGNED[type_.bits]
    parts = [reader(item, TYPES[f"u{each}"]) for item in operand.items]

    def read(machine: Machine) -> Array:
        bits = np.zeros(1, whole)
        for index, part in enumerate(parts):
            bits = bits | part(machine).astype(whole) << whole.type(index * each)
        return from_bits(bits, type_)

    return read


def unpacker(operand: Vec, type_: Type) -> Callable[[Machine, Array], None]:
    """Writes the parts of a number to {a, b, …}, the lowest bits to a."""
    each, whole = type_.bits // len(operand.items), UNSIGNED[type_.bits]
    parts = [writer(item, TYPES[f"u{each}"]) for item in operand.items]

    def write(machine: Machine, values: Array) -> None:
        for index, part in enumerate(parts):
            part(machine, to_bits(values, type_, type_.bits) >> whole.type(index * each))

    return write


def address_reader(operand: Any) -> Callable[[Machine], Array]:
    """Reads [base + offset] as uint64."""
    if not isinstance(operand, Mem) or not isinstance(operand.base, (Reg, Imm)):
        raise PTXError(f"cannot read the address {operand}")
    base = reader(operand.base, TYPES[f"u{operand.base.width}"] if isinstance(operand.base, Reg) else U64)
    offset = constant(operand.offset, U64)
    return lambda machine: base(machine).astype(np.uint64, copy=False) + offset


def values_of(operand: Any, type_: Type, count: int, make: Callable[[Any, Type], Any]) -> list[Any]:
    """Readers or writers of the count values of a vector operand, or of the only one."""
    items = operand.items if isinstance(operand, Vec) else (operand,)
    if len(items) != count:
        raise PTXError(f"{count} operands are needed, there are {len(items)}")
    return [make(item, type_) for item in items]


def pure(made: Instruction, result: Type, sources: list[Type], function: Callable[..., Array]) -> None:
    """Decode an instruction that computes its first operand from the others."""
    if len(made.operands) != len(sources) + 1:
        raise PTXError(f"{len(sources) + 1} operands are needed, there are {len(made.operands)}")
    put = writer(made.operands[0], result)
    get = [reader(operand, type_) for operand, type_ in zip(made.operands[1:], sources, strict=True)]
    made.run = lambda machine: put(machine, function(*[one(machine) for one in get]))
