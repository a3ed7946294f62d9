"""What the attention kernels share: which rows a block works on, which part of the keys, and where results go."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, uint32

from qattn.cache_types import padded
from qattn.cuda import ptx
from qattn.cuda.attend_variant import EMPTY
from qattn.cuda.kernel import device
from qattn.cuda.warps import ALL_LANES

LN2 = 0.6931471805599453
SHARED = 98 << 10  # bytes of shared memory that a block may have beside a few fixed ones, on every GPU from 8.0 on
COLUMNS = 256  # elements of values at most whose sums a warp has registers for
SPLIT_BLOCK = 64  # keys: capacities are multiples of it, and so are the ranges that keys are split into


class Heads(NamedTuple):
    """The sizes of heads, as tensor cores take them."""

    head_dim: int
    value_dim: int

    @property
    def key_size(self) -> int:
        """Elements of keys, zeros behind the last included."""
        return padded(self.head_dim)

    @property
    def slices(self) -> int:
        """Blocks that share the elements of values, of which each computes all scores anew."""
        return -(-self.value_dim // COLUMNS)

    @property
    def columns(self) -> int:
        """Elements of values that a block adds up."""
        return padded(-(-self.value_dim // self.slices))

    @property
    def last_column(self) -> int:
        """Where the last slice begins: maybe within the one before, and what both compute is the same."""
        return padded(self.value_dim) - self.columns


class Results(NamedTuple):
    """Where kernels write: rows are tokens · heads, those of parts have an element for each part."""

    out: Any
    lse: Any
    parts_out: Any
    parts_lse: Any


RESULTS = (Results, "f32* f32* f32* f32*")
"""For a kernel's signature."""


@device
def find_tile(row_offsets, sequences, tile, group, rows, least, most):
    """(sequence, tile in it): number `tile` of the tiles of `rows` rows of all sequences; (-1, 0) if there are fewer.

    A sequence has a row for each of its new tokens and each of `group` query heads; sequences with other than
    least … most new tokens have none.  All lanes of a warp look together, at 32 sequences at a time.
    """
    lane = int32(cuda.threadIdx.x & 31)
    found, within, passed, start = int32(-1), int32(0), int32(0), int32(0)
    while start < sequences and found < 0:
        s = int32(start + lane)
        count = int32(0)
        if s < sequences:
            new = int32(row_offsets[s + 1] - row_offsets[s])
            if new >= least and new <= most:
                count = int32(uint32(new * group + rows - 1) // uint32(rows))
        total = count
        for step in (1, 2, 4, 8, 16):
            other = int32(cuda.shfl_up_sync(ALL_LANES, total, step))
            if lane >= step:
                total = int32(total + other)
        hit = cuda.ballot_sync(ALL_LANES, passed + total > tile)
        if hit != 0:
            first = int32(cuda.ffs(hit) - 1)
            found = int32(start + first)
            within = int32(tile - passed - cuda.shfl_sync(ALL_LANES, int32(total - count), first))
        passed = int32(passed + cuda.shfl_sync(ALL_LANES, total, 31))
        start = int32(start + 32)
    return found, within


@device
def part_of(low, high, part, parts):
    """(first, end) of one part of the keys low … high - 1, which are cut into at most `parts` at multiples of 64."""
    low = int32(low & ~(SPLIT_BLOCK - 1))
    each = int32(uint32(max(high - low, 0) + parts - 1) // uint32(parts))
    each = int32((max(each, 1) + SPLIT_BLOCK - 1) & ~(SPLIT_BLOCK - 1))
    first = int32(low + part * each)
    return first, int32(min(high, first + each))


@device
def row_min(value):
    """The least over the rows of an mma fragment, which lie in lanes 4 r + c, for each lane."""
    for step in (4, 8, 16):
        value = int32(min(value, int32(cuda.shfl_xor_sync(ALL_LANES, value, step))))
    return value


@device
def row_max(value):
    """The largest, likewise."""
    for step in (4, 8, 16):
        value = int32(max(value, int32(cuda.shfl_xor_sync(ALL_LANES, value, step))))
    return value


@device
def quad_max(value):
    """The largest over the four lanes that hold a row of an mma fragment, for each of them."""
    for step in (1, 2):
        value = max(value, cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value


@device
def quad_sum(value):
    """Their sum, likewise."""
    for step in (1, 2):
        value = float32(value + cuda.shfl_xor_sync(ALL_LANES, value, step))
    return value


@device
def natural_lse(peak, total):
    """The natural logarithm of Σ exp, from the largest score and the sum in units of log 2; -inf if nothing is seen."""
    bits = ptx.bits_of(float32((peak + ptx.log2(max(total, float32(1e-37)))) * float32(LN2)))
    return ptx.float_of(bits if total > float32(0) else 0xFF800000)


@device
def part_lse(peak, total):
    """What a part tells `merge`: the logarithm of its sum in units of log 2, `EMPTY` if it saw nothing, or NaN."""
    return float32(peak + ptx.log2(total)) if ptx.bits_of(total) != 0 else float32(EMPTY)


@device
def inverse(total):
    """1 / total, or 0 where nothing was seen."""
    return float32(1) / total if total > float32(0) else float32(0)


@device
def find_sequence(row_offsets, sequences, token):
    """The sequence of a token: how many later ones begin at or before it."""
    count, s = int32(0), int32((cuda.threadIdx.x & 31) + 1)
    while s < sequences:
        count = int32(count + (1 if row_offsets[s] <= token else 0))
        s = int32(s + 32)
    for step in (16, 8, 4, 2, 1):
        count = int32(count + cuda.shfl_xor_sync(ALL_LANES, count, step))
    return count


@device
def row_at(token, flat, group, heads, first_head):
    """The row of q (tokens · heads, …) that row `flat` of a sequence and KV head is: its tokens begin at `token`."""
    new = int32(uint32(flat) // uint32(group))
    return (token + new) * heads + int32(first_head + flat - new * group)


@device
def leave_empty(token, group, heads, first_head, first_row, last_row, part, parts, results):
    """Note that this part of a tile of 16 rows saw nothing."""
    flat = int32(first_row + cuda.threadIdx.x)
    if cuda.threadIdx.x < 16 and flat <= last_row:
        results.parts_lse[row_at(token, flat, group, heads, first_head) * parts + part] = float32(EMPTY)
