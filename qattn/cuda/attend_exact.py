"""Attention in float32, for caches of any type and heads of any size: the exact path.

A block takes rows of one sequence and KV head, four for each of its warps, and walks the keys 32 at a time.  The keys
of a step come to shared memory 64 elements of each at a time.  For the scores a lane is a key, for the sums of values
it is an element of the output, which lies in shared memory as well, so that no size is a part of the kernel.  What all
lanes multiply with, queries and weights, they read four at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint32

from qattn.cuda import ptx
from qattn.cuda.attend_codes import element_of, stride_of
from qattn.cuda.attend_tiles import RESULTS, find_tile, inverse, natural_lse, part_lse, part_of, row_at
from qattn.cuda.attend_variant import (
    GIVEN,
    HIDDEN,
    Storage,
    Variant,
    bases_of,
    bounds_of,
    scores_of,
    sees_of,
)
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.warps import warp_max, warp_sum

ROWS = 4  # of a warp
KEYS = 32  # of a step: a lane each
CHUNK = 64  # elements of each key that are in shared memory at a time
STRIDE = CHUNK + 1  # odd, so that 32 lanes reach 32 banks
_SHARED = 96 << 10  # bytes that a block has on every GPU from 8.0 on


class Sizes(NamedTuple):
    """How a block for these heads is laid out."""

    head_dim: int
    value_dim: int

    @property
    def warps(self) -> int:
        """As many as have room for their rows of q and of the output, up to four."""
        return next((warps for warps in (4, 2) if self._bytes(warps) <= _SHARED), 1)

    def _bytes(self, warps: int) -> int:
        return 4 * (ROWS * warps * (-(-self.head_dim // 4) * 4 + self.value_dim + KEYS) + KEYS * STRIDE)

    def launch(self) -> dict[str, int]:
        """The block and the shared memory of a launch."""
        return {"block": 32 * self.warps, "shared": self._bytes(self.warps)}


@functools.cache
def _bring(kind: str) -> Callable[..., Any]:
    """A device function for a block: elements start … start + 63 of 32 keys to shared memory; 0 behind the last."""
    stride, element = stride_of(kind), element_of(kind)

    @device
    def bring(there, first, size, start, shared):
        cuda.syncthreads()
        between = stride(size)
        at, i = first * between, int32(cuda.threadIdx.x)
        while i < KEYS * CHUNK:
            key, d = int32(i >> 6), int32((i & 63) + start)
            value = float32(0)
            if d < size:
                value = element(there, at + key * between, size, d)
            shared[uint32(key * STRIDE + (i & 63))] = value
            i = int32(i + cuda.blockDim.x)
        cuda.syncthreads()

    return bring


@functools.cache
def _score(kind: str) -> Callable[..., Any]:
    """A device function: s = the products of the warp's rows with the lane's key."""
    bring_keys = _bring(kind)

    @device
    def score(keys, key, head_dim, row, tile, queries, s):
        """queries : the shared address of all rows"""
        lane, stride = int32(cuda.threadIdx.x & 31), int32((head_dim + 3) & ~3)
        for m in range(ROWS):
            s[m] = float32(0)
        start = int32(0)
        while start < head_dim:
            bring_keys(keys, key, head_dim, start, tile)
            d, end = int32(0), int32(min(CHUNK, head_dim - start))
            while d < end:
                at_d = uint32(lane * STRIDE + d)
                k0, k1, k2, k3 = tile[at_d], tile[at_d + 1], tile[at_d + 2], tile[at_d + 3]
                for m in range(ROWS):
                    q0, q1, q2, q3 = ptx.load_shared_16(queries + uint32(4 * ((row + m) * stride + start + d)))
                    s[m] = float32(s[m] + ptx.float_of(q0) * k0 + ptx.float_of(q1) * k1)
                    s[m] = float32(s[m] + ptx.float_of(q2) * k2 + ptx.float_of(q3) * k3)
                d = int32(d + 4)
            start = int32(start + CHUNK)

    return score


@functools.cache
def _collect(kind: str) -> Callable[..., Any]:
    """A device function: sums = sums · factor + weights · values for the warp's rows."""
    bring_values = _bring(kind)

    @device
    def collect(values, key, value_dim, row, tile, weights, sums, factor):
        """weights : a shared address"""
        total = cuda.local.array(ROWS, float32)
        start = int32(0)
        while start < value_dim:
            bring_values(values, key, value_dim, start, tile)
            d = int32(cuda.threadIdx.x & 31)
            while d < CHUNK and d + start < value_dim:
                for m in range(ROWS):
                    total[m] = float32(sums[uint32((row + m) * value_dim + start + d)] * factor[m])
                n = int32(0)
                while n < KEYS:
                    at_d = uint32(n * STRIDE + d)
                    v0, v1, v2, v3 = tile[at_d], tile[at_d + STRIDE], tile[at_d + 2 * STRIDE], tile[at_d + 3 * STRIDE]
                    for m in range(ROWS):
                        p0, p1, p2, p3 = ptx.load_shared_16(weights + uint32(4 * ((row + m) * KEYS + n)))
                        total[m] = float32(total[m] + ptx.float_of(p0) * v0 + ptx.float_of(p1) * v1)
                        total[m] = float32(total[m] + ptx.float_of(p2) * v2 + ptx.float_of(p3) * v3)
                    n = int32(n + 4)
                for m in range(ROWS):
                    sums[uint32((row + m) * value_dim + start + d)] = total[m]
                d = int32(d + 32)
            start = int32(start + CHUNK)

    return collect


