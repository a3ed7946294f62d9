"""Rotary embedding, fused with the write of keys and values into the cache.

A warp works on one head of one token, and hands each element to whoever asked.  `qattn.cuda.attend_fused` asks as well,
so that a decode step needs no kernel of its own for this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint32

from qattn import cache_types
from qattn.batch import Batch
from qattn.cuda import ptx
from qattn.cuda.attend_codes import stride_of
from qattn.cuda.attend_variant import Memory, Storage, bases_of
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.narrow import encode_row
from qattn.cuda.values import narrow_for

WARPS = 4  # heads per block
# What stays finite when it is rounded
_LARGEST = {"f32": 3e38, "f16": cache_types.LARGEST_F16, "bf16": 3e38, "f8": 448.0}
Array = Any


@functools.cache
def turn_head(kind: str) -> Callable[..., Any]:
    """A device function for one warp: target[to + d] = factor · element d of a head that is rotated.

    The head lies in x[row] on.  Targets of kind "f32" take the values, others rounded ones.  x may be the target.
    """
    put = narrow_for(kind)

    @device
    def run(x, row, cos, sin, angle, half, neox, head_dim, factor, target, to):
        i = int32(cuda.threadIdx.x & 31)
        while i < half:
            a, b = int32(2 * i), int32(2 * i + 1)
            if neox != 0:
                a, b = int32(i), int32(i + half)
            first, second = x[row + a], x[row + b]
            c, s = cos[angle * half + i], sin[angle * half + i]
            # opaque multiplications: the same bits, whatever the compiler makes of what surrounds them
            target[to + a] = put(ptx.multiply(float32(first * c - second * s), factor))
            target[to + b] = put(ptx.multiply(float32(first * s + second * c), factor))
            i = int32(i + 32)
        d = int32(2 * half + (cuda.threadIdx.x & 31))
        while d < head_dim:
            target[to + d] = put(ptx.multiply(x[row + d], factor))
            d = int32(d + 32)

    return run


@functools.cache
def store_value(kind: str) -> Callable[..., Any]:
    """A device function for one warp: (x, row, size, values, to): the value in x[row] on into values[to] on.

    NaN and infinity become finite, since 0, which the values of hidden keys are multiplied with, would not hide them.
    """
    if cache_types.of_kind(kind).in_blocks:
        return encode_row(kind)
    put, most = narrow_for(kind), _LARGEST[kind]

    @device
    def run(x, row, value_dim, values, to):
        d = int32(cuda.threadIdx.x & 31)
        while d < value_dim:
            values[to + d] = put(min(max(x[row + d], float32(-most)), float32(most)))
            d = int32(d + 32)

    return run


_turn = turn_head("f32")


@kernel("f32* f32* f32* i64* f32* i32 i32 i32 i32 i32 i32")
def _rotate(x, cos, sin, positions, out, count, heads, head_dim, width, half, neox):
    unit = int32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5))
    if unit < count:
        token = int32(uint32(unit) // uint32(heads))
        row = int64(token) * width + (unit - token * heads) * head_dim
        _turn(x, row, cos, sin, positions[token], half, neox, head_dim, float32(1), out, row)


def rotate(x: Array, cos: Array, sin: Array, positions: Array, neox: bool, out: Array) -> None:
    """out[t, h] = x[t, h] rotated by the angles of positions[t]; out may be x.

    x, out : (tokens, heads, head_dim) float32;  cos, sin : (positions, rope_dims / 2) float32
    positions : (tokens,) int64
    Cost: reads x once, writes out.
    """
    _, heads, head_dim = x.shape
    _launch_rotate(x, cos, sin, positions, out, heads, head_dim, heads * head_dim, neox)


def rotate_heads(rows: Array, heads: int, size: int, cos: Array, sin: Array, angles: Array, neox: bool) -> None:
    """Rotate the first `heads` heads of `size` elements of each row in place, by the angles of angles[t].

    rows : (tokens, columns) float32;  cos, sin : (positions, rope_dims / 2) float32
    """
    _launch_rotate(rows, cos, sin, angles, rows, heads, size, rows.shape[1], neox)


def _launch_rotate(
    x: Array, cos: Array, sin: Array, positions: Array, out: Array, heads: int, size: int, width: int, neox: bool
) -> None:
    count, half = len(x) * heads, cos.shape[1]
    _rotate(
        x, cos, sin, positions, out, count, heads, size, width, half, int(neox),
        grid=-(-count // WARPS), block=32 * WARPS,
    )  # fmt: skip


BATCH = (Batch, "i64* i64* i64* i64* i32")
"""For a kernel's signature."""


