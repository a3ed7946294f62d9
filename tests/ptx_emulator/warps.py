"""Instructions in which the threads of a warp, or of a block, work together."""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.floats import narrow
from tests.ptx_emulator.parser import Imm, Instruction, PTXError, Vec
from tests.ptx_emulator.values import (
    PRED,
    TYPES,
    U32,
    Array,
    Machine,
    address_reader,
    from_bits,
    reader,
    values_of,
    writer,
)  # fmt: skip

ALL_LANES = reader(Imm(-1), U32)
COLUMNS = {"f16": 2, "bf16": 2, "s8": 4, "u8": 4}  # numbers of a fragment in one register


def shuffle(made: Instruction) -> None:
    """shfl.sync d|p, a, b, c, members: d is a of another lane, or the own one where p is false.

    c holds the clamp in its low 5 bits and the segment mask in bits 8 to 12.
    """
    mode = next(mod for mod in made.mods if mod in ("up", "down", "bfly", "idx"))
    result = made.operands[0]
    first, second = result.items if isinstance(result, Vec) else (result, None)
    put, put_pred = writer(first, U32), writer(second, PRED)
    value, b, c, made.members = (reader(operand, U32) for operand in made.operands[1:5])

    def run(machine: Machine) -> None:
        lane = machine.lane_of.astype(np.int64)
        offset, control = b(machine).astype(np.int64) & 31, c(machine).astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        limit = (lane & segment) | (clamp & ~segment)
        moved = {
            "up": lane - offset,
            "down": lane + offset,
            "bfly": lane ^ offset,
            "idx": lane & segment | offset & ~segment,
        }
        inside = moved[mode] >= limit if mode == "up" else moved[mode] <= limit
        source = np.where(inside, moved[mode], lane)
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
    """vote.sync.all, any, uni and ballot."""
    mode = next(mod for mod in made.mods if mod in ("all", "any", "uni", "ballot"))
    put = writer(made.operands[0], U32 if mode == "ballot" else PRED)
    holds, made.members = reader(made.operands[1], PRED), reader(made.operands[2], U32)

    def run(machine: Machine) -> None:
        members = made.members(machine)
        bits = machine.warp_bits(np.broadcast_to(holds(machine), machine.count))[machine.warp_of] & members
        every, none = bits == members, bits == 0
        put(machine, {"ballot": bits, "all": every, "any": ~none, "uni": every | none}[mode])

    made.run = run


def active_mask(made: Instruction) -> None:
    """activemask: the lanes of the warp that run this instruction together."""
    put = writer(made.operands[0], U32)
    made.run = lambda machine: put(machine, machine.warp_bits(machine.mask)[machine.warp_of])


