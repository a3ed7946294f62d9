"""Memory: regions with bounds, alignment checks, loads and stores of many threads at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ptx_emulator.parser import SLOT, PTXError, slot_base
from tests.ptx_emulator.races import SharedWatch
from tests.ptx_emulator.values import Array, Machine


class Region:
    """Bytes that can be addressed.

    data : all bytes
    size : how many of them one thread can address
    """

    def __init__(self, name: str, data: Array, writable: bool = True, parts: int = 1):
        self.name, self.data, self.writable = name, data, writable
        self.size = len(data) // parts

    def view(self, dtype: np.dtype, count: int) -> Array:
        """The data as numbers, or for count > 1 as rows of so many numbers."""
        step = dtype.itemsize * count
        numbers = self.data[: len(self.data) // step * step].view(dtype)
        return numbers if count == 1 else numbers.reshape(-1, count)


class Memory:
    """What the threads of one machine see: the launch's regions, and shared and local memory of their own."""

    def __init__(self, machine: Machine, regions: dict[int, Region], shared: int, local: int, unit: int):
        self.machine, self.regions = machine, regions
        shared = -(-shared // 16) * 16
        self.watch = SharedWatch(machine, shared, unit)
        self.shared = Region("shared memory", np.zeros(shared * machine.blocks, np.uint8), True, machine.blocks)
        self.local = Region("local memory", np.zeros(local * machine.count, np.uint8), True, machine.count)

    def parts(self, space: str, address: Array, size: int, does: str) -> Iterator[tuple[Region, Array, Array]]:
        """Check the active threads' accesses; for each region that they fall into, offsets in its data, and threads.

        does : "reads", "writes", "updates" (an atomic) or "copies" (cp.async writes)
        """
        threads = self.machine.threads
        if len(address) > 1 and self.machine.mask is not None:
            address = address[threads]
        if space in ("shared", "local"):
            block_of, local = self.machine.block_of, space == "local"
            region, owners = (self.local, threads) if local else (self.shared, block_of[threads])
            offsets = owners * region.size + self.checked(region, 0, address, size, threads)
            if not local:
                self.watch.access(offsets, size, threads, does)
            yield region, offsets, threads
            return
        slots = address >> np.uint64(SLOT)
        same = bool((slots == slots[0]).all())
        for slot in slots[:1].tolist() if same else np.unique(slots).tolist():
            chosen = slice(None) if same else slots == slot
            region, place, who = self.regions.get(slot), address[chosen], threads if same else threads[chosen]
            if region is None or not (region.writable or does == "reads"):
                what = "where no array is" if region is None else f"store to read-only {region.name}"
                raise PTXError(f"{self.machine.name_of(int(who[0]))}, address {int(place[0]):#x}: {what}")
            offsets = self.checked(region, slot_base(slot), place, size, who)
            yield region, offsets if does == "reads" else np.broadcast_to(offsets, len(who)), who

    def checked(self, region: Region, base: int, address: Array, size: int, threads: Array) -> Array:
        """Offsets into a region, once bounds and alignment are checked."""
        offsets = (address - np.uint64(base)).view(np.int64)
        if int(offsets.min()) < 0 or int(offsets.max()) > region.size - size:
            wrong, what = (offsets < 0) | (offsets > region.size - size), f"outside, it has {region.size} bytes"
        elif int(np.bitwise_or.reduce(offsets)) & (size - 1):
            wrong, what = offsets & (size - 1) != 0, "misaligned"
        else:
            return offsets
        first = int(np.argmax(wrong))
        who, where = self.machine.name_of(int(threads[first])), int(offsets[first])
        raise PTXError(f"{who} accesses {size} bytes at byte {where} of {region.name}: {what}")

    def load(self, space: str, address: Array, dtype: np.dtype, count: int) -> list[Array]:
        """Load count numbers for each active thread; a single element of each if all get the same from one address."""
        size = dtype.itemsize * count
        total = np.zeros((self.machine.count, count)[: 1 + (count > 1)], dtype)
        for region, offsets, threads in self.parts(space, address, size, "reads"):
            rows = region.view(dtype, count)[offsets // size]
            if (len(rows) == 1 and len(address) == 1) or len(rows) == self.machine.count:
                total = rows
            else:
                total[threads] = rows
        return [total] if count == 1 else list(np.ascontiguousarray(total.T))

    def store(self, space: str, address: Array, values: list[Array], does: str = "writes") -> None:
        """Store one or several numbers for each active thread; of two to the same place the last thread's stays."""
        size = values[0].itemsize * len(values)
        for region, offsets, threads in self.parts(space, address, size, does):
            chosen = [value if len(value) == 1 else value[threads] for value in values]
            rows = chosen[0] if len(values) == 1 else np.stack(np.broadcast_arrays(*chosen), axis=-1)
            region.view(values[0].dtype, len(values))[offsets // size] = rows
