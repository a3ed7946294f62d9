"""Memory: regions with bounds, alignment checks, loads and stores of many threads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tests.ptx_emulator.parser import LOCAL_WINDOW, SHARED_WINDOW, SLOT, PTXError, slot_base
from tests.ptx_emulator.races import SharedWatch
from tests.ptx_emulator.values import Array, Machine

WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


class Region:
    """Bytes that can be addressed.

    data : all bytes;  size : how many of them one thread can address
    part : for each thread, which part of so many bytes is its own; None if all share one
    """

    def __init__(self, name: str, data: Array, writable: bool = True, part: Array | None = None, parts: int = 1):
        self.name, self.data, self.writable, self.part = name, data, writable, part
        self.size = len(data) // parts
        self.views: dict[tuple[np.dtype, int], Array] = {}

    def view(self, dtype: np.dtype, count: int) -> Array:
        """The data as numbers, or for count > 1 as rows of so many numbers."""
        if (dtype, count) not in self.views:
            step = dtype.itemsize * count
            numbers = self.data[: len(self.data) // step * step].view(dtype)
            self.views[dtype, count] = numbers if count == 1 else numbers.reshape(-1, count)
        return self.views[dtype, count]


class Part(NamedTuple):
    """The threads of an access that fall into one region, and where in its data."""

    region: Region
    offsets: Array
    threads: Array


class Memory:
    """What the threads of one machine see: the launch's regions, and shared and local memory of their own."""

    def __init__(self, machine: Machine, regions: dict[int, Region], shared: int, local: int, unit: int):
        self.machine, self.regions, self.space = machine, regions, ""  # the space of the latest access, for errors
        shared = -(-shared // 16) * 16
        self.watch = SharedWatch(machine, shared, unit)
        self.windows = {
            "shared": Region(
                "shared memory", np.zeros(shared * machine.blocks, np.uint8), True, machine.block_of, machine.blocks
            ),
            "local": Region(
                "local memory", np.zeros(local * machine.count, np.uint8), True, machine.all_threads, machine.count
            ),
        }

    def parts(self, space: str, address: Array, size: int, store: bool = False) -> Iterator[Part]:
        """Sort the active threads' accesses by region and check them."""
        threads, self.space = self.machine.threads, space
        if len(address) > 1 and self.machine.mask is not None:
            address = address[threads]
        if space in WINDOWS:
            yield self.within(self.windows[space], 0, address, size, threads, store)
            return
        windows = {slot: self.windows[name] for name, slot in WINDOWS.items()} if space == "generic" else {}
        slots = address >> np.uint64(SLOT)
        same = bool((slots == slots[0]).all())
        for slot in slots[:1].tolist() if same else np.unique(slots).tolist():
            chosen = slice(None) if same else slots == slot
            region = windows.get(slot) or self.regions.get(slot)
            place, who = address[chosen], threads if same else threads[chosen]
            if region is None:
                self.fault(f"{size} bytes at {int(place[0]):#x}, where no array is", place, who, 0)
            else:
                yield self.within(region, slot_base(slot), place, size, who, store)

    def within(self, region: Region, base: int, address: Array, size: int, threads: Array, store: bool) -> Part:
        """Offsets into a region, once bounds, alignment and permission are checked."""
        offsets = address - np.uint64(base)
        if int(offsets.max()) > region.size - size:
            first = int(np.argmax(offsets > max(region.size - size, -1)))
            where = int(offsets[first].astype(np.int64))
            self.fault(
                f"{size} bytes at byte {where} of {region.name}, which has {region.size}", address, threads, first
            )
        if int(np.bitwise_or.reduce(offsets)) & (size - 1):
            first = int(np.argmax(offsets & np.uint64(size - 1) != 0))
            self.fault(
                f"misaligned: {size} bytes at byte {int(offsets[first])} of {region.name}", address, threads, first
            )
        if store and not region.writable:
            self.fault(f"store to read-only {region.name}", address, threads, 0)
        offsets = offsets.astype(np.int64)
        return Part(region, offsets if region.part is None else offsets + region.part[threads] * region.size, threads)

    def fault(self, what: str, address: Array, threads: Array, first: int) -> None:
        who = self.machine.name_of(int(threads[first if len(address) > 1 else 0]))
        raise PTXError(f"{who} accesses {self.space} address {int(address[first]):#x}: {what}")

    def load(self, space: str, address: Array, dtype: np.dtype, count: int) -> list[Array]:
        """Load count numbers for each active thread; a single element of each if all get the same from one address."""
        size = dtype.itemsize * count
        total = np.zeros((self.machine.count, count)[: 1 + (count > 1)], dtype)
        for region, offsets, threads in self.parts(space, address, size):
            if region is self.windows["shared"]:
                self.watch.read(offsets, size, threads)
            rows = region.view(dtype, count)[offsets // size]
            if (len(rows) == 1 and len(address) == 1) or len(rows) == self.machine.count:
                total = rows
            else:
                total[threads] = rows
        return [total] if count == 1 else list(np.ascontiguousarray(total.T))

    def store(self, space: str, address: Array, values: list[Array]) -> None:
        """Store one or several numbers for each active thread; of two to the same place the last thread's stays."""
        size = values[0].itemsize * len(values)
        for region, offsets, threads in self.parts(space, address, size, store=True):
            places = np.broadcast_to(offsets, len(threads))
            if region is self.windows["shared"]:
                self.watch.write(places, size, threads)
            chosen = [value if len(value) == 1 else value[threads] for value in values]
            rows = chosen[0] if len(values) == 1 else np.stack(np.broadcast_arrays(*chosen), axis=-1)
            region.view(values[0].dtype, len(values))[places // size] = rows
