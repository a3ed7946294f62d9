"""Instructions in which the threads of a warp, or of a block, work together, and control."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx_emulator.parser import Imm, Instruction, PTXError, Type, items_of
from tests.ptx_emulator.values import PRED, U32, Array, Function, Machine, address_reader, from_bits, reader, writer

ALL_LANES = reader(Imm(-1), U32)
MOVES: dict[str, Function] = {
    "up": lambda lane, offset, segment: lane - offset, "down": lambda lane, offset, segment: lane + offset,
    "bfly": lambda lane, offset, segment: lane ^ offset,
    "idx": lambda lane, offset, segment: lane & segment | offset & ~segment,
}  # fmt: skip


def shuffle(made: Instruction) -> None:
    """shfl.sync d|p, a, b, c, members: d is a of another lane, or the own one where p is false.

    c holds the clamp in its low 5 bits and the segment mask in bits 8 to 12.
    """
    made.kind, mode = "warp", made.mods[1]
    first, second = (*items_of(made.operands[0]), None)[:2]
    put, put_pred = writer(first, U32), writer(second, PRED)
    value, b, c, made.members = (reader(operand, U32) for operand in made.operands[1:5])

    def run(machine: Machine) -> None:
        lane = machine.lane_of.astype(np.int64)
        offset, control = b(machine).astype(np.int64) & 31, c(machine).astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        limit = (lane & segment) | (clamp & ~segment)
        moved = MOVES[mode](lane, offset, segment)
        inside = moved >= limit if mode == "up" else moved <= limit
        source = np.where(inside, moved, lane)
        wanted = np.minimum(machine.all_threads - lane + source, machine.count - 1)
        active = np.zeros(machine.count, bool)
        active[machine.threads] = True
        bad = active & ~(active[wanted] & (machine.warp_of[wanted] == machine.warp_of))
        if bad.any():
            first = int(np.argmax(bad))
            raise PTXError(f"{machine.name_of(first)} reads lane {int(source[first])}, which doesn't take part")
        put(machine, np.broadcast_to(value(machine), machine.count)[wanted])
        put_pred(machine, inside)

    made.run = run


def vote(made: Instruction) -> None:
    """vote.sync.all, any and ballot."""
    made.kind, mode = "warp", made.mods[1]
    put = writer(made.operands[0], U32 if mode == "ballot" else PRED)
    holds, made.members = reader(made.operands[1], PRED), reader(made.operands[2], U32)

    def run(machine: Machine) -> None:
        members = made.members(machine)
        bits = machine.warp_bits(np.broadcast_to(holds(machine), machine.count))[machine.warp_of] & members
        put(machine, {"ballot": bits, "all": bits == members, "any": bits != 0}[mode])

    made.run = run


def active_mask(made: Instruction) -> None:
    """activemask: the lanes of the warp that run this instruction together."""
    put = writer(made.operands[0], U32)
    made.run = lambda machine: put(machine, machine.warp_bits(machine.mask)[machine.warp_of])


def numbers(machine: Machine, registers: list[Array], type_: Type) -> Array:
    """The numbers in registers of a fragment: (warps, 32 lanes, registers, numbers in one register), float64."""
    if machine.size % 32:
        raise PTXError("mma needs blocks of whole warps")
    bits = np.stack([np.broadcast_to(register, machine.count).reshape(-1, 32) for register in registers], -1)
    split = bits.view(f"u{type_.bits // 8}").reshape(-1)
    return from_bits(split, type_).astype(np.float64).reshape(*bits.shape, -1)


def matrices(a: Array, b: Array) -> tuple[Array, Array]:
    """A (warps, 16, k) and B (warps, k, 8) from their fragments.

    With g = lane // 4, t = lane % 4 and e numbers in a register, number j of register i is
    A[g + 8 (i % 2), e t + j + 4 e (i // 2)] and B[e t + j + 4 e i, g].
    """
    warps, _, count, each = b.shape
    g, t = (lane[:, None, None] for lane in np.divmod(np.arange(32), 4))
    i, j = np.arange(2 * count)[:, None], np.arange(each)
    whole_a, whole_b = np.empty((warps, 16, 4 * each * count)), np.empty((warps, 4 * each * count, 8))
    whole_a[:, g + 8 * (i % 2), each * t + j + 4 * each * (i // 2)] = a
    whole_b[:, each * t + j + 4 * each * i[:count], g + 0 * j] = b
    return whole_a, whole_b


def multiply_matrices(made: Instruction) -> None:
    """mma.sync.m16n8kK: D = A B + C.  Floats: the products and the sum are computed in float64 and rounded once."""
    result, *types, accumulator = made.types
    bits = types[0].bits
    depth = int(made.mods[2].removeprefix("m16n8k"))
    if depth * bits not in (128, 256) or types[1].bits != bits or result is not accumulator or result.bits != 32:
        raise PTXError("mma of this shape and these types is not supported")
    put = [writer(item, result) for item in made.operands[0]]
    add = [reader(item, result) for item in made.operands[3]]
    fragments = [[reader(item, U32) for item in operand] for operand in made.operands[1:3]]
    exact = np.int64 if result.kind == "int" else np.float64  # integers wrap
    made.kind, made.members = "warp", ALL_LANES

    def run(machine: Machine) -> None:
        a, b = (
            numbers(machine, [one(machine) for one in get], type_) for get, type_ in zip(fragments, types, strict=True)
        )
        product = np.matmul(*matrices(a, b)).reshape(-1, 2, 8, 4, 2)  # warp, upper half, g, t, column
        for index, (one, c) in enumerate(zip(put, add, strict=True)):
            part = product[:, index // 2, :, :, index % 2].reshape(-1)
            one(machine, (part + c(machine)).astype(exact))

    made.run = run


def load_matrix(made: Instruction) -> None:
    """ldmatrix: 8x8 matrices of 16-bit numbers; row r of matrix i lies at the address of lane 8 i + r."""
    if not {"m8n8", "shared"} <= {*made.mods}:
        raise PTXError("this form is not supported")
    put, address = [writer(item, U32) for item in made.operands[0]], address_reader(made.operands[1])
    made.kind, made.members, transposed = "warp", ALL_LANES, "trans" in made.mods

    def run(machine: Machine) -> None:
        outer, giving = machine.mask, machine.lane_of < 8 * len(put)
        machine.activate(giving if outer is None else outer & giving)
        place = np.broadcast_to(address(machine), machine.count)
        words = machine.memory.load("shared", place, np.dtype(np.uint32), 4)
        machine.activate(outer)
        rows = np.stack(words, -1).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        rows = rows.swapaxes(2, 3) if transposed else rows
        for index, one in enumerate(put):
            one(machine, np.ascontiguousarray(rows[:, index]).reshape(-1).view(np.uint32))

    made.run = run


def trap(made: Instruction) -> None:
    """trap: an error."""

    def run(machine: Machine) -> None:
        raise PTXError(f"{machine.name_of(int(machine.threads[0]))} executed trap")

    made.run = run


def synchronize(made: Instruction) -> None:
    """bar.sync and bar.warp.sync."""
    if made.mods[0] == "warp":
        made.kind, made.members = "warp", reader(made.operands[0], U32)
    elif len(made.operands) > 1:
        raise PTXError("barriers of a part of a block are not supported")
    else:
        made.kind = "barrier"
    made.run = lambda machine: None


def control(made: Instruction) -> None:
    """bra and ret."""
    made.kind = made.op


MAKERS: dict[str, tuple[Any, str]] = {
    "shfl": (shuffle, "sync up down bfly idx"),
    "vote": (vote, "sync all any ballot"),
    "mma": (multiply_matrices, "sync aligned m16n8k8 m16n8k16 m16n8k32 row col"),
    "ldmatrix": (load_matrix, "sync aligned m8n8 x1 x2 x4 trans shared"),
    "activemask": (active_mask, ""),
    "bar": (synchronize, "sync warp"),
    "trap": (trap, ""),
    "bra": (control, "uni"),
    "ret": (control, ""),
}  # the function that decodes it, and the modifiers besides types that it may have
