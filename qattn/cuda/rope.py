"""Rotary embedding, fused with the write of keys and values into the cache, and with what happens to heads before.

A warp works on one head of one token, and hands each element to whoever asked.  `qattn.cuda.attend_fused` asks as well,
so that a decode step needs no kernel of its own for this.  Where heads are scaled, shifted, clamped or normalized, a
warp does that in shared memory; the kernels for heads that aren't know nothing of it.
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
from qattn.cuda.heads import NO_STEPS, STEPS, Steps, finish_head, norm_head, turns_first
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
    `angles` are the tables of cosines and sines, the row in them, how many they have, and whether pairs are `neox`.
    """
    put = narrow_for(kind)

    @device
    def run(x, row, angles, head_dim, factor, target, to):
        cos, sin, angle, half, neox = angles
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


@functools.cache
def prepare_and_turn(kind: str, prepared: bool) -> Callable[..., Any]:
    """A device function for one warp: what `turn_head` does, to the head of a row that begins at `column`.

    It is one of q or of k, part 0 or 1.  If it has to be `prepared`, see `qattn.cuda.heads`, that happens in `room`, in
    the elements from `start` on.
    """
    turn, turn_there = turn_head(kind), turn_head("f32")

    @device
    def directly(x, row, column, part, steps, angles, head_dim, factor, target, to, room, start):
        turn(x, row + column, angles, head_dim, factor, target, to)

    @device
    def by_room(x, row, column, part, steps, angles, head_dim, factor, target, to, room, start):
        cos, sin, angle, half, neox = angles
        finish_head(x, row, column, head_dim, steps, room, start)
        if turns_first(steps):
            cuda.syncwarp()
            turn_there(room, start, angles, head_dim, float32(1), room, start)
            cuda.syncwarp()
            half = int32(0)  # is left to turn
        norm_head(column, head_dim, part, angle, steps, room, start)
        cuda.syncwarp()
        turn(room, start, (cos, sin, angle, half, neox), head_dim, factor, target, to)

    return by_room if prepared else directly


@functools.cache
def prepare_and_store(kind: str, prepared: bool) -> Callable[..., Any]:
    """A device function for one warp: what `store_value` does, to the value of a row that begins at `column`."""
    store = store_value(kind)

    @device
    def directly(x, row, column, steps, value_dim, values, to, room, start):
        store(x, row + column, value_dim, values, to)

    @device
    def by_room(x, row, column, steps, value_dim, values, to, room, start):
        finish_head(x, row, column, value_dim, steps, room, start)
        norm_head(column, value_dim, 2, 0, steps, room, start)
        cuda.syncwarp()
        store(room, start, value_dim, values, to)

    return by_room if prepared else directly


_turn = turn_head("f32")


