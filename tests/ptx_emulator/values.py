"""Readers and writers: how an instruction gets at the numbers in its operands.

A register is an array of unsigned integers of its width (predicates: bool), with one element per thread, or a single
element if it is the same for all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx_emulator.parser import TYPES, Imm, Instruction, Mem, Param, PTXError, Reg, Special, Type

Array = np.ndarray
Function = Callable[..., Array]
Machine = Any  # machine.Machine, which imports this file
UNSIGNED = {1: np.dtype(bool)} | {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
PRED, U32, U64 = TYPES["pred"], TYPES["u32"], TYPES["u64"]


def from_bits(bits: Array, type_: Type) -> Array:
    """The numbers in a register; packed pairs get a second axis of length 2, low half first."""
    bits = bits.astype(UNSIGNED[type_.bits], copy=False)
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


def reader(operand: Any, type_: Type) -> Callable[[Machine], Array]:
    """A function that gives an operand's numbers."""
    if isinstance(operand, Imm):
        value = from_bits(np.array([operand.value % (1 << 64)], np.uint64), type_)
        return lambda machine: value
    if isinstance(operand, Special):
        return lambda machine: machine.special(operand.name).astype(type_.dtype)
    if isinstance(operand, Param):
        return lambda machine: from_bits(machine.params[operand.name], type_)
    check(operand, type_)
    number, dtype = operand.number, type_.dtype
    if operand.negated:
        return lambda machine: ~machine.registers[number]
    if type_.bits == operand.width and type_.kind != "bf16" and type_.lanes == 1:
        return lambda machine: machine.registers[number].view(dtype)
    return lambda machine: from_bits(machine.registers[number], type_)


def writer(operand: Any, type_: Type) -> Callable[[Machine, Array], None]:
    """A function that puts numbers into a register of the active threads; None for an operand drops them."""
    if operand is None:
        return lambda machine, values: None
    check(operand, type_)
    return lambda machine, values: machine.write(operand, to_bits(values, type_, operand.width))


def check(operand: Any, type_: Type) -> None:
    """Raise unless an operand is a register that can hold the type."""
    if not isinstance(operand, Reg):
        raise PTXError(f"a register is needed, not {operand}")
    if (type_.kind == "pred") != (operand.width == 1) or type_.bits > operand.width:
        raise PTXError(f"a register of {operand.width} bits is used as .{type_.name}")


def address_reader(operand: Any) -> Callable[[Machine], Array]:
    """Reads [base + offset] as uint64."""
    if not isinstance(operand, Mem):
        raise PTXError(f"an address is needed, not {operand}")
    base = reader(operand.base, TYPES[f"u{operand.base.width}"] if isinstance(operand.base, Reg) else U64)
    offset = np.uint64(operand.offset % (1 << 64))
    return lambda machine: base(machine).astype(np.uint64, copy=False) + offset


def pure(made: Instruction, result: Type, sources: list[Type], function: Function) -> None:
    """Decode an instruction that computes its first operand from the others."""
    put = writer(made.operands[0], result)
    get = [reader(operand, type_) for operand, type_ in zip(made.operands[1:], sources, strict=True)]
    made.run = lambda machine: put(machine, function(*[one(machine) for one in get]))
