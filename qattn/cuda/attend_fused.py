"""A decode step's rotary embedding, its write to the cache and its attention, in one launch.

It is `qattn.cuda.attend_decode`, whose blocks rotate their queries themselves, straight from the projected rows to
shared memory.  The new key and value are written by the blocks that have its place among their keys: they read it back
behind a barrier, as any other, and no other block looks at it.  So the rows need not go through memory in between, and
the bits are those of the two steps one after the other.
"""

from __future__ import annotations

import functools

from numba import cuda, float32, int32, int64, uint16, uint32

from qattn.cache_types import stride as row_stride
from qattn.cuda import ptx
from qattn.cuda.attend_decode import ROWS, Sizes, finisher, walker
from qattn.cuda.attend_tiles import RESULTS, SPLIT_BLOCK, leave_empty, part_of, row_at
from qattn.cuda.attend_variant import GIVEN, Storage, Variant, bases_of, bounds_of, scores_of
from qattn.cuda.heads import STEPS
from qattn.cuda.kernel import Kernel, kernel
from qattn.cuda.rope import BATCH, prepare_and_store, prepare_and_turn


@functools.cache
def fused_kernel(storage: Storage, variant: Variant, head_dim: int, value_dim: int, prepared: bool = False) -> Kernel:
    """The kernel for a cache of these kinds, of 16 bits, and heads of these sizes; launched with `Sizes.launch`.

    There are at least two warps, and a block adds up whole values.  Heads that have to be `prepared` are so where
    keys and values will come: no copy of these has begun.

    Block (tile · kv_heads + head, part): each token has as many tiles as its group needs.
    """
    sizes = Sizes(head_dim, value_dim)
    bounds, stride, sums, warps = bounds_of(variant.mask), sizes.query_stride, sizes.columns // 2, sizes.warps
    (row_of, _, _), (base_of, _), sinking = scores_of(variant), bases_of(variant.paged), int(variant.sinks)
    walk, finish = walker(storage, variant, sizes), finisher(sizes)
    key_size, key_stride = sizes.key_size, row_stride(storage.keys, head_dim)
    value_stride = row_stride(storage.values, value_dim)
    turn, store = prepare_and_turn(storage.keys, prepared), prepare_and_store(storage.values, prepared)
    ring, own = sizes.ring // 4, max(head_dim, value_dim)

    @kernel(
        "f32* i32 steps f32* f32* i32 i32 batch cache i64* f32 results i32 i32 given",
        f"{storage.key}_{variant.key}_{head_dim}_{value_dim}{'_prepared' if prepared else ''}",
        steps=STEPS, batch=BATCH, cache=storage.memory, results=RESULTS, given=GIVEN,
    )  # fmt: skip
    def fused(qkv, width, steps, cos, sin, half, neox, batch, cache, lengths, scale, results, heads, parts, given):
        shared, queries = cuda.shared.array(0, float32, 16), cuda.shared.array(0, uint16, 16)
        o, state = cuda.local.array(sums, float32), cuda.local.array(4, float32)
        kv_heads = cache.kv_heads
        group, part = int32(uint32(heads) // uint32(kv_heads)), int32(cuda.blockIdx.y)
        number = uint32(uint32(cuda.blockIdx.x) // uint32(kv_heads))
        head = int32(cuda.blockIdx.x - number * uint32(kv_heads))
        tiles = uint32(uint32(group + ROWS - 1) // uint32(ROWS))
        token = int64(number // tiles)
        first_row, last_row = int32((number - uint32(token) * tiles) * ROWS), int32(group - 1)
        first_head = int32(head * group)

        # Others may count the new token in meanwhile: it makes no difference here.
        slot, place = batch.slots[token], int32(batch.places[token])
        angles = cos, sin, batch.angles[token], half, neox
        length = int32(max(lengths[slot], batch.places[token] + 1))
        if part == 0 and head == 0 and first_row == 0 and cuda.threadIdx.x == 0:
            ptx.atomic_max_64(lengths, slot, batch.places[token] + 1)
        low, high = bounds(given, int32(length - 1), length)
        first, end = part_of(low, high, part, parts)
        # A key that the mask hides from its own token is written by the first part.
        hidden = place < low & ~(SPLIT_BLOCK - 1) or place >= high
        writes = (place >= first and place < end) or (part == 0 and hidden)

        row = token * width
        warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        room = uint32(ring + warp * own)
        if writes and warp >= warps - 2:
            there = base_of(cache, slot, head, place) + place
            if warp == warps - 2:
                column = int32((heads + head) * head_dim)
                turn(
                    qkv, row, column, 1, steps, angles, int32(head_dim), float32(1), cache.keys, there * key_stride,
                    shared, room,
                )  # fmt: skip
            else:
                column = int32((heads + kv_heads) * head_dim + head * value_dim)
                store(qkv, row, column, steps, int32(value_dim), cache.values, there * value_stride, shared, room)
        if parts > 1 and first >= end and part >= sinking:
            leave_empty(token, group, heads, first_head, first_row, last_row, part, parts, results)
            return

        m = warp
        while m < ROWS:
            d = lane
            if first_row + m <= last_row:
                d = int32(head_dim + lane)
                column = int32((first_head + first_row + m) * head_dim)
                turn(
                    qkv, row, column, 0, steps, angles, int32(head_dim), scale, queries, uint32(m * stride),
                    shared, room,
                )  # fmt: skip
            while d < key_size:
                queries[uint32(m * stride + d)] = uint16(0)
                d = int32(d + 32)
            m = int32(m + warps)
        cuda.syncthreads()
        low, high = int32(max(low, first)), int32(min(high, end))
        r, shift = int32(first_row + (cuda.threadIdx.x >> 2 & 7)), int32(length - 1 - token)
        rows = (
            row_of(given, row_at(token, int32(min(r, last_row)), group, heads, first_head), heads, shift),
            row_of(given, row_at(token, int32(min(r + 8, last_row)), group, heads, first_head), heads, shift),
        )
        walk(cache, slot, head, uint32(0), first, end, low, high, low, high, part, given, rows, shared, o, state)
        finish(
            o, state, shared, token, token, group, heads, first_head, first_row, last_row, uint32(0), part, parts,
            results,
        )  # fmt: skip

    return fused
