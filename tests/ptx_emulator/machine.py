"""Run a batch of blocks in lockstep: groups of threads at the same instruction, the smallest position first.

A group is a mask over the batch's threads, or None for all of them.  A branch may split it, and so does a guard; groups
that come to the same position join.  Registers belong to the batch: a group that runs while others wait changes only
its own threads' elements, where the others still need theirs (`Instruction.live`), and whole arrays otherwise.
"""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.memory import Memory, Region
from tests.ptx_emulator.parser import Instruction, Program, PTXError, Reg, registers_of
from tests.ptx_emulator.values import UNSIGNED, Array

POISON = 0xDEADBEEFDEADBEEF  # what a register holds in threads that never wrote it
Mask = Array | None
Shape = tuple[int, int, int]


class Machine:
    """A batch of blocks.

    first, blocks : the number of the first block in the grid, and how many there are
    size, warps, count : threads and warps in a block, threads in all
    ready, parked : the groups that can run and those that wait for partners, by position
    needed : bits of the registers that groups other than the active one need
    """

    def __init__(
        self,
        program: Program,
        grid: Shape,
        block: Shape,
        batch: range,
        params: dict[str, Array],
        regions: dict[int, Region],
        dynamic: int,
        max_steps: int,
    ):
        self.program, self.grid, self.block, self.params = program, grid, block, params
        self.first, self.blocks, self.dynamic, self.max_steps = batch.start, len(batch), dynamic, max_steps
        self.size = block[0] * block[1] * block[2]
        self.warps, self.count = -(-self.size // 32), self.blocks * self.size
        self.all_threads = np.arange(self.count)
        self.block_of, self.in_block = np.divmod(self.all_threads, self.size)
        self.warp_of = self.block_of * self.warps + self.in_block // 32
        self.lane_of = (self.in_block % 32).astype(np.uint32)
        self.registers: list[Mask] = [None] * program.registers
        self.specials: dict[str, Array] = {}
        self.memory = Memory(self, regions, program.sizes["shared"] + dynamic, program.sizes["local"], program.unit)
        self.alive = np.ones(self.count, bool)
        self.ready: dict[int, Mask] = {0: None}
        self.parked: dict[int, Mask] = {}
        self.steps, self.needed, self.made = 0, 0, program.code[0]
        self.activate(None)

    @property
    def threads(self) -> Array:
        """The numbers of the active threads."""
        if self._threads is None:
            self._threads = np.flatnonzero(self.mask)
        return self._threads

    def name_of(self, thread: int) -> str:
        """ "thread (x, y, z) of block (x, y, z)"."""
        block, place = divmod(thread, self.size)
        numbers = ((place, self.block), (self.first + block, self.grid))
        where = [tuple(map(int, np.unravel_index(number, shape, order="F"))) for number, shape in numbers]
        return "thread {} of block {}".format(*where)

    def activate(self, mask: Mask) -> None:
        """Make these the active threads."""
        self.mask, self._threads = mask, self.all_threads if mask is None else None

    def write(self, register: Reg, bits: Array) -> None:
        """Set a register of the active threads."""
        if self.mask is not None and self.needed >> register.number & 1:
            old = self.registers[register.number]
            if old is None:
                old = np.array([POISON], np.uint64).astype(UNSIGNED[register.width])
            bits = np.where(self.mask, bits, old)
        self.registers[register.number] = bits

    def run(self) -> None:
        """Run until all threads have ended."""
        try:
            with np.errstate(all="ignore"):
                while self.ready or self.parked:
                    if not self.ready:
                        self.wake()
                    position = min(self.ready)
                    self.activate(self.ready.pop(position))
                    self.follow(position)
        except PTXError as error:
            raise PTXError(f"{self.made}: {error}") from None
        except (AttributeError, TypeError) as error:
            made = self.made
            read = registers_of([*made.operands[1:], made.guard, *made.operands[:1]])
            empty = [register.name for register in read if self.registers[register.number] is None]
            reason = f"reads {empty[0]}, which was never written" if empty else error
            raise PTXError(f"{made}: {reason}") from error

    def follow(self, position: int | None) -> None:
        """Run the active group until it ends, waits, splits, or comes to where another group is."""
        code = self.program.code
        self.note_needs()
        limit = min(self.ready, default=len(code))
        while position is not None and position < limit:
            self.made = code[position]
            self.steps += 1
            if self.steps > self.max_steps:
                raise PTXError(f"more than max_steps = {self.max_steps}")
            position = self.step(self.made, position)
        if position is not None:
            self.arrive(self.ready, position, self.mask)

    def note_needs(self) -> None:
        """Find what other groups need."""
        self.needed = 0
        for other in (*self.ready, *self.parked):
            self.needed |= self.program.code[other].live

    def arrive(self, groups: dict[int, Mask], position: int, mask: Mask) -> None:
        """Add threads to the ready (or parked) ones at a position."""
        if mask is not None and position in groups:
            other = groups[position]
            mask = None if other is None else mask | other
        groups[position] = None if mask is None or mask.all() else mask

    def guarded(self, guard: Reg) -> Mask:
        """The active threads whose guard holds; the active mask itself if that is all of them."""
        value = self.registers[guard.number] != guard.negated
        if len(value) == 1:
            return self.mask if value[0] else np.zeros(self.count, bool)
        mask = value if self.mask is None else value & self.mask
        return self.mask if int(np.count_nonzero(mask)) == len(self.threads) else mask

    def step(self, made: Instruction, position: int) -> int | None:
        """Carry out an instruction.  Returns where the active group goes on, or None if it was handed over."""
        outer, after = self.mask, position + 1
        mask = outer if made.guard is None else self.guarded(made.guard)
        if mask is not outer:
            if not mask.any():
                return after
            self.arrive(self.ready, after, ~mask if outer is None else outer & ~mask)
            self.activate(mask)
            self.note_needs()
        if made.kind == "plain":
            made.run(self)
        elif made.kind == "bra":
            after = made.operands[0].value
        elif made.kind == "ret":
            self.alive[self.threads] = False
            return None
        else:
            self.synchronize(made, position)
            return None
        if mask is outer:
            return after
        self.arrive(self.ready, after, mask)
        return None

    def synchronize(self, made: Instruction, position: int) -> None:
        """Let those threads through whose partners are here too, and park the others."""
        self.arrive(self.parked, position, self.mask)
        self.activate(self.parked.pop(position))
        through = self.complete_blocks() if made.kind == "barrier" else self.complete_warps(made)
        if through is not None:
            waiting = ~through if self.mask is None else self.mask & ~through
            if waiting.any():
                self.arrive(self.parked, position, waiting)
            if not through.any():
                return
        self.activate(through)
        self.note_needs()
        if made.kind == "barrier":
            self.memory.watch.barrier(None if through is None else self.threads)
        else:
            self.memory.watch.warp_sync(self.threads)
            made.run(self)
        self.arrive(self.ready, position + 1, through)

    def complete_blocks(self) -> Mask:
        """The active threads whose blocks are here as a whole, but for threads that ended."""
        if self.mask is None:
            return None
        here, alive = (flags.reshape(self.blocks, self.size).sum(1) for flags in (self.mask, self.alive))
        return self.mask & (here == alive)[self.block_of]

    def complete_warps(self, made: Instruction) -> Mask:
        """The active threads whose partners, by the instruction's member mask, are all here."""
        members, threads = made.members(self), self.threads
        if self.mask is None and self.size % 32 == 0 and len(members) == 1 and members[0] == 0xFFFFFFFF:
            return None
        members, warps = np.broadcast_to(members, self.count)[threads], self.warp_of[threads]
        errors = {
            "waits for lanes that don't exist or ended": members & ~self.warp_bits(self.alive)[warps],
            "is not in its own member mask": ~members >> self.lane_of[threads] & np.uint32(1),
        }
        for what, wrong in errors.items():
            if wrong.any():
                raise PTXError(f"{self.name_of(int(threads[np.argmax(wrong != 0)]))} {what}")
        through = np.zeros(self.count, bool)
        through[threads] = members & ~self.warp_bits(self.mask)[warps] == 0
        return None if through.all() else through

    def warp_bits(self, flags: Mask) -> Array:
        """For each warp, one bit for each lane that has the flag (None: every lane that exists)."""
        padded = np.zeros((self.blocks, self.warps * 32), bool)
        padded[:, : self.size] = True if flags is None else flags.reshape(self.blocks, self.size)
        return np.packbits(padded, bitorder="little").view(np.uint32)

    def wake(self) -> None:
        """Let parked threads through whose partners ended; if there are none, nobody can go on."""
        code = self.program.code
        for position in sorted(self.parked):
            self.made = code[position]
            self.activate(self.parked.pop(position))
            self.synchronize(self.made, position)
        if not self.ready:
            first = min(int(np.argmax(mask)) for mask in self.parked.values() if mask is not None)
            block = self.block_of == self.block_of[first]
            waiting = {position: int((mask & block).sum()) for position, mask in sorted(self.parked.items())}
            where = "; ".join(f"{count} at {code[position]}" for position, count in waiting.items() if count)
            raise PTXError(f"deadlock: threads of one block, that of {self.name_of(first)}, wait for ever: {where}")

    def special(self, name: str) -> Array:
        """A special register."""
        if name not in self.specials:
            base, _, axis = name.partition(".")
            index = "xyz".find(axis)
            shape, number = (self.grid, self.first + self.block_of) if "cta" in base else (self.block, self.in_block)
            if base == "%dynamic_smem_size":
                values = np.array([self.dynamic])
            elif base.startswith("%n"):
                values = np.array(shape[index : index + 1])
            else:
                values = number // int(np.prod(shape[:index])) % shape[index]
            same = bool((values == values[0]).all())
            self.specials[name] = values[: 1 if same else None].astype(np.uint32)
        return self.specials[name]
