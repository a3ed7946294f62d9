"""Attention of few new tokens, as fast as K and V can be read.

A warp works on 16 keys at a time, and its lanes exchange nothing that they read.  Tensor cores want certain small
pieces of keys and values in each lane, but do not care in which order a sum runs, nor which column is which:

- q·k sums over a head's elements, in any order.  So lane 4 r + c takes the 16 bytes of key r that hold its elements
  8 c … 8 c + 7, and they serve as the right factors of two products over 16 elements, if q is arranged alike.
- p·v sums over keys.  The lane takes 16 bytes, elements 8 r … 8 r + 7, of keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9, which
  is where the scores have their columns.  Two of a lane's keys are shuffled bytewise into the pairs of the right
  factor: column r of product j is element 8 r + j of the output.

So all copies are of 16 bytes, and all bytes of a sector that is read are used.  They go to shared memory without
waiting, to slots that only the same lane reads, so that no barrier is needed: while a warp works on a step, its next
one is on its way, 8 KiB for heads of 128.  Heads that are no multiple of 64 end with narrower pieces of the same kind.

Heads of any size are padded with zeros to a multiple of 16.  Where values are longer than 256, blocks share their
elements, and each computes all scores: then keys are read once for each of these blocks.

A tile has 16 rows whether they exist or not: those that don't are zeros, and are dropped.  Tensor cores do that idle
work in the time of waiting.  The warps take turns at the keys of a block, and their sums are joined at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32

from qattn.cache_types import stride
from qattn.cuda import ptx
from qattn.cuda.attend_codes import piece
from qattn.cuda.attend_tiles import (
    RESULTS,
    SHARED,
    Heads,
    find_tile,
    inverse,
    leave_empty,
    natural_lse,
    part_lse,
    part_of,
    quad_max,
    quad_sum,
    row_at,
    row_max,
    row_min,
)
from qattn.cuda.attend_variant import (
    EMPTY,
    GIVEN,
    HIDDEN,
    Storage,
    Variant,
    bases_of,
    bounds_of,
    computed,
    scores_of,
    sees_of,
)
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.values import narrow_for

ROWS = 16  # of a tile
KEYS = 16  # of a warp's step
_SLOT = 32 * 16  # bytes: one load of each lane
_LOW, _HIGH = 0x5410, 0x7632  # the first, and the second, 16 bits of two registers


class Sizes(Heads):
    """How a block of a kernel for these heads is laid out."""

    @property
    def warps(self) -> int:
        """Fewer for long heads, so that a block takes 64 KiB of shared memory, and a multiprocessor three blocks."""
        both = self.key_size + self.columns
        return 4 if both <= 256 else 2 if both <= 512 else 1

    @property
    def query_stride(self) -> int:
        """Elements between rows of q in shared memory: 8 lanes, four of each of two rows, reach all banks."""
        return (self.key_size + 31) // 64 * 64 + 32

    @property
    def key_slots(self) -> int:
        """Loads of each lane for 16 keys."""
        return 2 * (self.key_size // 32 + self.key_size % 32 // 16)

    @property
    def pieces(self) -> tuple[int, int, int, int, int]:
        """How many pieces of 64, of 32 and of 16 elements there are, and where those of 32 and of 16 begin."""
        wide, rest4, rest2 = self.columns // 64, self.columns % 64 // 32, self.columns % 32 // 16
        return wide, rest4, rest2, 64 * wide, 64 * wide + 32 * rest4

    @property
    def stage(self) -> int:
        """Bytes that the keys and values of a warp's step take."""
        return (self.key_slots + 4 * sum(self.pieces[:3])) * _SLOT

    @property
    def ring(self) -> int:
        """Where in shared memory, in bytes, two steps of each warp begin; later the warps' sums."""
        return 2 * ROWS * self.query_stride

    @property
    def peaks(self) -> int:
        """Where each warp's largest scores begin, and behind them its sums of weights."""
        return self.ring + self.warps * max(2 * self.stage, 4 * ROWS * self.columns)

    @property
    def fits(self) -> bool:
        """Whether every GPU has the shared memory."""
        return self.launch()["shared"] <= SHARED

    def launch(self) -> dict[str, int]:
        """The block and the shared memory of a launch."""
        return {"block": 32 * self.warps, "shared": self.peaks + 8 * self.warps * ROWS}


def product(kind: str) -> Any:
    """The tensor cores' product for keys or values of that kind."""
    return ptx.mma_bf16 if computed(kind) == "bf16" else ptx.mma_f16


