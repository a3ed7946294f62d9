"""What a block of `qattn.cuda.attend_prefill` has in shared memory, and how keys, values and rows get there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, float32, int64, uint32

from qattn.cache_types import stride
from qattn.cuda import ptx
from qattn.cuda.attend_codes import in_codes, octets
from qattn.cuda.attend_tiles import SHARED, Heads
from qattn.cuda.attend_variant import Variant
from qattn.cuda.kernel import device

_SHAPES = (4, 32), (4, 16), (2, 16)  # warps, and keys of a step: beside two tiles' sums, 64 leave no registers
MOST_ROWS = 128  # of a block


class Sizes(NamedTuple):
    """How a block of a kernel for these heads is laid out: in shared memory that every GPU has, if that can be."""

    heads: Heads
    reads: bool = False
    """Whether scores gain what is read from memory, for which two tiles leave no registers."""

    @classmethod
    def of(cls, variant: Variant, head_dim: int, value_dim: int) -> Sizes:
        """For a kernel's options."""
        return cls(Heads(head_dim, value_dim), variant.bias or variant.distances)

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows for each warp: two, so that what it reads of keys and values serves twice, if they fit."""
        return 2 if max(self.heads.key_size, self.heads.columns) <= 128 and not self.reads else 1

    @property
    def _shape(self) -> tuple[int, int]:
        return next((shape for shape in _SHAPES if self._shared(*shape) <= SHARED), _SHAPES[-1])

    @property
    def warps(self) -> int:
        return self._shape[0]

    @property
    def step(self) -> int:
        """Keys of a step."""
        return self._shape[1]

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.tiles

    @property
    def key_row(self) -> int:
        """Bytes between keys in shared memory."""
        return 2 * self.heads.key_size + 16

    @property
    def value_row(self) -> int:
        return 2 * self.heads.columns + 16

    @property
    def stage(self) -> int:
        """Bytes of the keys and values of a step."""
        return self.step * (self.key_row + self.value_row)

    def _shared(self, warps: int, step: int) -> int:
        """Bytes of two steps, and q."""
        return 2 * step * (self.key_row + self.value_row) + 32 * warps * self.tiles * self.heads.key_size

    @property
    def fits(self) -> bool:
        """Whether every GPU has the shared memory."""
        return self._shared(*self._shape) <= SHARED

    def launch(self) -> dict[str, int]:
        """The block and the shared memory of a launch."""
        return {"block": 32 * self.warps, "shared": self._shared(*self._shape)}


@functools.cache
def _octets_of(count: int, each: int, threads: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (has, mine): which of `count` octets, `each` of a key, a thread has in a round from i on."""

    @device
    def mine(i):
        """The key, and which of its octets."""
        if threads % each == 0:  # rounds are at fixed distances
            key = uint32(uint32(cuda.threadIdx.x) // uint32(each))
            return uint32(key + uint32(i // each)), uint32(cuda.threadIdx.x - key * uint32(each))
        key = uint32(uint32(cuda.threadIdx.x + i) // uint32(each))
        return key, uint32(cuda.threadIdx.x + i - key * uint32(each))

    @device
    def has(i):
        return i + threads <= count or cuda.threadIdx.x < count - i

    return has, mine


@functools.cache
def mover(kind: str, size: int, taken: int, row: int, sizes: Sizes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (bring, unfold) for a block: `taken` elements of each of a step's keys or values of `size`.

    bring(there, at, column, to) begins to copy those from `column` on to shared memory, `row` bytes each: as they are,
    or the codes of each octet to a slot of its thread, which unfold(from_, column, to) makes float16 of.
    """
    each, threads, between = taken // 8, 32 * sizes.warps, stride(kind, size)
    count = sizes.step * each
    has, mine = _octets_of(count, each, threads)

    @device
    def bring(there, at, column, to):
        for i in range(0, count, threads):
            if has(i):
                key, octet = mine(i)
                from_ = at + int64(uint32(key * uint32(between) + octet * uint32(8) + column))
                ptx.copy_async_16(there, from_, uint32(to + key * uint32(row) + octet * uint32(16)))

    @device
    def nothing(from_, column, to):
        pass

    if not in_codes(kind):
        return bring, nothing
    begin, pairs = octets(kind, size)

    @device
    def slot(start, i):
        """The first of a thread's words in a round, and how far apart they are: side by side with those of others."""
        return uint32(start + uint32(16 * i) + uint32(4 * cuda.threadIdx.x)), 4 * min(threads, count - i)

    @device
    def bring_codes(there, at, column, to):
        for i in range(0, count, threads):
            if has(i):
                (key, octet), (into, step) = mine(i), slot(to, i)
                octet = uint32(octet + (column >> 3))
                begin(there, at + int64(uint32(key * uint32(between))), octet >> 2, octet & 3, into, step)

    @device
    def unfold(from_, column, to):
        for i in range(0, count, threads):
            if has(i):
                (key, octet), (at, step) = mine(i), slot(from_, i)
                into, octet = uint32(to + key * uint32(row) + octet * uint32(16)), uint32(octet + (column >> 3))
                a, b, c, d = pairs(at, step, octet >> 2, octet & 3)
                ptx.store_shared_16(into, a, b, c, d)

    return bring_codes, unfold


@functools.cache
def pair_at(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (read, write) for two neighbours, d and d + 1, of a row of so many float32."""
    if size % 16 == 0:

        @device
        def read(x, row, d):
            first, second = ptx.load_8(x, row + int64(d))
            return ptx.float_of(first), ptx.float_of(second)

        @device
        def write(x, row, d, first, second):
            ptx.store_8(x, row + int64(d), ptx.bits_of(first), ptx.bits_of(second))

        return read, write

    @device
    def read_some(x, row, d):
        """What lies behind the row is 0."""
        first = x[row + int64(d)] if d < size else float32(0)
        second = x[row + int64(d + 1)] if d + 1 < size else float32(0)
        return first, second

    @device
    def write_some(x, row, d, first, second):
        if d < size:
            x[row + int64(d)] = first
        if d + 1 < size:
            x[row + int64(d + 1)] = second

    return read_some, write_some
