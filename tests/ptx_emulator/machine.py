"""Run a batch of blocks in lockstep: groups of threads at the same instruction, the smallest position first.

A group is a mask over the batch's threads, or None for all of them.  A branch may split it; groups that come to the
same position join.  Registers belong to the batch: a group that runs while others wait changes only its own threads'
elements, where the others still need theirs (`Instruction.live`), and whole arrays otherwise.
"""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.memory import Memory, Region
from tests.ptx_emulator.parser import BITS, Instruction, Mem, Program, PTXError, Reg, Vec
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
        self.block_of, in_block = np.divmod(self.all_threads, self.size)
        self.warp_of = self.block_of * self.warps + in_block // 32
        self.lane_of = (in_block % 32).astype(np.uint32)
        self.registers: list[Mask] = [None] * len(program.widths)
        self.specials: dict[str, Array] = {}
        shared = program.shared_bytes + dynamic
        self.memory = Memory(self, regions, shared, program.local_bytes, smallest_access(program))
        self.watch = self.memory.watch
        self.alive = np.ones(self.count, bool)
        self.ready: dict[int, Mask] = {0: None}
        self.parked: dict[int, Mask] = {}
        self.steps, self.hits, self.needed = 0, [0] * len(program.code), 0
        self.activate(None)

    @property
    def threads(self) -> Array:
        """The numbers of the active threads."""
        if self._threads is None:
            self._threads = np.flatnonzero(self.mask)
        return self._threads

    def name_of(self, thread: int) -> str:
        """ "thread (x, y, z) of block (x, y, z)"."""
        place, number = thread % self.size, self.first + thread // self.size
        where = tuple(int(axis) for axis in np.unravel_index(place, self.block, order="F"))
        return f"thread {where} of block {tuple(int(axis) for axis in np.unravel_index(number, self.grid, order='F'))}"

    def activate(self, mask: Mask) -> None:
        """Make these the active threads."""
        self.mask, self._threads = mask, self.all_threads if mask is None else None

    def write(self, register: int, bits: Array) -> None:
        """Set a register of the active threads."""
        if self.mask is not None and self.needed >> register & 1:
            old, width = self.registers[register], self.program.widths[register]
            if old is None:
                old = np.array([POISON & (1 << width) - 1], np.uint64).astype(UNSIGNED[width])
            bits = np.where(self.mask, bits, old)
        self.registers[register] = bits

    def run(self) -> None:
        """Run until all threads have ended."""
        with np.errstate(all="ignore"):
            while self.ready or self.parked:
                if not self.ready:
                    self.wake()
                position = min(self.ready)
                self.activate(self.ready.pop(position))
                self.follow(position)

    def follow(self, position: int | None) -> None:
        """Run the active group until it ends, waits, splits, or comes to where another group is."""
        code = self.program.code
        self.note_needs()
        limit = min(self.ready, default=len(code))
        while position is not None:
            if position >= limit:
                self.arrive(self.ready, position, self.mask)
                return
            made = code[position]
            self.steps += 1
            self.hits[position] += 1
            if self.steps > self.max_steps:
                hot = int(np.argmax(self.hits))
                raise PTXError(f"more than max_steps = {self.max_steps}, {self.hits[hot]} of them here").at(code[hot])
            try:
                position = self.step(made, position)
            except PTXError as error:
                raise error.at(made) from None
            except (AttributeError, TypeError) as error:
                raise PTXError(self.unwritten(made) or f"{type(error).__name__}: {error}").at(made) from error

    def unwritten(self, made: Instruction) -> str:
        """What to say if an instruction failed because a register was never written."""
        operands = [
            item for operand in made.operands for item in (operand.items if isinstance(operand, Vec) else [operand])
        ]
        registers = [
            operand.base if isinstance(operand, Mem) else operand
            for operand in [*operands[1:], made.guard, operands[0]]
        ]
        empty = [one for one in registers if isinstance(one, Reg) and self.registers[one.number] is None]
        return f"reads {self.program.names[empty[0].number]}, which was never written" if empty else ""

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

    def guarded(self, guard: Reg | None) -> Mask:
        """The active threads whose guard holds; the active mask itself if that is all of them."""
        if guard is None:
            return self.mask
        value = self.registers[guard.number] != guard.negated
        if len(value) == 1:
            return self.mask if value[0] else np.zeros(self.count, bool)
        mask = value if self.mask is None else value & self.mask
        return self.mask if int(np.count_nonzero(mask)) == len(self.threads) else mask

    def step(self, made: Instruction, position: int) -> int | None:
        """Carry out an instruction.  Returns where the active group goes on, or None if it was handed over."""
        outer, mask = self.mask, self.guarded(made.guard)
        if mask is outer and made.kind == "plain":
            made.run(self)
        elif mask is outer and made.kind == "branch":
            return made.target
        elif mask is not outer and not mask.any():
            return position + 1
        elif made.kind == "plain":
            needed = self.needed
            self.needed |= self.program.code[position + 1].live
            self.activate(mask)
            made.run(self)
            self.activate(outer)
            self.needed = needed
        else:
            if mask is not outer:
                self.arrive(self.ready, position + 1, ~mask if outer is None else outer & ~mask)
                self.activate(mask)
            if made.kind == "branch":
                self.arrive(self.ready, made.target, mask)
            elif made.kind == "exit":
                self.alive[self.threads] = False
            else:
                return self.synchronize(made, position, mask is outer)
            return None
        return position + 1

    def synchronize(self, made: Instruction, position: int, alone: bool) -> int | None:
        """Let those threads through whose partners are here too, and park the others."""
        if position in self.parked:
            self.arrive(self.parked, position, self.mask)
            self.activate(self.parked.pop(position))
            alone = False
        arrived = self.mask
        through = self.complete_blocks(made) if made.kind == "barrier" else self.complete_warps(made)
        if through is not None:
            waiting = ~through if arrived is None else arrived & ~through
            if waiting.any():
                self.arrive(self.parked, position, waiting)
                alone = False
            if not through.any():
                return None
        self.activate(through)
        self.note_needs()
        if made.kind == "barrier":
            self.watch.barrier(None if through is None else self.threads)
        else:
            self.watch.warp_sync(self.threads)
            made.run(self)
        if alone:
            return position + 1
        self.arrive(self.ready, position + 1, through)
        return None

    def complete_blocks(self, made: Instruction) -> Mask:
        """The active threads whose blocks are here as a whole, but for threads that ended."""
        if made.members is not None and (made.members(self) != self.size).any():
            raise PTXError("barriers of a part of a block are not supported")
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
            self.activate(self.parked.pop(position))
            try:
                self.synchronize(code[position], position, False)
            except PTXError as error:
                raise error.at(code[position]) from None
        if not self.ready:
            first = min(int(np.argmax(mask)) for mask in self.parked.values() if mask is not None)
            block = self.block_of == self.block_of[first]
            waiting = {position: int((mask & block).sum()) for position, mask in sorted(self.parked.items())}
            where = "; ".join(f"{count} at {code[position]}" for position, count in waiting.items() if count)
            error = PTXError(f"threads of one block, that of {self.name_of(first)}, wait for ever: {where}")
            raise error.at("deadlock")

    def special(self, name: str) -> Array:
        """A special register."""
        if name.startswith(("%clock", "%globaltimer")):
            return np.array([self.steps], np.uint64)
        if name not in self.specials:
            values = np.asarray(self.make_special(*name[1:].partition(".")[::2])).astype(np.uint32).reshape(-1)
            self.specials[name] = values[:1].copy() if (values == values[0]).all() else values
        return self.specials[name]

    def make_special(self, base: str, axis: str) -> Array | int:
        if axis:
            index = "xyz".index(axis)
            shape = self.block if base in ("tid", "ntid") else self.grid
            number = self.all_threads % self.size if base == "tid" else self.first + self.block_of
            return shape[index] if base.startswith("n") else number // int(np.prod(shape[:index])) % shape[index]
        bit = np.uint32(1) << self.lane_of
        below = bit - np.uint32(1)
        values = {"laneid": self.lane_of, "warpid": self.all_threads % self.size // 32, "nwarpid": self.warps}
        values |= {"smid": 0, "nsmid": 1, "dynamic_smem_size": self.dynamic}
        values |= {
            "total_smem_size": self.program.shared_bytes + self.dynamic,
            "lanemask_eq": bit,
            "lanemask_lt": below,
        }
        values |= {"lanemask_le": below | bit, "lanemask_gt": ~(below | bit), "lanemask_ge": ~below}
        if base not in values:
            raise PTXError(f"unknown special register %{base}")
        return values[base]


def smallest_access(program: Program) -> int:
    """The size in bytes of the smallest access that may go to shared memory."""
    sizes = [4]
    for made in program.code:
        if (
            made.op in ("ld", "st", "atom", "red")
            and made.types
            and not {"global", "local", "const", "param"} & {*made.mods}
        ):
            sizes.append(BITS[made.types[-1]] // 8)
    return min(sizes)