@functools.cache
def _store_key(kind: str) -> Callable[..., Any]:
    """A device function for one warp: a head is rotated and becomes a key, see `turn_head`; blocks by way of `room`."""
    turn = turn_head("f32" if cache_types.of_kind(kind).in_blocks else kind)
    if not cache_types.of_kind(kind).in_blocks:

        @device
        def directly(x, row, cos, sin, angle, half, neox, head_dim, keys, to, room):
            turn(x, row, cos, sin, angle, half, neox, head_dim, float32(1), keys, to)

        return directly
    encode = encode_row(kind)

    @device
    def in_blocks(x, row, cos, sin, angle, half, neox, head_dim, keys, to, room):
        start = uint32((cuda.threadIdx.x >> 5) * head_dim)
        turn(x, row, cos, sin, angle, half, neox, head_dim, float32(1), room, start)
        cuda.syncwarp()
        encode(room, start, head_dim, keys, to)

    return in_blocks


@functools.cache
def store_kernel(storage: Storage, paged: bool = False) -> Kernel:
    """The kernel of `rotate_and_store`: a warp for each head of q, k and v of each token."""
    turn, put_key, put_value, (base_of, _) = (
        turn_head("f32"), _store_key(storage.keys), store_value(storage.values), bases_of(paged)
    )  # fmt: skip
    key_stride, value_stride = stride_of(storage.keys), stride_of(storage.values)

    @kernel(
        "f32* i32 f32* f32* i32 i32 batch cache i64* f32* i32 i32 i32 i32",
        f"{storage.key}{'_paged' if paged else ''}",
        batch=BATCH, cache=storage.memory,
    )  # fmt: skip
    def store(qkv, width, cos, sin, half, neox, batch, cache, lengths, q, tokens, heads, head_dim, value_dim):
        room = cuda.shared.array(0, float32)
        work, lane = int32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)), int32(cuda.threadIdx.x & 31)
        kv_heads = cache.kv_heads
        units = int32(heads + 2 * kv_heads)
        token = int32(uint32(work) // uint32(units))
        unit = int32(work - token * units)
        if token < tokens:
            row = int64(token) * width + unit * head_dim
            angle = batch.angles[token]
            if unit < heads:
                to = (int64(token) * heads + unit) * head_dim
                turn(qkv, row, cos, sin, angle, half, neox, head_dim, float32(1), q, to)
            else:
                slot, place, head = batch.slots[token], batch.places[token], int32(unit - heads)
                if head < kv_heads:
                    to = (base_of(cache, slot, head, place) + place) * key_stride(head_dim)
                    put_key(qkv, row, cos, sin, angle, half, neox, head_dim, cache.keys, to, room)
                else:
                    head = int32(head - kv_heads)
                    to = (base_of(cache, slot, head, place) + place) * value_stride(value_dim)
                    put_value(qkv, row + head * int32(value_dim - head_dim), value_dim, cache.values, to)
                    if head == 0 and lane == 0:
                        ptx.atomic_max_64(lengths, slot, place + 1)

    return store


def rotate_and_store(
    storage: Storage, qkv: Array, cos: Array, sin: Array, batch: Batch, neox: bool, cache: Any, lengths: Array, q: Array
) -> None:
    """Rotate the queries and keys of projected rows, and append keys and values to a cache of these kinds.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim) or more) float32, the projected rows
    cos, sin : (positions, rope_dims / 2) float32;  neox : pairs are (i, i + rope_dims / 2), else (2i, 2i + 1)
    batch : `Batch`;  cache : CacheView, written;  lengths : (sequences,) int64, the new tokens counted in
    q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    Cost: one launch that reads qkv once and writes q and the new keys and values.  Nothing depends on what the arrays
    hold, so a CUDA graph can keep it.
    """
    tokens, heads, head_dim = q.shape
    there = Memory.of(cache)
    room = 4 * WARPS * head_dim if cache_types.of_kind(storage.keys).in_blocks else 0
    store_kernel(storage, paged=there.each > 1)(
        qkv, qkv.shape[1], cos, sin, cos.shape[1], int(neox), batch, there, lengths, q, tokens, heads, head_dim,
        cache.value_dim,
        grid=-(-tokens * (heads + 2 * there.kv_heads) // WARPS), block=32 * WARPS, shared=room,
    )  # fmt: skip