def numbers(machine: Machine, registers: list[Array], name: str) -> Array:
    """The numbers in registers of a fragment: (warps, 32 lanes, registers, numbers in one register), float64."""
    if machine.size % 32:
        raise PTXError("mma needs blocks of whole warps")
    bits = np.stack([np.broadcast_to(register, machine.count).reshape(-1, 32) for register in registers], -1)
    split = bits.view(f"u{TYPES[name].bits // 8}").reshape(-1)
    return from_bits(split, TYPES[name]).astype(np.float64).reshape(*bits.shape, -1)


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
    depth = next((int(mod[6:]) for mod in made.mods if mod.startswith("m16n8k")), 0)
    names = [mod for mod in made.mods if mod in (*COLUMNS, "f32", "s32")]
    result, name_a, name_b, accumulator = names if len(names) == 4 else [""] * 4
    each = COLUMNS.get(name_a, 1)
    count, pairs = depth // (4 * each), result == "f16"
    if count not in (1, 2) or result != accumulator or COLUMNS.get(name_b) != COLUMNS.get(name_a, 0):
        raise PTXError("mma of this shape and these types is not supported")
    number, length = TYPES["f16x2" if pairs else result], 2 if pairs else 4
    put = values_of(made.operands[0], number, length, writer)
    fragments = [values_of(made.operands[1], U32, 2 * count, reader), values_of(made.operands[2], U32, count, reader)]
    add = values_of(made.operands[3], number, length, reader)
    made.members = ALL_LANES

    def run(machine: Machine) -> None:
        a, b = (
            numbers(machine, [one(machine) for one in get], name)
            for get, name in zip(fragments, (name_a, name_b), strict=True)
        )
        product = np.matmul(*matrices(a, b)).reshape(-1, 2, 8, 4, 2)  # warp, upper half, g, t, column
        for index, (one, c) in enumerate(zip(put, add, strict=True)):
            part = product[:, index].reshape(-1, 2) if pairs else product[:, index // 2, :, :, index % 2].reshape(-1)
            one(machine, finish(part + c(machine), number.dtype))

    made.run = run


def finish(total: Array, dtype: np.dtype) -> Array:
    """Round the sums of mma; integers wrap."""
    return narrow(total, dtype, "rn") if dtype.kind == "f" else total.astype(np.int64).astype(dtype)


def load_matrix(made: Instruction) -> None:
    """ldmatrix: 8x8 matrices of 16-bit numbers; row r of matrix i lies at the address of lane 8 i + r."""
    count = next((int(mod[1]) for mod in made.mods if mod in ("x1", "x2", "x4")), 0)
    if not count or not {"m8n8", "b16"} <= {*made.mods}:
        raise PTXError("this form of ldmatrix is not supported")
    put, address = values_of(made.operands[0], U32, count, writer), address_reader(made.operands[1])
    made.members, transposed = ALL_LANES, "trans" in made.mods
    space = "shared" if "shared" in made.mods else "generic"

    def run(machine: Machine) -> None:
        outer, giving = machine.mask, machine.lane_of < 8 * count
        machine.activate(giving if outer is None else outer & giving)
        place = np.broadcast_to(address(machine), machine.count)
        words = machine.memory.load(space, place, np.dtype(np.uint32), 4)
        machine.activate(outer)
        rows = np.stack(words, -1).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        rows = rows.swapaxes(2, 3) if transposed else rows
        for index, one in enumerate(put):
            one(machine, np.ascontiguousarray(rows[:, index]).reshape(-1).view(np.uint32))

    made.run = run


def nothing(made: Instruction) -> None:
    """Fences, prefetches and pauses."""
    made.run = lambda machine: None


def trap(made: Instruction) -> None:
    """trap: an error."""

    def run(machine: Machine) -> None:
        raise PTXError(f"{machine.name_of(int(machine.threads[0]))} executed trap")

    made.run = run


def synchronize(made: Instruction) -> None:
    """bar.sync, barrier.sync and bar.warp.sync."""
    if "sync" not in made.mods:
        raise PTXError("only bar.sync is supported")
    made.kind = "warp" if "warp" in made.mods else "barrier"
    operands = made.operands if made.kind == "warp" else made.operands[1:]
    made.members = reader(operands[0], U32) if operands else None
    nothing(made)


def decode(made: Instruction) -> bool:
    """Decode an instruction of this file, and control; False if it is none."""
    together = {"shfl": shuffle, "vote": vote, "mma": multiply_matrices, "ldmatrix": load_matrix}
    alone = {"activemask": active_mask, "bar": synchronize, "barrier": synchronize, "trap": trap}
    alone |= dict.fromkeys(("membar", "fence", "prefetch", "nanosleep"), nothing)
    if made.op in together:
        if "sync" not in made.mods:
            raise PTXError(f"only {made.op}.sync is supported")
        made.kind = "warp"
        together[made.op](made)
    elif made.op in alone:
        alone[made.op](made)
    elif made.op in ("bra", "ret", "exit"):
        made.kind = "branch" if made.op == "bra" else "exit"
    else:
        return False
    return True