@kernel("f32* f32* f32* i64* f32* i32 i32 i32 i32 i32 i32")
def _rotate(x, cos, sin, positions, out, count, heads, head_dim, width, half, neox):
    unit = int32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5))
    if unit < count:
        token = int32(uint32(unit) // uint32(heads))
        row = int64(token) * width + (unit - token * heads) * head_dim
        _turn(x, row, (cos, sin, positions[token], half, neox), head_dim, float32(1), out, row)


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
def _store_key(kind: str, prepared: bool) -> Callable[..., Any]:
    """A device function for one warp: a head is rotated and becomes a key; blocks by way of `room`."""
    if not cache_types.of_kind(kind).in_blocks:
        return prepare_and_turn(kind, prepared)
    turn, encode = prepare_and_turn("f32", prepared), encode_row(kind)

    @device
    def in_blocks(x, row, column, part, steps, angles, head_dim, factor, keys, to, room, start):
        turn(x, row, column, part, steps, angles, head_dim, factor, room, start, room, start)
        cuda.syncwarp()
        encode(room, start, head_dim, keys, to)

    return in_blocks


@functools.cache
def store_kernel(storage: Storage, paged: bool = False, prepared: bool = False) -> Kernel:
    """The kernel of `rotate_and_store`: a warp for each head of q, k and v of each token."""
    turn, put_key, put_value, (base_of, _) = (
        prepare_and_turn("f32", prepared), _store_key(storage.keys, prepared),
        prepare_and_store(storage.values, prepared), bases_of(paged),
    )  # fmt: skip
    key_stride, value_stride = stride_of(storage.keys), stride_of(storage.values)

    @kernel(
        "f32* i32 steps f32* f32* i32 i32 batch cache i64* f32* i32 i32 i32 i32 i32",
        f"{storage.key}{'_paged' if paged else ''}{'_prepared' if prepared else ''}",
        steps=STEPS, batch=BATCH, cache=storage.memory,
    )  # fmt: skip
    def store(
        qkv, width, steps, cos, sin, half, neox, batch, cache, lengths, q, tokens, heads, head_dim, value_dim, own
    ):  # fmt: skip
        """`own` elements of room for each warp."""
        room = cuda.shared.array(0, float32)
        warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        work, start = int32(cuda.blockIdx.x * WARPS + warp), uint32(warp * own)
        kv_heads = cache.kv_heads
        units = int32(heads + 2 * kv_heads)
        token = int32(uint32(work) // uint32(units))
        unit = int32(work - token * units)
        if token < tokens:
            row, column = int64(token) * width, int32(unit * head_dim)
            angles = cos, sin, batch.angles[token], half, neox
            if unit < heads:
                to = (int64(token) * heads + unit) * head_dim
                turn(qkv, row, column, 0, steps, angles, head_dim, float32(1), q, to, room, start)
            else:
                slot, place, head = batch.slots[token], batch.places[token], int32(unit - heads)
                if head < kv_heads:
                    to = (base_of(cache, slot, head, place) + place) * key_stride(head_dim)
                    put_key(qkv, row, column, 1, steps, angles, head_dim, float32(1), cache.keys, to, room, start)
                else:
                    head = int32(head - kv_heads)
                    to = (base_of(cache, slot, head, place) + place) * value_stride(value_dim)
                    column = int32(column + head * (value_dim - head_dim))
                    put_value(qkv, row, column, steps, value_dim, cache.values, to, room, start)
                    if head == 0 and lane == 0:
                        ptx.atomic_max_64(lengths, slot, place + 1)

    return store


def rotate_and_store(
    storage: Storage, qkv: Array, cos: Array, sin: Array, batch: Batch, neox: bool, cache: Any, lengths: Array,
    q: Array, steps: Steps = NO_STEPS,
) -> None:  # fmt: skip
    """Rotate the queries and keys of projected rows, and append keys and values to a cache of these kinds.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim) or more) float32, the projected rows
    cos, sin : (positions, rope_dims / 2) float32;  neox : pairs are (i, i + rope_dims / 2), else (2i, 2i + 1)
    batch : `Batch`;  cache : CacheView, written;  lengths : (sequences,) int64, the new tokens counted in
    q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    steps : what happens to heads before
    Cost: one launch that reads qkv once and writes q and the new keys and values.  Nothing depends on what the arrays
    hold, so a CUDA graph can keep it.
    """
    tokens, heads, head_dim = q.shape
    there, prepared = Memory.of(cache), steps.flags != 0
    in_room = prepared or cache_types.of_kind(storage.keys).in_blocks
    room = max(head_dim, cache.value_dim) if in_room else 0
    store_kernel(storage, there.each > 1, prepared)(
        qkv, qkv.shape[1], steps, cos, sin, cos.shape[1], int(neox), batch, there, lengths, q, tokens, heads, head_dim,
        cache.value_dim, room,
        grid=-(-tokens * (heads + 2 * there.kv_heads) // WARPS), block=32 * WARPS, shared=4 * WARPS * room,
    )  # fmt: skip