@functools.cache
def _looker(mask: Any) -> Callable[..., Any]:
    """A device function: (first, end) of the keys that any of a block's rows sees, and that each of the warp's does."""
    bounds = bounds_of(mask)

    @device
    def look(given, first_row, rows, last_row, group, before, length, row, firsts, ends):
        low, high, m = int32(length), int32(0), int32(0)
        while m < rows:
            flat = uint32(min(first_row + m, last_row))
            first, end = bounds(given, int32(before + flat // uint32(group)), length)
            low, high = int32(min(low, first)), int32(max(high, end))
            m = int32(m + 1)
        for m in range(ROWS):
            flat = uint32(min(first_row + row + m, last_row))
            firsts[m], ends[m] = bounds(given, int32(before + flat // uint32(group)), length)
        return low, high

    return look


@device
def _hold(q, at, scale, head_dim, stride, shared, row, value_dim, sums):
    """A row of q, which begins at q[at], to shared memory; and its sums, which are 0."""
    d = int32(cuda.threadIdx.x & 31)
    while d < stride:
        shared[uint32(row * stride + d)] = float32(q[at + d] * scale) if d < head_dim else float32(0)
        d = int32(d + 32)
    d = int32(cuda.threadIdx.x & 31)
    while d < value_dim:
        sums[uint32(row * value_dim + d)] = float32(0)
        d = int32(d + 32)


@device
def _finish(sums, row, value_dim, peak, whole, to, parts, results):
    """Write a row, or what a part of the keys gives it."""
    lane = int32(cuda.threadIdx.x & 31)
    if lane == 0:
        if parts > 1:
            results.parts_lse[to] = part_lse(peak, whole)
        else:
            results.lse[to] = natural_lse(peak, whole)
    each, d = inverse(whole), lane
    while d < value_dim:
        value = float32(sums[uint32(row * value_dim + d)] * each)
        if parts > 1:
            results.parts_out[to * value_dim + d] = value
        else:
            results.out[to * value_dim + d] = value
        d = int32(d + 32)


@functools.cache
def exact_kernel(storage: Storage, variant: Variant) -> Kernel:
    """The kernel for a cache of these kinds."""
    look, sees = _looker(variant.mask), sees_of(variant.mask)
    score, collect = _score(storage.keys), _collect(storage.values)
    (row_of, change, sink_of), (base_of, base_for) = scores_of(variant, precise=True), bases_of(variant.paged)

    @kernel(
        "f32* cache i64* i64* f32 results i32 i32 i32 i32 i32 i32 given",
        f"{storage.key}_{variant.key}",
        cache=storage.memory, results=RESULTS, given=GIVEN,
    )  # fmt: skip
    def exact(q, cache, row_offsets, lengths, scale, results, sequences, heads, head_dim, value_dim, few, parts, given):
        shared = cuda.shared.array(0, float32, 16)
        rows, warp, lane = int32(cuda.blockDim.x >> 3), int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        stride = int32((head_dim + 3) & ~3)
        sums, weights = shared[rows * stride :], shared[rows * (stride + value_dim) :]
        tile = shared[rows * (stride + value_dim + KEYS) :]
        queries_at, weights_at = ptx.shared_address(shared, 0), ptx.shared_address(weights, 0)
        group, part = int32(uint32(heads) // uint32(cache.kv_heads)), int32(cuda.blockIdx.y)
        number = uint32(uint32(cuda.blockIdx.x) // uint32(cache.kv_heads))
        head = int32(cuda.blockIdx.x - number * uint32(cache.kv_heads))
        sequence, first_row = find_tile(row_offsets, sequences, int32(number), group, rows, 1, 0x7FFFFFFF)
        if sequence < 0:
            return
        new = int32(row_offsets[sequence + 1] - row_offsets[sequence])
        if new > few:
            if part > 0:
                return
            parts = int32(1)
        length = int32(lengths[sequence])
        shift = int32(length - new - row_offsets[sequence])
        first_row = int32(first_row * rows)
        last_row = int32(new * group - 1)

        # The warp's rows, copies of the last where there are no more, and what each sees.
        row = int32(warp * ROWS)
        firsts, ends = cuda.local.array(ROWS, int32), cuda.local.array(ROWS, int32)
        low, high = look(given, first_row, rows, last_row, group, int32(length - new), length, row, firsts, ends)
        first, end = part_of(low, high, part, parts)
        targets = cuda.local.array(ROWS, int64)
        for m in range(ROWS):
            firsts[m], ends[m] = int32(max(firsts[m], first)), int32(min(ends[m], end))
            flat = int32(min(first_row + row + m, last_row))
            targets[m] = row_at(row_offsets[sequence], flat, group, heads, int32(head * group))
            _hold(q, targets[m] * head_dim, scale, head_dim, stride, shared, int32(row + m), value_dim, sums)

        # The online softmax, in units of log 2.
        s, factor = cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32)
        peak, total = cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32)
        for m in range(ROWS):
            peak[m] = sink_of(given, row_of(given, targets[m], heads, shift), part == 0)
            total[m] = float32(1) if lane == 0 and peak[m] > float32(HIDDEN) else float32(0)
        key = first
        base = base_of(cache, sequence, head, int32(min(key, max(end - 1, 0))))
        while key < end:
            base = base_for(cache, sequence, head, key, base)
            score(cache.keys, base + key, head_dim, row, tile, queries_at, s)
            for m in range(ROWS):
                here = row_of(given, targets[m], heads, shift)
                seen = key + lane >= firsts[m] and key + lane < ends[m] and sees(given, here.query, key + lane)
                value = change(given, here, s[m], key + lane) if seen else float32(HIDDEN)
                largest = max(peak[m], warp_max(value))
                p = ptx.exp2(float32(value - largest)) if seen else float32(0)
                factor[m] = ptx.exp2(float32(peak[m] - largest))
                total[m] = float32(total[m] * factor[m] + p)
                peak[m] = largest
                weights[uint32((row + m) * KEYS + lane)] = p
            collect(cache.values, base + key, value_dim, row, tile, weights_at, sums, factor)
            key = int32(key + KEYS)

        for m in range(ROWS):
            whole = warp_sum(total[m])
            if first_row + row + m <= last_row:
                to = targets[m]
                if parts > 1:  # if only single tokens have any, parts have room for one of each sequence
                    if few == 1:
                        to += (sequence - row_offsets[sequence]) * heads
                    to = to * parts + part
                _finish(sums, int32(row + m), value_dim, peak[m], whole, to, parts, results)

    return exact
