"""Instructions that move data: mov, selp, cvta, ld, st, atom, red and cp.async."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx_emulator.parser import Instruction, Param, PTXError, Reg, items_of
from tests.ptx_emulator.values import PRED, Function, Machine, address_reader, pure, reader, writer

COMBINE: dict[str, Function] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new, "cas": lambda old, known, new: new if old == known else old,
}  # fmt: skip


def space_of(made: Instruction) -> str:
    """The state space that an instruction names."""
    if made.mods[0] not in ("global", "shared", "local", "const"):
        raise PTXError("generic addresses are not supported")
    return made.mods[0]


def move(made: Instruction) -> None:
    """mov, and cvta, as arrays keep their addresses.

    A register that was never written may be copied: NVVM does that with undefined values.
    """
    type_, source = made.types[-1], made.operands[1]
    pure(made, type_, [type_], lambda value: value)
    if isinstance(source, Reg):
        plain = made.run
        made.run = lambda machine: None if machine.registers[source.number] is None else plain(machine)


def select(made: Instruction) -> None:
    """selp: a where the predicate holds, b elsewhere."""
    type_ = made.types[-1]
    pure(made, type_, [type_, type_, PRED], lambda a, b, c: np.where(c, a, b))


def load(made: Instruction) -> None:
    """ld: caches change nothing here."""
    (type_,), place = made.types, made.operands[1]
    put = [writer(item, type_) for item in items_of(made.operands[0])]
    if isinstance(place, Param):
        get = reader(place, type_)
        made.run = lambda machine: put[0](machine, get(machine))
        return
    space, address = space_of(made), address_reader(place)

    def run(machine: Machine) -> None:
        loaded = machine.memory.load(space, address(machine), type_.dtype, len(put))
        for one, values in zip(put, loaded, strict=True):
            one(machine, values)

    made.run = run


def store(made: Instruction) -> None:
    """st: the low bits of each register."""
    (type_,), space, address = made.types, space_of(made), address_reader(made.operands[0])
    get = [reader(item, type_) for item in items_of(made.operands[1])]
    made.run = lambda machine: machine.memory.store(space, address(machine), [one(machine) for one in get])


def atomic(made: Instruction) -> None:
    """atom and red: one thread after the other, in the order of their numbers."""
    (type_,), space, returns = made.types, space_of(made), made.op == "atom"
    function, size = COMBINE[made.mods[1]], type_.dtype.itemsize
    if size * 8 != type_.bits:
        raise PTXError("packed numbers and bfloat16 are not supported")
    place, *operands = made.operands[returns:]
    get = [reader(operand, type_) for operand in operands]
    put, address = writer(made.operands[0] if returns else None, type_), address_reader(place)

    def run(machine: Machine) -> None:
        values = [np.broadcast_to(one(machine), machine.count) for one in get]
        before = np.zeros(machine.count, type_.dtype)
        for region, offsets, threads in machine.memory.parts(space, address(machine), size, "updates"):
            view = region.view(type_.dtype, 1)
            for thread, index in zip(threads.tolist(), (offsets // size).tolist(), strict=True):
                before[thread] = view[index]
                view[index] = function(view[index], *(value[thread] for value in values))
        put(machine, before)

    made.run = run


def copy_async(made: Instruction) -> None:
    """cp.async from global to shared memory, and what belongs to it."""
    kind = made.mods[1]
    if kind == "commit_group":
        made.run = lambda machine: machine.memory.watch.commit(machine.threads)
    elif kind == "wait_all":
        made.run = lambda machine: machine.memory.watch.wait(machine.threads, None)
    elif kind == "wait_group":
        newest = made.operands[0].value
        made.run = lambda machine: machine.memory.watch.wait(machine.threads, newest)
    else:
        target, source, size = *map(address_reader, made.operands[:2]), made.operands[2].value
        if size not in ((16,) if kind == "cg" else (4, 8, 16)) or len(made.operands) > 3:
            raise PTXError("cp.async copies 4, 8 or 16 bytes, with .cg 16")

        def run(machine: Machine) -> None:
            words = machine.memory.load("global", source(machine), np.dtype(np.uint32), size // 4)
            machine.memory.store("shared", target(machine), words, "copies")

        made.run = run


MAKERS: dict[str, tuple[Any, str]] = {
    "mov": (move, ""), "cvta": (move, "to global local"), "selp": (select, ""),
    "ld": (load, "param const nc v2 v4 global shared local"), "st": (store, "v2 v4 global shared local"),
    "atom": (atomic, f"global shared {' '.join(COMBINE)}"), "red": (atomic, f"global shared {' '.join(COMBINE)}"),
    "cp": (copy_async, "async ca cg shared global commit_group wait_group wait_all"),
}  # fmt: skip
