"""Who wrote and read each part of shared memory since the last barrier: finds races and reads of what nobody wrote.

The rule.  Two accesses of one block to the same bytes, one of them a write, must be ordered.  They are if

* the same thread makes both, or
* a bar.sync of the block lies between them, or
* both threads are of one warp, and a bar.warp.sync, shfl.sync, vote.sync, mma or ldmatrix of that warp lies between.

Lockstep orders nothing: a GPU may run the lanes of a warp one by one.  Two threads that write the same bytes in one
instruction race, even with equal values.  Atomics don't race with atomics; a plain access to what they touched needs a
bar.sync.  Bytes that cp.async writes count as written when it is issued, but nobody may read them before the issuing
thread waited for the group, and others only after a barrier behind that.

The unit of all this is the smallest access to shared memory that the program makes.
"""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.parser import PTXError
from tests.ptx_emulator.values import Array, Machine

WHO = 2047  # the low bits of a stamp: the thread's number in its block; this value: several threads
ATOMIC = 2048
TIME = 12  # the stamp's bits above this: the time of the write
PENDING = 1 << 56  # set while cp.async hasn't been waited for
SEVERAL = -2
Access = tuple[Array, Array, int]  # units, threads, the time


class SharedWatch:
    """The shadow of one batch of blocks' shared memory."""

    def __init__(self, machine: Machine, bytes_per_block: int, unit: int):
        self.machine, self.unit, self.each = machine, unit, bytes_per_block
        units = bytes_per_block * machine.blocks // unit
        self.written, self.last_read = np.full(units, -1, np.int64), np.full(units, -1, np.int64)
        self.reader, self.reading_warp = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.reads: list[Access] = []  # not yet in the arrays above, as most are forgotten at a barrier
        self.clock = 1
        self.barrier_time = np.zeros(machine.blocks, np.int64)
        self.warp_time = np.zeros(machine.blocks * machine.warps, np.int64)
        self.group = np.zeros(machine.count, np.int64)  # of each thread: how many groups of copies it committed
        self.copies: list[tuple[Array, Array, Array]] = []  # units, threads, groups

    def access(self, offsets: Array, size: int, threads: Array, does: str) -> None:
        """Check an access that "reads", "writes", "updates" (an atomic) or "copies" (cp.async), and remember it."""
        self.clock += 1
        units, each = offsets // self.unit, size // self.unit
        if each > 1:
            units, threads = (units[:, None] + np.arange(each)).ravel(), np.repeat(threads, each)
        self.check_writes(units, threads, does)
        if does == "reads":
            self.reads.append((units, threads, self.clock))
            if len(self.reads) > 64:
                self.settle_reads()
            return
        self.check_reads(units, threads, does)
        stamps = (self.clock << TIME) + (WHO + ATOMIC if does == "updates" else self.machine.in_block[threads])
        self.written[units] = stamps
        twice = self.written[units] != stamps
        if twice.any():
            other = int(self.written[units[np.argmax(twice)]]) & WHO
            self.race(twice, units, threads, does, f"thread {other} writes in the same instruction")
        if does == "copies":
            self.written[units] |= PENDING
            self.copies.append((units, threads, self.group[threads]))

    def check_writes(self, units: Array, threads: Array, does: str) -> None:
        """Raise unless earlier writes of these units are ordered before this access."""
        stamps, machine = self.written[units], self.machine
        if does in ("reads", "updates") and int(stamps.min()) < 0:
            self.race(stamps < 0, units, threads, does, "nobody wrote there (uninitialized)")
        if int(stamps.max()) >> TIME < int(self.barrier_time.min()):
            return
        self.race(stamps >= PENDING, units, threads, does, "cp.async writes there and wasn't waited for")
        who, when, own = stamps & WHO, stamps >> TIME, machine.in_block[threads]
        ordered = (when < self.barrier_time[machine.block_of[threads]]) | (who == own)
        ordered |= (who >> 5 == own >> 5) & (when < self.warp_time[machine.warp_of[threads]])
        if does == "updates":
            ordered |= (stamps & ATOMIC) != 0
        if not ordered.all():
            first = int(np.argmin(ordered))
            writer = "atomics update it" if stamps[first] & ATOMIC else f"thread {int(who[first])} writes it"
            self.race(~ordered, units, threads, does, f"{writer}, and no barrier lies between")

    def settle_reads(self) -> None:
        """Move the remembered reads into the arrays of last readers."""
        for units, threads, when in self.reads:
            since = self.barrier_time[self.machine.block_of[threads]]
            units, threads, since = (array[when >= since] for array in (units, threads, since))
            warps = self.machine.warp_of[threads]  # what it read before it synchronized, precedes all that follows
            before = (self.reading_warp[units] == warps) & (self.last_read[units] < self.warp_time[warps])
            again = (self.last_read[units] >= since) & ~before
            self.last_read[units] = when
            for last, now in ((self.reader, threads), (self.reading_warp, warps)):
                others = again & (last[units] != now)
                last[units] = now
                last[units[others | (last[units] != now)]] = SEVERAL
        self.reads.clear()

    def check_reads(self, units: Array, threads: Array, does: str) -> None:
        """Raise unless earlier reads of these units are ordered before this write."""
        self.settle_reads()
        when, warps = self.last_read[units], self.machine.warp_of[threads]
        unordered = (when >= self.barrier_time[self.machine.block_of[threads]]) & (self.reader[units] != threads)
        unordered &= (self.reading_warp[units] != warps) | (when >= self.warp_time[warps])
        if unordered.any():
            reader = int(self.reader[units[np.argmax(unordered)]])
            who = "several threads read it" if reader == SEVERAL else f"thread {reader % self.machine.size} reads it"
            self.race(unordered, units, threads, does, f"{who}, and no barrier lies between")

    def race(self, where: Array, units: Array, threads: Array, does: str, why: str) -> None:
        """Raise for the first access that the mask marks, if there is one."""
        if where.any():
            first = int(np.argmax(where))
            byte = int(units[first]) * self.unit % self.each
            who = self.machine.name_of(int(threads[first]))
            raise PTXError(f"{who} {does} byte {byte} of shared memory; {why}")

    def barrier(self, released: Array | None) -> None:
        """A bar.sync of the blocks of these threads, or of all."""
        self.clock += 1
        if released is None:
            self.barrier_time[:] = self.clock
            self.reads.clear()
        else:
            self.barrier_time[self.machine.block_of[released]] = self.clock

    def warp_sync(self, threads: Array) -> None:
        """An instruction that synchronizes the warps of these threads."""
        self.clock += 1
        self.warp_time[self.machine.warp_of[threads]] = self.clock

    def commit(self, threads: Array) -> None:
        """cp.async.commit_group."""
        self.group[threads] += 1

    def wait(self, threads: Array, newest: int | None) -> None:
        """cp.async.wait_group: all but the newest groups are there; None: everything, committed or not."""
        self.clock += 1
        waiting = np.zeros(self.machine.count, bool)
        waiting[threads] = True
        remaining = []
        for units, owners, groups in self.copies:
            done = waiting[owners]
            if newest is not None:
                done &= groups < self.group[owners] - newest
            self.written[units[done]] = (self.clock << TIME) + self.machine.in_block[owners[done]]
            if not done.all():
                remaining.append((units[~done], owners[~done], groups[~done]))
        self.copies = remaining
