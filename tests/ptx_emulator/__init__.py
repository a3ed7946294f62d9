"""Run PTX on NumPy: a GPU for tests, on hosts that have none.

    module = Module(ptx)                                  # all entries decoded; PTXError names an unknown instruction
    module.launch(module.entries[0], grid, block, args)   # arrays are read and written in place

One NumPy operation carries out one instruction for all threads of many blocks.  `parser` makes one list of
instructions of an entry, `integers`, `floats`, `access` and `warps` give each instruction a function, and `machine`
calls these functions; `memory` and `races` check every access.  A register is an array with an element per thread, or
with a single one while all threads agree, which makes counters and pointers cheap.

What a GPU leaves undefined is an error here: accesses out of bounds or misaligned, reads of shared memory that nobody
wrote, races in shared memory (`races` states the rule), data of cp.async that wasn't waited for, barriers that a part
of a block never reaches, lanes of a member mask that never come, stores to arrays that are not writeable.  Races in
global memory are not found.

Arrays lie far apart in a made-up address space, each aligned to 256 bytes there, wherever NumPy put it.  The same
memory given twice is the same memory.  Blocks run in batches, one after the other, so a block must not wait for one of
a later batch. `floats` and `warps` say where arithmetic differs from a GPU's in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx_emulator import access, floats, integers, warps
from tests.ptx_emulator.machine import Machine, Shape
from tests.ptx_emulator.memory import Region
from tests.ptx_emulator.parser import BITS, FIRST_SLOT, Instruction, PTXError, programs, slot_base
from tests.ptx_emulator.values import TYPES, Array, constant, to_bits

__all__ = ["Module", "PTXError"]

BATCH = 16384  # threads; enough that NumPy's cost per call vanishes, few enough that registers stay in the cache
KNOWN = """
    lo hi wide sat cc wrap clamp l r shiftamt ftz rn rz rm rp rni rzi rmi rpi approx full relu NaN
    eq ne lt le gt ge ls hs equ neu ltu leu gtu geu num nan and or xor
    global shared local const param cta cluster to v2 v4 nc volatile relaxed acquire release acq_rel weak gpu sys sc
    ca cg cs lu cv cop wb wt L1 L2 64B 128B 256B evict_normal evict_unchanged evict_first evict_last no_allocate
    add min max exch cas async commit_group wait_group wait_all sync aligned warp idx up down bfly all any uni ballot
    m8n8 m16n8k8 m16n8k16 m16n8k32 row col x1 x2 x4 trans gl proxy
"""  # modifiers; others, which may change what an instruction does, are not ignored
MODIFIERS = frozenset(KNOWN.split()) | BITS.keys()


class Module:
    """PTX text, ready to run.

    entries : the names of the kernels
    """

    def __init__(self, ptx: str):
        found, self._arrays = programs(ptx)
        self._programs = {program.name: program for program in found}
        for program in found:
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
        if size > 1024:
            raise ValueError(f"a block has at most 1024 threads, not {size}")
        if len(args) != len(program.params):
            raise ValueError(f"{entry} takes {len(program.params)} arguments, {len(args)} given")
        regions = {FIRST_SLOT + index: Region(*array) for index, array in enumerate(self._arrays)}
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
    try:
        if MODIFIERS.issuperset(made.mods) and any(file.decode(made) for file in (warps, access, floats, integers)):
            return
    except (PTXError, ValueError, KeyError, IndexError, StopIteration, AttributeError) as error:
        raise PTXError(f"cannot decode it: {error or type(error).__name__}").at(made) from error
    raise PTXError(f"unknown instruction {'.'.join([made.op, *made.mods])}").at(made)


def extent(shape: int | Sequence[int]) -> Shape:
    """A grid or block as (x, y, z)."""
    axes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    x, y, z = (*axes, 1, 1, 1)[:3]
    if len(axes) > 3 or min(x, y, z) < 1:
        raise ValueError(f"one to three positive extents are needed, not {shape}")
    return int(x), int(y), int(z)


def bind(position: int, argument: Any, type_: str, regions: dict[int, Region]) -> Array:
    """The bits of a parameter; an array becomes a region, its parameter the address."""
    kind = TYPES[type_]
    if argument is None:
        return np.zeros(1, np.uint64)
    if isinstance(argument, np.ndarray) and argument.ndim:
        if not argument.flags.c_contiguous or kind.bits != 64:
            raise ValueError(
                f"argument {position}: a C-contiguous array for a 64-bit parameter is needed, got .{type_}"
            )
        name = f"argument {position} ({argument.dtype}{list(argument.shape)})"
        slot = FIRST_SLOT + len(regions)
        regions[slot] = Region(name, argument.reshape(-1).view(np.uint8), argument.flags.writeable)
        return np.array([slot_base(slot)], np.uint64)
    number = argument.item() if isinstance(argument, (np.generic, np.ndarray)) else argument
    if kind.kind == "int" and not isinstance(number, int):
        raise ValueError(f"argument {position}: .{type_} takes an integer, not {argument!r}")
    value = np.array([number], kind.dtype) if kind.kind == "float" else constant(number, kind)
    return to_bits(value, kind, kind.bits)
