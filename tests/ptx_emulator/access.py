"""Instructions that move data: mov, selp, cvta, ld, st, atom, red and cp.async."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx_emulator.memory import WINDOWS
from tests.ptx_emulator.parser import Imm, Instruction, Mem, PTXError, Reg, slot_base
from tests.ptx_emulator.values import (
    PRED,
    TYPES,
    U32,
    U64,
    UNSIGNED,
    Machine,
    Type,
    address_reader,
    from_bits,
    pure,
    reader,
    values_of,
    writer,
)  # fmt: skip

COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
}  # fmt: skip


def space_of(made: Instruction) -> str:
    """The state space among the modifiers; without one, addresses are generic."""
    return next((mod for mod in made.mods if mod in ("global", "shared", "local", "const", "param")), "generic")


def length_of(made: Instruction) -> int:
    """How many numbers .v2 and .v4 move."""
    return next((int(mod[1]) for mod in made.mods if mod in ("v2", "v4")), 1)


def bits_type(name: str) -> Type:
    """The untyped bits of the same width."""
    return PRED if name == "pred" else TYPES[f"b{TYPES[name].bits}"]


def move(made: Instruction) -> None:
    """mov.  A register that was never written may be copied: NVVM does that with undefined values."""
    type_, source = bits_type(made.types[-1]), made.operands[1]
    pure(made, type_, [type_], lambda bits: bits)
    if isinstance(source, Reg):
        plain = made.run
        made.run = lambda machine: None if machine.registers[source.number] is None else plain(machine)


def select(made: Instruction) -> None:
    """selp: a where the predicate holds, b elsewhere."""
    type_ = bits_type(made.types[0])
    pure(made, type_, [type_, type_, PRED], lambda a, b, c: np.where(c, a, b))


def convert_address(made: Instruction) -> None:
    """cvta and cvta.to: shared and local memory are windows in the generic addresses."""
    space = space_of(made)
    window = np.uint64(slot_base(WINDOWS[space]) if space in WINDOWS else 0)
    pure(made, U64, [U64], lambda a: a - window if "to" in made.mods else a + window)


def load(made: Instruction) -> None:
    """ld: caches, ordering and hints change nothing here."""
    type_, place, count = TYPES[made.types[-1]], made.operands[1], length_of(made)
    put = values_of(made.operands[0], type_, count, writer)
    if isinstance(place, Mem) and isinstance(place.base, str):
        if place.offset or count > 1:
            raise PTXError("only whole parameters can be loaded")
        made.run = lambda machine: put[0](machine, from_bits(machine.params[place.base], type_))
        return
    address, space, raw = address_reader(place), space_of(made), UNSIGNED[type_.bits]

    def run(machine: Machine) -> None:
        for one, bits in zip(put, machine.memory.load(space, address(machine), raw, count), strict=True):
            one(machine, from_bits(bits, type_))

    made.run = run


def store(made: Instruction) -> None:
    """st: the low bits of each register."""
    get = values_of(made.operands[1], bits_type(made.types[-1]), length_of(made), reader)
    address, space = address_reader(made.operands[0]), space_of(made)
    made.run = lambda machine: machine.memory.store(space, address(machine), [one(machine) for one in get])


def atomic(made: Instruction) -> None:
    """atom and red: one thread after the other, in the order of their numbers."""
    type_, returns, swap = TYPES[made.types[-1]], made.op == "atom", "cas" in made.mods
    function = COMBINE[next((mod for mod in made.mods if mod in COMBINE), "exch")]
    if type_.lanes > 1 or type_.kind == "bf16" or not {*COMBINE, "cas"} & {*made.mods}:
        raise PTXError("this atomic is not supported")
    place, *operands = made.operands[returns:]
    get = [reader(operand, type_) for operand in operands]
    put = writer(made.operands[0] if returns else None, type_)
    address, space, size = address_reader(place), space_of(made), type_.bits // 8

    def run(machine: Machine) -> None:
        values = [np.broadcast_to(one(machine), machine.count) for one in get]
        before = np.zeros(machine.count, type_.dtype)
        for region, offsets, threads in machine.memory.parts(space, address(machine), size, store=True):
            offsets = np.broadcast_to(offsets, len(threads))
            if region is machine.memory.windows["shared"]:
                machine.watch.write(offsets, size, threads, "updates")
            view, places = region.view(type_.dtype, 1), offsets // size
            if not returns and isinstance(function, np.ufunc):
                function.at(view, places, values[0][threads])
                continue
            for thread, index in zip(threads.tolist(), places.tolist(), strict=True):
                old = before[thread] = view[index]
                new = values[-1][thread]
                view[index] = (new if old == values[0][thread] else old) if swap else function(old, new)
        put(machine, before)

    made.run = run


def copy_async(made: Instruction) -> None:
    """cp.async and what belongs to it."""
    if "commit_group" in made.mods:
        made.run = lambda machine: np.add.at(machine.watch.group, machine.threads, 1)
    elif "wait_all" in made.mods:
        made.run = lambda machine: machine.watch.wait(machine.threads, None)
    elif "wait_group" in made.mods:
        made.run = lambda machine: machine.watch.wait(machine.threads, made.operands[0].value)
    elif made.mods[:1] == ["async"] and {"ca", "cg"} & {*made.mods}:
        copy_bytes(made)
    else:
        raise PTXError("this form of cp is not supported")


def copy_bytes(made: Instruction) -> None:
    """cp.async.ca and .cg: copy size bytes from global to shared memory, of which all behind src-size become zeros."""
    target, source = address_reader(made.operands[0]), address_reader(made.operands[1])
    size = made.operands[2].value
    if size not in (4, 8, 16) or ("cg" in made.mods and size != 16):
        raise PTXError("cp.async copies 4, 8 or 16 bytes, with .cg 16")
    taken = reader(made.operands[3] if len(made.operands) > 3 else Imm(size), U32)
    byte = np.dtype(np.uint8)

    def run(machine: Machine) -> None:
        memory, outer, where = machine.memory, machine.mask, source(machine)
        data = np.zeros((machine.count, size), byte)
        wanted = np.broadcast_to(taken(machine), machine.count)
        for amount in np.unique(wanted[machine.threads]).tolist():
            chosen = (wanted == amount) if outer is None else outer & (wanted == amount)
            machine.activate(chosen)
            whole = [(0, np.dtype(np.uint32), size // 4)] if amount == size else [(at, byte, 1) for at in range(amount)]
            for at, dtype, count in whole:
                words = np.stack(memory.load("global", where + np.uint64(at), dtype, count), -1)
                columns = np.broadcast_to(words, (machine.count, count))[chosen].view(byte)
                data[chosen, at : at + columns.shape[1]] = columns
        machine.activate(outer)
        for region, offsets, threads in memory.parts("shared", target(machine), size, store=True):
            places = np.broadcast_to(offsets, len(threads))
            machine.watch.write(places, size, threads, pending=True)
            region.view(byte, size)[places // size] = data[threads]

    made.run = run


def decode(made: Instruction) -> bool:
    """Decode an instruction that moves data; False if it is none."""
    makers = {
        "mov": move, "selp": select, "cvta": convert_address, "ld": load, "st": store,
        "atom": atomic, "red": atomic, "cp": copy_async,
    }  # fmt: skip
    if made.op in makers:
        makers[made.op](made)
    return made.op in makers
