"""A decode step's rotary embedding, its write to the cache and its attention, in one launch.

It is `qattn.cuda.attend_decode`, whose blocks rotate their queries themselves, straight from the projected rows to
shared memory.  The new key and value are written by the blocks that have its place among their keys: they read it back
behind a barrier, as any other, and no other block looks at it.  So the rows need not go through memory in between, and
the bits are those of the two steps one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda, float32, int32, int64, uint16, uint32

from qattn.cuda import ptx
from qattn.cuda.attend_decode import ROWS, Sizes, block_steps
from qattn.cuda.attend_tiles import SPLIT_BLOCK, bounds_of, leave_empty, mask_key, part_of
from qattn.cuda.kernel import Kernel, kernel
from qattn.cuda.rope import K_NORM, Q_NORM, store_value, turn_head


@functools.cache
def fused_kernel(kind: str, mask: Any, head_dim: int, value_dim: int) -> Kernel:
    """The kernel for a cache of that kind, a mask, and heads of these sizes; launched with `Sizes.launch`.

    Block (tile · kv_heads + head, part): each token has as many tiles as its group needs.
    """
    sizes = Sizes(head_dim, value_dim)
    bounds, stride, sums, warps = bounds_of(mask), sizes.query_stride, value_dim // 2, sizes.warps
    walk, finish = block_steps(kind, sizes)
    turn, store = turn_head(kind), store_value(kind)

    @kernel(
        "f32* f32* f32 f32* f32* f32 f32* f32* i64* i64* i64* u16* u16* i64* f32 f32* f32* f32* f32* "
        "i32 i32 i32 i32 i32 i32 i32 i32 i32 i32",
        f"{kind}_{mask_key(mask)}_{head_dim}_{value_dim}",
    )
    def fused(  # type: ignore[no-untyped-def]
        qkv, bias, clip, q_norm, k_norm, epsilon, cos, sin, slots, places, angles,
        keys, values, lengths, scale, out, lse, partial_out, partial_lse,
        heads, kv_heads, capacity, half, flags, parts, f0, f1, f2, f3,
    ):  # fmt: skip
        shared, queries = cuda.shared.array(0, float32, 16), cuda.shared.array(0, uint16, 16)
        o, state = cuda.local.array(sums, float32), cuda.local.array(4, float32)
        group, part = int32(uint32(heads) // uint32(kv_heads)), int32(cuda.blockIdx.y)
        number = uint32(uint32(cuda.blockIdx.x) // uint32(kv_heads))
        head = int32(cuda.blockIdx.x - number * uint32(kv_heads))
        tiles = uint32(uint32(group + ROWS - 1) // uint32(ROWS))
        token = int64(number // tiles)
        first_row, last_row = int32((number - uint32(token) * tiles) * ROWS), int32(group - 1)
        first_head = int32(head * group)

        # Others may count the new token in meanwhile: it makes no difference here.
        slot, place = slots[token], int32(places[token])
        length = int32(max(lengths[slot], places[token] + 1))
        if part == 0 and head == 0 and first_row == 0 and cuda.threadIdx.x == 0:
            ptx.atomic_max_64(lengths, slot, places[token] + 1)
        low, high = bounds(f0, f1, f2, f3, int32(length - 1), length)
        first, end = part_of(low, high, part, parts)
        # A key that the mask hides from its own token is written by the first part.
        hidden = place < low & ~(SPLIT_BLOCK - 1) or place >= high
        writes = (place >= first and place < end) or (part == 0 and hidden)

        row = token * (heads * head_dim + kv_heads * (head_dim + value_dim))
        base = (slot * kv_heads + head) * capacity
        warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        if writes and warp == warps - 2:
            turn(
                qkv, row, int32((heads + head) * head_dim), bias, clip, k_norm, int32(K_NORM), epsilon, cos, sin,
                angles[token], half, flags, int32(head_dim), float32(1), keys, (base + place) * head_dim,
            )  # fmt: skip
        if writes and warp == warps - 1:
            column = int32((heads + kv_heads) * head_dim + head * value_dim)
            store(qkv, row, column, bias, clip, flags, int32(value_dim), values, (base + place) * value_dim)
        if parts > 1 and first >= end:
            leave_empty(token, group, heads, first_head, first_row, last_row, part, parts, partial_lse)
            return

        m = warp
        while m < ROWS:
            if first_row + m <= last_row:
                turn(
                    qkv, row, int32((first_head + first_row + m) * head_dim), bias, clip, q_norm, int32(Q_NORM),
                    epsilon, cos, sin, angles[token], half, flags, int32(head_dim), scale, queries, uint32(m * stride),
                )  # fmt: skip
            else:
                d = lane
                while d < head_dim:
                    queries[uint32(m * stride + d)] = uint16(0)
                    d = int32(d + 32)
            m = int32(m + warps)
        cuda.syncthreads()
        low, high = int32(max(low, first)), int32(min(high, end))
        walk(keys, values, base, first, end, low, high, low, high, shared, o, state)
        finish(
            o, state, shared, token, group, heads, first_head, first_row, last_row, part, parts,
            out, lse, partial_out, partial_lse,
        )  # fmt: skip

    return fused
