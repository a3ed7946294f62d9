"""Run PTX on NumPy: a GPU for tests, on hosts that have none.

    module = Module(ptx)                                  # all entries decoded; PTXError names an unknown instruction
    module.launch(module.entries[0], grid, block, args)   # arrays are read and written in place

One NumPy operation carries out one instruction for all threads of many blocks.  `parser` makes one list of
instructions of an entry, `arithmetic`, `access` and `warps` give each instruction a function, and `machine` calls these
functions; `memory` and `races` check every access.  A register is an array with an element per thread, or with a single
one while all threads agree, which makes counters and pointers cheap.

It knows the instructions that NVVM makes of kernels of this project, and the modifiers that they may have; any other is
an error when a module is read.  So are generic addresses, calls and names of inner scopes.

What a GPU leaves undefined is an error here: accesses out of bounds or misaligned, reads of shared memory that nobody
wrote, races in shared memory (`races` states the rule), data of cp.async that wasn't waited for, barriers that a part
of a block never reaches, lanes of a member mask that never come, stores to arrays that are not writeable.  Races in
global memory are not found.

Arrays lie far apart in a made-up address space, each aligned to 256 bytes there, wherever NumPy put it.  The same
memory given twice is the same memory.  Blocks run in batches, one after the other, so a block must not wait for one of
a later batch. `arithmetic` and `warps` say where arithmetic differs from a GPU's in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx_emulator import access, arithmetic, warps
from tests.ptx_emulator.machine import Machine, Shape
from tests.ptx_emulator.memory import Region
from tests.ptx_emulator.parser import FIRST_SLOT, TYPES, Instruction, PTXError, Type, programs, slot_base
from tests.ptx_emulator.values import Array, to_bits

__all__ = ["Module", "PTXError"]

BATCH = 16384  # threads; enough that NumPy's cost per call vanishes, few enough that registers stay in the cache
MAKERS = arithmetic.MAKERS | access.MAKERS | warps.MAKERS  # the function that decodes an instruction, its modifiers


class Module:
    """PTX text, ready to run.

    entries : the names of the kernels
    """

    def __init__(self, ptx: str):
        self._programs = {program.name: program for program in programs(ptx)}
        for program in self._programs.values():
            for made in program.code:
                decode(made)
        self.entries = list(self._programs)

    def launch(
        self,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        max_steps: int = 2_000_000,
    ) -> None:
        """Run a kernel.

        grid, block : numbers of blocks and of threads in a block, up to three axes
        args : C-contiguous arrays and None for pointers, numbers for the other parameters
        shared : bytes of dynamic shared memory
        max_steps : instructions that one batch of blocks may take before it counts as running away
        """
        program, grid, block = self._programs[entry], extent(grid), extent(block)
        size, total = (int(np.prod(shape)) for shape in (block, grid))
        if not 0 < size <= 1024 or total < 1:
            raise ValueError(f"a grid of {grid} blocks of {block} threads cannot be launched")
        if len(args) != len(program.params):
            raise ValueError(f"{entry} takes {len(program.params)} arguments, {len(args)} given")
        regions = {FIRST_SLOT + index: Region(*array) for index, array in enumerate(program.arrays)}
        params = {
            name: bind(position, argument, type_, regions)
            for position, ((type_, name), argument) in enumerate(zip(program.params, args, strict=True))
        }
        many = max(BATCH // size, 1)
        for first in range(0, total, many):
            batch = range(first, min(first + many, total))
            Machine(program, grid, block, batch, params, regions, shared, max_steps).run()


def decode(made: Instruction) -> None:
    """Give an instruction its function."""
    maker, modifiers = MAKERS.get(made.op, (None, ""))
    if maker is None or not {*modifiers.split(), *TYPES} >= {*made.mods}:
        raise PTXError(f"{made}: unknown instruction {'.'.join([made.op, *made.mods])}")
    try:
        maker(made)
    except (PTXError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise PTXError(f"{made}: cannot decode it: {error or type(error).__name__}") from error


def extent(shape: int | Sequence[int]) -> Shape:
    """A grid or block as (x, y, z)."""
    x, y, z = (*np.atleast_1d(shape).tolist(), 1, 1)[:3]
    return x, y, z


def bind(position: int, argument: Any, type_: Type, regions: dict[int, Region]) -> Array:
    """The bits of a parameter; an array becomes a region, its parameter the address."""
    if argument is None:
        return np.zeros(1, np.uint64)
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous or type_.bits != 64:
            raise ValueError(f"argument {position}: a C-contiguous array and a 64-bit parameter are needed")
        name = f"argument {position} ({argument.dtype}{list(argument.shape)})"
        slot = FIRST_SLOT + len(regions)
        regions[slot] = Region(name, argument.reshape(-1).view(np.uint8), argument.flags.writeable)
        return np.array([slot_base(slot)], np.uint64)
    return to_bits(np.array([argument]).astype(type_.dtype), type_, type_.bits)
