"""Attention of many new tokens, on tensor cores: flash attention (Dao, 2023).

A block has 128 rows, 32 for each of its four warps (half as many with heads longer than 128, or where scores gain a
bias), and walks the keys 32 at a time.  Very long heads leave room for 16 keys, or two warps.  A step:

1. wait for the step's keys and values, and for all warps to be done with the step before: a single barrier;
2. begin to copy the next step's to the other half of shared memory;
3. scores = q · k in a warp's registers; q and k come from shared memory as the tensor cores want them, and a piece of k
   serves both tiles of 16 rows;
4. the online softmax: a row lies in four lanes, and scores become weights where they are;
5. the output, in registers too, shrinks if a peak grew, and gains weights · v.  What a product of q and k leaves in a
   lane is what the next one takes as its left factor, so weights never leave the registers.

Rows are tokens times the heads of a group, whatever the group.  The block walks the keys that any of its rows sees; a
warp skips steps that none of its own rows sees, and asks which keys are hidden only where some are.  Blocks with the
most keys begin first.  Where tiles are few, several blocks share the keys of one, and leave their results to
`qattn.cuda.attention.merge`.  Keys in shared memory are 16 bytes further apart than they are long, so that eight of
them reach all banks.

Heads of any size are padded with zeros to a multiple of 16.  Where values are longer than 256, blocks share their
elements, and each computes all scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32

from qattn.cache_types import stride
from qattn.cuda import ptx
from qattn.cuda.attend_codes import in_codes
from qattn.cuda.attend_decode import pack, product
from qattn.cuda.attend_stage import Sizes as Sizes
from qattn.cuda.attend_stage import mover, pair_at
from qattn.cuda.attend_tiles import (
    RESULTS,
    find_tile,
    inverse,
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
    scores_of,
    sees_of,
)
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.warps import ALL_LANES


@functools.cache
def _scores(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Device functions (hold, multiply) for a warp: its rows of q as left factors, and their scores.

    A lane's part of a left factor is 16 bytes, which lie in shared memory lane by lane: [tile][step][lane].
    """
    steps, pairs, mma, packed = sizes.heads.key_size // 16, sizes.step // 16, product(kind), pack(kind)
    row, tiles, count, (read, _) = sizes.key_row, sizes.tiles, sizes.step // 2, pair_at(sizes.heads.head_dim)

    @device
    def hold(q, row, scale, to):
        """A row begins at q[row]; `to` is the shared address of the lane's first word of it, others lie 8 further."""
        start = uint32(2 * (cuda.threadIdx.x & 3))
        for i in range(2 * steps):
            first, second = read(q, row, start + uint32(8 * i))
            word = packed(float32(first * scale), float32(second * scale))
            ptx.store_shared_4(to + uint32(512 * (i // 2) + 8 * (i % 2)), word)

    @device
    def multiply(q_at, k_at, a, s):
        """s = the scores of a step; q_at and k_at are the lane's shared addresses."""
        for i in range(tiles * count):
            s[i] = float32(0)
        for step in range(steps):
            for m in range(tiles):
                there = q_at + uint32(512 * (steps * m + step))
                a[4 * m], a[4 * m + 1], a[4 * m + 2], a[4 * m + 3] = ptx.load_shared_16(there)
            for pair in range(pairs):
                k0, k1, k2, k3 = ptx.load_matrix(k_at + uint32(16 * row * pair + 32 * step))
                for m in range(tiles):
                    f, t = 4 * m, count * m + 8 * pair
                    s[t], s[t + 1], s[t + 2], s[t + 3] = mma(
                        a[f], a[f + 1], a[f + 2], a[f + 3], k0, k2, s[t], s[t + 1], s[t + 2], s[t + 3]
                    )
                    s[t + 4], s[t + 5], s[t + 6], s[t + 7] = mma(
                        a[f], a[f + 1], a[f + 2], a[f + 3], k1, k3, s[t + 4], s[t + 5], s[t + 6], s[t + 7]
                    )

    return hold, multiply


@functools.cache
def _looker(mask: Any, rows: int) -> Callable[..., Any]:
    """A device function: which keys a lane's rows see, each of them, and a warp's together."""
    bounds = bounds_of(mask)

    @device
    def look(given, first_row, last, group, before, length, seen, place, ranges, mine):
        """seen[place …] : the first key and the end for each row, 24 places apart
        ranges[mine …] : the least first key, the largest end, and between which keys all rows see all
        """
        lane, low, high, all_first, all_end = uint32(cuda.threadIdx.x & 31), length, int32(0), int32(0), length
        for row in range(rows):
            flat = uint32(min(first_row + 8 * row, last))
            first, end = bounds(given, int32(before + flat // group), length)
            low, high = int32(min(low, first)), int32(max(high, end))
            all_first, all_end = int32(max(all_first, first)), int32(min(all_end, end))
            if lane & 3 == 0:
                at = uint32(place + 24 * row)
                seen[at], seen[at + 1] = first, end
        low, high, all_first, all_end = row_min(low), row_max(high), row_max(all_first), row_min(all_end)
        if lane == 0:
            ranges[mine], ranges[mine + 1], ranges[mine + 2], ranges[mine + 3] = low, high, all_first, all_end

    return look


@functools.cache
def _place_of_score(count: int) -> Callable[..., Any]:
    """A device function: where a lane has score i, of `count`, of a row: 2 m and 2 m + 1 are r and r + 8 of tile m."""

    @device
    def at(row, i):
        return row // 2 * (2 * count) + i // 2 * 4 + row % 2 * 2 + i % 2

    return at


def _settler(variant: Variant, sizes: Sizes) -> Callable[..., Any]:
    """A device function: scores change, and those of keys that a row doesn't see are hidden."""
    count, rows, at = sizes.step // 4, 2 * sizes.tiles, _place_of_score(sizes.step // 4)
    (row_of, change, _), sees, asks = scores_of(variant), sees_of(variant.mask), variant.sees

    @device
    def hidden(key, seen, place, given, heads, shift):
        """A bit for each score: whether the mask hides it.  A loop of its own, so that that of scores is unrolled."""
        bits, n = uint32(0), int32(0)
        while n < rows * count:
            row, i = int32(n // count), int32(n % count)
            there, k = uint32(place + 24 * row), int32(key + i // 2 * 8 + i % 2)
            target = int32(max(seen[there + 2], 0))
            within = k >= seen[there] and k < seen[there + 1]
            if within and not sees(given, row_of(given, target, heads, shift).query, k):
                bits = uint32(bits | uint32(1) << uint32(n))
            n = int32(n + 1)
        return bits

    @device
    def settle(s, key, seen, place, given, heads, shift):
        """key : the lane's first;  place : where in `seen` the bounds of the first row are"""
        bits = uint32(0)
        if asks:
            bits = hidden(key, seen, place, given, heads, shift)
        for row in range(rows):
            there = uint32(place + 24 * row)
            first, end, target = seen[there], seen[there + 1], int32(max(seen[there + 2], 0))
            this = row_of(given, target, heads, shift)
            for i in range(count):
                k = int32(key + i // 2 * 8 + i % 2)
                changed = change(given, this, s[at(row, i)], k)
                shown = k >= first and k < end and bits & uint32(1 << (row * count + i)) == 0
                s[at(row, i)] = changed if shown else float32(EMPTY)

    return settle


@functools.cache
def _softmax(count: int, rows: int) -> Callable[..., Any]:
    """A device function: scores → weights in their place, and the factors by which what came before shrinks."""
    at = _place_of_score(count)

    @device
    def weigh(s, peaks, totals, shrinks):
        for row in range(rows):
            peak = peaks[row]
            for i in range(count):
                peak = max(peak, s[at(row, i)])
            peak = quad_max(peak)
            shrinks[row] = ptx.exp2(float32(peaks[row] - peak))
            peaks[row] = peak
            total = float32(totals[row] * shrinks[row])
            for i in range(count):
                s[at(row, i)] = ptx.exp2(float32(s[at(row, i)] - peak))
                total = float32(total + s[at(row, i)])
            totals[row] = total

    return weigh


@functools.cache
def _collector(kind: str, sizes: Sizes) -> Callable[..., Any]:
    """A device function for a warp: its output shrinks, and gains weights · values."""
    columns, steps, mma, packed = sizes.heads.columns, sizes.step // 16, product(kind), pack(kind)
    pairs, stride, tiles, count, sums = columns // 16, sizes.value_row, sizes.tiles, sizes.step // 2, columns // 2

    @device
    def collect(s, shrinks, v_at, a, o):
        least = float32(1)
        for row in range(2 * tiles):
            least = min(least, shrinks[row])
        if cuda.any_sync(ALL_LANES, least < float32(1)):  # peaks of many keys seldom grow
            for m in range(tiles):
                for i in range(0, sums, 4):
                    t = sums * m + i
                    o[t], o[t + 1] = o[t] * shrinks[2 * m], o[t + 1] * shrinks[2 * m]
                    o[t + 2], o[t + 3] = o[t + 2] * shrinks[2 * m + 1], o[t + 3] * shrinks[2 * m + 1]
        for step in range(steps):
            for m in range(tiles):
                for i in range(4):
                    t = count * m + 8 * step + 2 * i
                    a[4 * m + i] = packed(s[t], s[t + 1])
            for pair in range(pairs):
                v0, v1, v2, v3 = ptx.load_matrix_transposed(v_at + uint32(16 * stride * step + 32 * pair))
                for m in range(tiles):
                    f, t = 4 * m, sums * m + 8 * pair
                    o[t], o[t + 1], o[t + 2], o[t + 3] = mma(
                        a[f], a[f + 1], a[f + 2], a[f + 3], v0, v1, o[t], o[t + 1], o[t + 2], o[t + 3]
                    )
                    o[t + 4], o[t + 5], o[t + 6], o[t + 7] = mma(
                        a[f], a[f + 1], a[f + 2], a[f + 3], v2, v3, o[t + 4], o[t + 5], o[t + 6], o[t + 7]
                    )

    return collect


@device
def _block_range(ranges, warps):
    """The least first key and the largest end of the warps' rows."""
    low, high = ranges[0], ranges[1]
    for w in range(4, 4 * warps, 4):
        low, high = int32(min(low, ranges[w])), int32(max(high, ranges[w + 1]))
    return low, high


@functools.cache
def _finisher(sizes: Sizes) -> Callable[..., Any]:
    """A device function: a lane writes what it has of its rows, or of a part of them."""
    value_dim, sums, rows = sizes.heads.value_dim, sizes.heads.columns // 2, 2 * sizes.tiles
    _, write = pair_at(value_dim)

    @device
    def finish(o, peaks, totals, seen, place, column, part, parts, results):
        """place : where in `seen` the bounds of the first row are"""
        lane = uint32(cuda.threadIdx.x & 3)
        for row in range(rows):
            total = quad_sum(totals[row])
            each, target = inverse(total), int64(seen[uint32(place + 24 * row + 2)])
            if target >= 0:
                out, to = results.out, target
                if parts > 1:
                    out, to = results.parts_out, target * parts + part
                if parts == 1 or ptx.bits_of(total) != 0:  # NaN, too
                    for i in range(0, sums, 4):
                        at, d = sums * (row // 2) + 2 * (row % 2) + i, uint32(column + 2 * lane + uint32(2 * i))
                        write(out, to * value_dim, d, float32(o[at] * each), float32(o[at + 1] * each))
                if lane == 0 and column == 0:
                    if parts > 1:
                        results.parts_lse[to] = part_lse(peaks[row], total)
                    else:
                        results.lse[target] = natural_lse(peaks[row], total)

    return finish


@functools.cache
def prefill_kernel(storage: Storage, variant: Variant, head_dim: int, value_dim: int) -> Kernel:
    """The kernel for a cache of these kinds, and heads of these sizes; launched with `Sizes.launch`."""
    sizes = Sizes.of(variant, head_dim, value_dim)
    warps, tiles, keys, stage, block_rows = sizes.warps, sizes.tiles, sizes.step, sizes.stage, sizes.rows
    key_size, columns = sizes.heads.key_size, sizes.heads.columns
    slices, last_column = sizes.heads.slices, sizes.heads.last_column
    rows, factors, all_scores, all_sums = 2 * tiles, 4 * tiles, tiles * keys // 2, tiles * columns // 2
    key_row, value_row, values_at = sizes.key_row, sizes.value_row, keys * sizes.key_row
    all_ranges, all_bounds = 4 * warps, 3 * block_rows

    (row_of, _, sink_of), (base_of, base_for) = scores_of(variant), bases_of(variant.paged)
    bring_keys, unfold_keys = mover(storage.keys, head_dim, key_size, key_row, sizes)
    bring_values, unfold_values = mover(storage.values, value_dim, columns, value_row, sizes)
    key_stride, value_stride = stride(storage.keys, head_dim), stride(storage.values, value_dim)
    coded_keys, coded_values = in_codes(storage.keys), in_codes(storage.values)
    (hold, multiply), collect = _scores(storage.keys, sizes), _collector(storage.values, sizes)
    look, settle, weigh = _looker(variant.mask, rows), _settler(variant, sizes), _softmax(keys // 4, rows)
    changing = any((variant.cap, variant.slopes, variant.bias, variant.distances, variant.sees))
    finish = _finisher(sizes)

    @kernel(
        "f32* cache i64* i64* f32 results i32 i32 i32 i32 given",
        f"{storage.key}_{variant.key}_{head_dim}_{value_dim}",
        cache=storage.memory, results=RESULTS, given=GIVEN,
    )  # fmt: skip
    def prefill(q, cache, row_offsets, lengths, scale, results, sequences, heads, few, parts, given):
        shared, ranges = cuda.shared.array(0, uint16, 16), cuda.shared.array(all_ranges, int32)  # by warp: see below
        a, s, o = (
            cuda.local.array(factors, uint32),
            cuda.local.array(all_scores, float32),
            cuda.local.array(all_sums, float32),
        )
        seen = cuda.shared.array(all_bounds, int32)  # by row: its first key, the end, and where it is in q; or -1
        peaks, totals, shrinks = (
            cuda.local.array(rows, float32),
            cuda.local.array(rows, float32),
            cuda.local.array(rows, float32),
        )
        group, block = uint32(uint32(heads) // uint32(cache.kv_heads)), uint32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        unit = uint32(block // uint32(slices))
        column = uint32(min(uint32(block - unit * uint32(slices)) * uint32(columns), uint32(last_column)))
        number = uint32(unit // uint32(cache.kv_heads))
        head = int32(unit - number * uint32(cache.kv_heads))
        sequence, tile = find_tile(
            row_offsets, sequences, int32(number), int32(group), block_rows, int32(few + 1), 0x7FFFFFFF
        )
        if sequence < 0:
            return
        token, length = row_offsets[sequence], int32(lengths[sequence])
        new = int32(row_offsets[sequence + 1] - token)
        shift = int32(length - new - token)
        warp, lane, part = uint32(cuda.threadIdx.x >> 5), uint32(cuda.threadIdx.x & 31), int32(cuda.blockIdx.y)

        # The lane's rows, copies of the last where there are no more, and what they see.
        here = ptx.shared_address(shared, 0)
        q_lane = uint32(here + uint32(2 * stage) + warp * uint32(32 * tiles * key_size) + lane * uint32(16))
        local_row = uint32(warp * (16 * tiles) + (lane >> 2))
        last, first_row = int32(new * group - 1), int32(tile * block_rows + local_row)
        mine, place = uint32(4 * warp), uint32(3 * local_row)
        for row in range(rows):
            flat = int32(min(first_row + 8 * row, last))
            target = row_at(token, flat, group, heads, int32(head * group))
            if lane & 3 == 0:
                seen[uint32(place + 24 * row + 2)] = int32(target) if first_row + 8 * row <= last else int32(-1)
            peaks[row] = sink_of(given, row_of(given, target, heads, shift), part == 0)
            totals[row] = float32(1) if lane & 3 == 0 and peaks[row] > float32(HIDDEN) else float32(0)
            hold(q, target * head_dim, scale, q_lane + uint32(32 * key_size * (row // 2) + 4 * (row % 2)))
        look(given, first_row, last, group, int32(length - new), length, seen, place, ranges, mine)
        cuda.syncthreads()
        key, end = _block_range(ranges, warps)
        if parts > 1:
            key, end = part_of(key, end, part, parts)
        key = int32(key & ~(keys - 1))

        # The lane's rows of 8 × 8 matrices: two of keys, times two of elements.
        k_lane = uint32(lane & 15) * uint32(key_row) + uint32((lane >> 4) * 16)
        v_lane = uint32(lane & 15) * uint32(value_row) + uint32((lane >> 4) * 16)
        # Two places for a step's keys, and for its values.  They take turns; but codes always come to the second.
        k_here, v_here = here, here + uint32(values_at)
        k_other, v_other = k_here + uint32(stage), v_here + uint32(stage)
        base = base_of(cache, sequence, head, int32(min(key, max(end - 1, 0))))
        if key < end:
            bring_keys(cache.keys, (base + key) * key_stride, uint32(0), k_other if coded_keys else k_here)
            bring_values(cache.values, (base + key) * value_stride, column, v_other if coded_values else v_here)
        ptx.commit_copies()
        for i in range(all_sums):
            o[i] = float32(0)
        while key < end:
            ptx.wait_for_copies()
            cuda.syncthreads()
            if coded_keys or coded_values:
                unfold_keys(k_other, uint32(0), k_here)
                unfold_values(v_other, column, v_here)
                cuda.syncthreads()
            after = int32(key + keys)
            if after < end:
                base = base_for(cache, sequence, head, after, base)
                bring_keys(cache.keys, (base + after) * key_stride, uint32(0), k_other)
                bring_values(cache.values, (base + after) * value_stride, column, v_other)
            ptx.commit_copies()
            if key < ranges[mine + 1] and after > ranges[mine]:
                multiply(q_lane, k_here + k_lane, a, s)
                if changing or key < ranges[mine + 2] or after > ranges[mine + 3]:
                    settle(s, int32(key + 2 * (lane & 3)), seen, place, given, heads, shift)
                weigh(s, peaks, totals, shrinks)
                collect(s, shrinks, v_here + v_lane, a, o)
            key = after
            if not coded_keys:
                k_here, k_other = k_other, k_here
            if not coded_values:
                v_here, v_other = v_other, v_here

        finish(o, peaks, totals, seen, place, column, part, parts, results)

    return prefill