def pack(kind: str) -> Any:
    """Two float32 → two numbers in a register that they can be multiplied with."""
    return ptx.pack_bf16 if computed(kind) == "bf16" else ptx.pack_f16


@functools.cache
def _key_steps(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (bring, multiply): 16 keys to a lane's slots at a shared address, and their products with q."""
    size, mma = sizes.key_size, product(kind)
    full, half, row, between = size // 32, size % 32 // 16, 2 * sizes.query_stride, stride(kind, size)
    (begin8, taken8), (begin4, taken4) = piece(kind, size, 8), piece(kind, size, 4)

    @device
    def bring(keys, at, r, c, to):
        """The first key begins at keys[at]."""
        there = at + int64(uint32(r * between))
        for i in range(full):
            for tile in range(2):
                begin8(keys, there + 8 * between * tile, 8 * c, 32 * i, to + uint32((2 * i + tile) * _SLOT))
        if half:
            for tile in range(2):
                begin4(keys, there + 8 * between * tile, 4 * c, 32 * full, to + uint32((2 * full + tile) * _SLOT))

    @device
    def multiply(queries, from_, r, c, s):
        """s = q · k for rows r and r + 8 and eight keys twice; `queries` is the shared address of q."""
        for i in range(8):
            s[i] = float32(0)
        for i in range(full):
            there = uint32(queries + uint32(row) * r + uint32(16) * c + uint32(64 * i))
            q0, q1, q2, q3 = ptx.load_shared_16(there)
            p0, p1, p2, p3 = ptx.load_shared_16(there + uint32(8 * row))
            for tile in range(2):
                k0, k1, k2, k3 = taken8(from_ + uint32((2 * i + tile) * _SLOT), 8 * c, 32 * i)
                t = 4 * tile
                s[t], s[t + 1], s[t + 2], s[t + 3] = mma(q0, p0, q1, p1, k0, k1, s[t], s[t + 1], s[t + 2], s[t + 3])
                s[t], s[t + 1], s[t + 2], s[t + 3] = mma(q2, p2, q3, p3, k2, k3, s[t], s[t + 1], s[t + 2], s[t + 3])
        if half:
            there = uint32(queries + uint32(row) * r + uint32(8) * c + uint32(64 * full))
            q0, q1 = ptx.load_shared_8(there)
            p0, p1 = ptx.load_shared_8(there + uint32(8 * row))
            for tile in range(2):
                k0, k1 = taken4(from_ + uint32((2 * full + tile) * _SLOT), 4 * c, 32 * full)
                t = 4 * tile
                s[t], s[t + 1], s[t + 2], s[t + 3] = mma(q0, p0, q1, p1, k0, k1, s[t], s[t + 1], s[t + 2], s[t + 3])

    return bring, multiply


@functools.cache
def _value_steps(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (bring, multiply): 16 values to slots, and their sums into `o`.

    They are about the block's `columns` of values, which begin at `column`.  A piece of a value is 64 elements, 8 for
    each r, or at the end 32 or 16, 4 or 2 for each.  `o` holds four sums for each eight elements.
    """
    size, mma, between, slots = sizes.value_dim, product(kind), stride(kind, sizes.value_dim), sizes.key_slots * _SLOT
    wide, rest4, rest2, start4, start2 = sizes.pieces
    slot4, slot2 = slots + 4 * wide * _SLOT, slots + 4 * (wide + rest4) * _SLOT
    (begin8, taken8), (begin4, taken4), (begin2, taken2) = (piece(kind, size, width) for width in (8, 4, 2))

    @device
    def bring(values, at, r, c, column, to):
        """The first value begins at values[at]."""
        for i in range(4):
            there = at + int64(uint32((2 * c + i % 2 + i // 2 * 8) * between))
            for n in range(wide):
                begin8(values, there, column + 8 * r, 64 * n, to + uint32(slots + (4 * n + i) * _SLOT))
            if rest4:
                begin4(values, there, column + 4 * r, start4, to + uint32(slot4 + i * _SLOT))
            if rest2:
                begin2(values, there, column + 2 * r, start2, to + uint32(slot2 + i * _SLOT))

    @device
    def add_products(p, v, count, o, first):
        """Products of 16 keys' weights with `count` columns for each r."""
        for j in range(8):
            if j < count:
                w, to, half = j // 2, first + 4 * j, uint32(_HIGH if j % 2 else _LOW)
                left, right = ptx.permute(v[w], v[4 + w], half), ptx.permute(v[8 + w], v[12 + w], half)
                o[to], o[to + 1], o[to + 2], o[to + 3] = mma(
                    p[0], p[1], p[2], p[3], left, right, o[to], o[to + 1], o[to + 2], o[to + 3]
                )

    @device
    def multiply(p, from_, v, r, column, o):
        """`v` has room for a lane's 16 words of a piece: w-th words of the four keys are w, 4 + w, 8 + w and 12 + w."""
        for n in range(wide):
            for i in range(4):
                there = from_ + uint32(slots + (4 * n + i) * _SLOT)
                v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3] = taken8(there, column + 8 * r, 64 * n)
            add_products(p, v, 8, o, 32 * n)
        if rest4:
            for i in range(4):
                v[4 * i], v[4 * i + 1] = taken4(from_ + uint32(slot4 + i * _SLOT), column + 4 * r, start4)
            add_products(p, v, 4, o, start4 // 2)
        if rest2:
            for i in range(4):
                (v[4 * i],) = taken2(from_ + uint32(slot2 + i * _SLOT), column + 2 * r, start2)
            add_products(p, v, 2, o, start2 // 2)

    return bring, multiply


@functools.cache
def _spread(sizes: Sizes) -> Callable[..., Any]:
    """A device function: a warp's sums, times a factor for each row, in order: sums (16, columns)."""
    columns, (wide, rest4, rest2, start4, start2) = sizes.columns, sizes.pieces

    @device
    def spread_piece(o, width, start, factor0, factor1, sums, r, c):
        for j in range(width):
            a, to = start // 2 + 4 * j, uint32(r * columns + 2 * width * c + (start + j))
            sums[to], sums[to + width] = o[a] * factor0, o[a + 1] * factor0
            to = uint32(to + uint32(8 * columns))
            sums[to], sums[to + width] = o[a + 2] * factor1, o[a + 3] * factor1

    @device
    def spread(o, factor0, factor1, sums, r, c):
        for n in range(wide):
            spread_piece(o, 8, 64 * n, factor0, factor1, sums, r, c)
        if rest4:
            spread_piece(o, 4, start4, factor0, factor1, sums, r, c)
        if rest2:
            spread_piece(o, 2, start2, factor0, factor1, sums, r, c)

    return spread


@functools.cache
def _softmax(change: Callable[..., Any], sees: Callable[..., Any]) -> Callable[..., Any]:
    """A device function: scores of rows r and r + 8 → weights in their place; and by what that before shrinks."""

    @device
    def weigh(s, key, given, rows, first0, end0, first1, end1, state):
        """key : of the first column, 2 c;  state : peaks and sums of both rows"""
        peak0, peak1 = state[0], state[1]
        row0, row1 = rows
        for i in range(8):
            at = int32(key + i // 4 * 8 + i % 2)
            if i % 4 < 2:
                changed = change(given, row0, s[i], at)
                s[i] = changed if at >= first0 and at < end0 and sees(given, row0.query, at) else float32(EMPTY)
                peak0 = max(peak0, s[i])
            else:
                changed = change(given, row1, s[i], at)
                s[i] = changed if at >= first1 and at < end1 and sees(given, row1.query, at) else float32(EMPTY)
                peak1 = max(peak1, s[i])
        peak0, peak1 = quad_max(peak0), quad_max(peak1)
        shrink0, shrink1 = ptx.exp2(float32(state[0] - peak0)), ptx.exp2(float32(state[1] - peak1))
        state[0], state[1] = peak0, peak1
        state[2], state[3] = state[2] * shrink0, state[3] * shrink1
        for i in range(8):
            s[i] = ptx.exp2(float32(s[i] - (peak0 if i % 4 < 2 else peak1)))
            state[2 + i % 4 // 2] += s[i]
        return shrink0, shrink1

    return weigh


@functools.cache
def walker(storage: Storage, variant: Variant, sizes: Sizes) -> Callable[..., Any]:
    """A device function: what a block does with its keys."""
    bring_keys, multiply_keys = _key_steps(storage.keys, sizes)
    bring_values, multiply_values = _value_steps(storage.values, sizes)
    (_, change, sink_of), (base_of, base_for) = scores_of(variant), bases_of(variant.paged)
    weigh, packed = _softmax(change, sees_of(variant.mask)), pack(storage.values)
    key_stride, value_stride = stride(storage.keys, sizes.head_dim), stride(storage.values, sizes.value_dim)
    columns, warps, stage, ring = sizes.columns, sizes.warps, sizes.stage, sizes.ring

    @device
    def walk(
        cache, sequence, head, column, first, end, first0, end0, first1, end1, part, given, rows, shared, o, state
    ):
        """Each warp its 16 keys of a block's step from `first` on: o and state, as fragments of rows r and r + 8."""
        s, p, v = cuda.local.array(8, float32), cuda.local.array(4, uint32), cuda.local.array(16, uint32)
        lane, r, c = uint32(cuda.threadIdx.x & 31), uint32(cuda.threadIdx.x >> 2 & 7), uint32(cuda.threadIdx.x & 3)
        warp = uint32(cuda.threadIdx.x >> 5)
        queries = ptx.shared_address(shared, 0)
        here = uint32(queries + uint32(ring) + warp * uint32(2 * stage) + lane * uint32(16))
        other = uint32(here + uint32(stage))
        key, step, last = int32(first + warp * KEYS), int32(KEYS * warps), int32(max(end - 1, 0))
        for i in range(columns // 2):
            o[i] = float32(0)
        for i in range(2):
            state[i] = sink_of(given, rows[i], warp == 0 and part == 0)
            state[2 + i] = float32(1) if c == 0 and state[i] > float32(HIDDEN) else float32(0)
        base = base_of(cache, sequence, head, int32(min(key, last)))
        if key < end:
            bring_keys(cache.keys, (base + key) * key_stride, r, c, here)
            bring_values(cache.values, (base + key) * value_stride, r, c, column, here)
        ptx.commit_copies()
        base = base_for(cache, sequence, head, int32(min(key + step, last)), base)
        while key < end:
            after = int32(key + step)
            if after < end:
                bring_keys(cache.keys, (base + after) * key_stride, r, c, other)
                bring_values(cache.values, (base + after) * value_stride, r, c, column, other)
            ptx.commit_copies()
            base = base_for(cache, sequence, head, int32(min(after + step, last)), base)  # early: others depend on it
            ptx.wait_for_older_copies()
            multiply_keys(queries, here, r, c, s)
            shrink0, shrink1 = weigh(s, int32(key + 2 * c), given, rows, first0, end0, first1, end1, state)
            for i in range(columns // 2):
                o[i] = o[i] * (shrink0 if i % 4 < 2 else shrink1)
            for i in range(4):
                p[i] = packed(s[2 * i], s[2 * i + 1])
            multiply_values(p, here, v, r, column, o)
            here, other = other, here
            key = after

    return walk


@functools.cache
def finisher(sizes: Sizes) -> Callable[..., Any]:
    """A device function: what a block does with the result."""
    value_dim, columns, warps, spread = sizes.value_dim, sizes.columns, sizes.warps, _spread(sizes)
    sums_at, peaks_at, size = sizes.ring // 4, sizes.peaks // 4, ROWS * columns

    @device
    def finish(
        o, state, shared, token, place, group, heads, first_head, first_row, last_row, column, part, parts, results
    ):
        """Join the warps' results, and write the rows; those of parts lie as if tokens began at `place`."""
        warp, r, c = uint32(cuda.threadIdx.x >> 5), uint32(cuda.threadIdx.x >> 2 & 7), uint32(cuda.threadIdx.x & 3)
        peaks, totals = shared[peaks_at : peaks_at + warps * ROWS], shared[peaks_at + warps * ROWS :]
        total0, total1 = quad_sum(state[2]), quad_sum(state[3])
        if c == 0:
            peaks[warp * ROWS + r], peaks[warp * ROWS + r + 8] = state[0], state[1]
            totals[warp * ROWS + r], totals[warp * ROWS + r + 8] = total0, total1
        cuda.syncthreads()  # and all have read the keys and values where the sums go
        peak0, peak1 = float32(HIDDEN), float32(HIDDEN)
        for w in range(warps):
            peak0 = max(peak0, peaks[uint32(w * ROWS) + r])
            peak1 = max(peak1, peaks[uint32(w * ROWS) + r + uint32(8)])
        factor0, factor1 = ptx.exp2(float32(state[0] - peak0)), ptx.exp2(float32(state[1] - peak1))
        spread(o, factor0, factor1, shared[sums_at + warp * size :], r, c)
        cuda.syncthreads()
        i = int32(cuda.threadIdx.x)
        while i < size:
            row = int32(uint32(i) // uint32(columns))
            d, flat = int32(i - row * columns + column), int32(first_row + row)
            if flat <= last_row and d < value_dim:
                peak, whole, value = float32(HIDDEN), float32(0), float32(0)
                for w in range(warps):
                    peak = max(peak, peaks[uint32(w * ROWS + row)])
                for w in range(warps):
                    at = uint32(w * ROWS + row)
                    whole = float32(whole + totals[at] * ptx.exp2(float32(peaks[at] - peak)))
                    value = float32(value + shared[uint32(sums_at + w * size + i)])
                value = float32(value * inverse(whole))
                to = row_at(place if parts > 1 else token, flat, group, heads, first_head)
                if parts > 1:
                    to = to * parts + part
                    results.parts_out[to * value_dim + d] = value
                    if d == 0:
                        results.parts_lse[to] = part_lse(peak, whole)
                else:
                    results.out[to * value_dim + d] = value
                    if d == 0:
                        results.lse[to] = natural_lse(peak, whole)
            i = int32(i + 32 * warps)

    return finish


@functools.cache
def decode_kernel(storage: Storage, variant: Variant, head_dim: int, value_dim: int) -> Kernel:
    """The kernel for a cache of these kinds, and heads of these sizes; launched with `Sizes.launch`."""
    sizes = Sizes(head_dim, value_dim)
    bounds, narrowed, sums = bounds_of(variant.mask), narrow_for(computed(storage.keys)), sizes.columns // 2
    stride, warps, sinking, key_size = sizes.query_stride, sizes.warps, int(variant.sinks), sizes.key_size
    slices, columns, last_column = sizes.slices, sizes.columns, sizes.last_column
    (row_of, _, _), walk, finish = scores_of(variant), walker(storage, variant, sizes), finisher(sizes)

    @kernel(
        "f32* cache i64* i64* f32 results i32 i32 i32 i32 given",
        f"{storage.key}_{variant.key}_{head_dim}_{value_dim}",
        cache=storage.memory, results=RESULTS, given=GIVEN,
    )  # fmt: skip
    def decode(q, cache, row_offsets, lengths, scale, results, sequences, heads, few, parts, given):
        shared, queries = cuda.shared.array(0, float32, 16), cuda.shared.array(0, uint16, 16)
        o, state = cuda.local.array(sums, float32), cuda.local.array(4, float32)
        group, part = int32(uint32(heads) // uint32(cache.kv_heads)), int32(cuda.blockIdx.y)
        unit = uint32(uint32(cuda.blockIdx.x) // uint32(slices))
        column = uint32(min(uint32(cuda.blockIdx.x - unit * uint32(slices)) * uint32(columns), uint32(last_column)))
        number = uint32(unit // uint32(cache.kv_heads))
        head = int32(unit - number * uint32(cache.kv_heads))
        sequence, tile = find_tile(row_offsets, sequences, int32(number), group, ROWS, 1, few)
        if sequence < 0:
            return
        token, length, first_head = row_offsets[sequence], int32(lengths[sequence]), int32(head * group)
        new = int32(row_offsets[sequence + 1] - token)
        place = int64(sequence) if few == 1 else token  # of parts, which then have room for a token of each sequence
        first_row, last_row = int32(tile * ROWS), int32(new * group - 1)

        # What rows r and r + 8 see, and the block's part of what its rows see.
        r, before = int32(first_row + (cuda.threadIdx.x >> 2 & 7)), int32(length - new)
        row0, row1 = int32(min(r, last_row)), int32(min(r + 8, last_row))
        first0, end0 = bounds(given, int32(before + uint32(row0) // uint32(group)), length)
        first1, end1 = bounds(given, int32(before + uint32(row1) // uint32(group)), length)
        first, end = part_of(row_min(min(first0, first1)), row_max(max(end0, end1)), part, parts)
        if parts > 1 and first >= end and part >= sinking:
            leave_empty(place, group, heads, first_head, first_row, last_row, part, parts, results)
            return

        row, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        while row < ROWS:
            flat, d = int32(first_row + row), lane
            from_ = row_at(token, int32(min(flat, last_row)), group, heads, first_head) * head_dim
            factor = scale if flat <= last_row else float32(0)
            while d < key_size:
                value = float32(q[from_ + d] * factor) if d < head_dim else float32(0)
                queries[uint32(row * stride + d)] = narrowed(value)
                d = int32(d + 32)
            row = int32(row + warps)
        cuda.syncthreads()
        rows = (
            row_of(given, row_at(token, row0, group, heads, first_head), heads, int32(before - token)),
            row_of(given, row_at(token, row1, group, heads, first_head), heads, int32(before - token)),
        )
        walk(
            cache, sequence, head, column, first, end, int32(max(first0, first)), int32(min(end0, end)),
            int32(max(first1, first)), int32(min(end1, end)), part, given, rows, shared, o, state,
        )  # fmt: skip
        finish(
            o, state, shared, token, place, group, heads, first_head, first_row, last_row, column, part, parts, results
        )

    return decode
