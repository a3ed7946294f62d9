"""Rotary embedding, fused with the write of keys and values into the cache.

A warp works on one head of one token: it adds the bias, clamps, normalizes and rotates, and hands each element to
whoever asked.  `qattn.cuda.attend_decode` asks as well, so that a decode step needs no kernel of its own for this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint32

from qattn.batch import Batch
from qattn.cuda import ptx
from qattn.cuda.kernel import Kernel, device, kernel
from qattn.cuda.values import narrow_for
from qattn.cuda.warps import warp_sum

WARPS = 4  # heads per block
ELEMENT = {"f32": "f32", "f16": "u16", "bf16": "u16"}  # the kernel argument of a cache's element
NO_CLIP = 3e38  # above every finite float that matters; infinity would not survive fast math
BIAS, Q_NORM, K_NORM, NEOX = 1, 2, 4, 8  # bits of `flags`
Array = Any


@device
def element(x, row, column, bias, flags, clip):  # type: ignore[no-untyped-def]
    """An element of a projected row, with bias, and clamped."""
    value = x[row + column]
    if flags & BIAS:
        value = float32(value + bias[column])
    return min(max(value, float32(-clip)), clip)


@functools.cache
def turn_head(kind: str) -> Callable[..., Any]:
    """A device function for one warp: target[to + d] = factor · element d of a head that is normalized and rotated.

    The head lies in x[row + column] on.  Targets of kind "f32" take the values, others rounded ones.  `norm` is the bit
    of `flags` that says whether `weights` are given.
    """
    put = narrow_for(kind)

    @device
    def run(  # type: ignore[no-untyped-def]
        x, row, column, bias, clip, weights, norm, epsilon, cos, sin, angle, half, flags, head_dim, factor, target, to
    ):
        lane = int32(cuda.threadIdx.x & 31)
        scale = float32(1)
        if flags & norm:
            total = float32(0)
            d = lane
            while d < head_dim:
                value = element(x, row, column + d, bias, flags, clip)
                total = float32(total + value * value)
                d = int32(d + 32)
            scale = ptx.rsqrt(float32(warp_sum(total) / float32(head_dim) + epsilon))
        i = lane
        while i < half:
            a, b = int32(2 * i), int32(2 * i + 1)
            if flags & NEOX:
                a, b = int32(i), int32(i + half)
            first = float32(element(x, row, column + a, bias, flags, clip) * scale)
            second = float32(element(x, row, column + b, bias, flags, clip) * scale)
            if flags & norm:
                first = float32(first * weights[a])
                second = float32(second * weights[b])
            c, s = cos[angle * half + i], sin[angle * half + i]
            # opaque multiplications: the same bits, whatever the compiler makes of what surrounds them
            target[to + a] = put(ptx.multiply(float32(first * c - second * s), factor))
            target[to + b] = put(ptx.multiply(float32(first * s + second * c), factor))
            i = int32(i + 32)
        d = int32(2 * half + lane)
        while d < head_dim:
            value = float32(element(x, row, column + d, bias, flags, clip) * scale)
            if flags & norm:
                value = float32(value * weights[d])
            target[to + d] = put(ptx.multiply(value, factor))
            d = int32(d + 32)

    return run  # type: ignore[no-any-return]


@functools.cache
def store_value(kind: str) -> Callable[..., Any]:
    """A device function for one warp: a value, with bias and clamped, into values[to] on."""
    put = narrow_for(kind)

    @device
    def run(x, row, column, bias, clip, flags, value_dim, values, to):  # type: ignore[no-untyped-def]
        d = int32(cuda.threadIdx.x & 31)
        while d < value_dim:
            values[to + d] = put(element(x, row, column + d, bias, flags, clip))
            d = int32(d + 32)

    return run  # type: ignore[no-any-return]


_turn = turn_head("f32")


@kernel("f32* f32* f32* i64* f32* i32 i32 i32 i32 i32")
def _rotate(x, cos, sin, positions, out, count, heads, head_dim, half, flags):  # type: ignore[no-untyped-def]
    unit = int32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5))
    if unit < count:
        row = int64(unit) * head_dim
        _turn(
            x, row, int32(0), x, float32(NO_CLIP), x, int32(0), float32(0), cos, sin,
            positions[uint32(unit) // uint32(heads)], half, flags, head_dim, float32(1), out, row,
        )  # fmt: skip


def rotate(x: Array, cos: Array, sin: Array, positions: Array, neox: bool, out: Array) -> None:
    """out[t, h] = x[t, h] rotated by the angles of positions[t].

    x, out : (tokens, heads, head_dim) float32;  cos, sin : (positions, rope_dims / 2) float32
    positions : (tokens,) int64
    Cost: reads x once, writes out.
    """
    tokens, heads, head_dim = x.shape
    count, flags = tokens * heads, NEOX if neox else 0
    grid = -(-count // WARPS)
    _rotate(x, cos, sin, positions, out, count, heads, head_dim, cos.shape[1], flags, grid=grid, block=32 * WARPS)


@functools.cache
def store_kernel(kind: str) -> Kernel:
    """The kernel of `rotate_and_store`: a warp for each head of q, k and v of each token."""
    turn, turn_key, copy = turn_head("f32"), turn_head(kind), store_value(kind)

    @kernel(
        "f32* f32* f32 f32* f32* f32 f32* f32* i64* i64* i64* "
        f"{ELEMENT[kind]}* {ELEMENT[kind]}* i64* f32* i32 i32 i32 i32 i32 i32 i32 i32",
        kind,
    )
    def store(  # type: ignore[no-untyped-def]
        qkv, bias, clip, q_norm, k_norm, epsilon, cos, sin, slots, places, angles,
        keys, values, lengths, q, tokens, heads, kv_heads, head_dim, value_dim, capacity, half, flags,
    ):  # fmt: skip
        work, lane = int32(cuda.blockIdx.x * WARPS + (cuda.threadIdx.x >> 5)), int32(cuda.threadIdx.x & 31)
        units = int32(heads + 2 * kv_heads)
        token = int32(uint32(work) // uint32(units))
        unit = int32(work - token * units)
        if token < tokens:
            row = int64(token) * (units * head_dim + kv_heads * (value_dim - head_dim))
            if unit < heads:
                to = (int64(token) * heads + unit) * head_dim
                turn(
                    qkv, row, int32(unit * head_dim), bias, clip, q_norm, int32(Q_NORM), epsilon, cos, sin,
                    angles[token], half, flags, head_dim, float32(1), q, to,
                )  # fmt: skip
            else:
                slot, place = slots[token], places[token]
                head = int32(unit - heads)
                if head < kv_heads:
                    to = ((slot * kv_heads + head) * capacity + place) * head_dim
                    turn_key(
                        qkv, row, int32(unit * head_dim), bias, clip, k_norm, int32(K_NORM), epsilon, cos, sin,
                        angles[token], half, flags, head_dim, float32(1), keys, to,
                    )  # fmt: skip
                else:
                    head = int32(head - kv_heads)
                    to = ((slot * kv_heads + head) * capacity + place) * value_dim
                    column = int32((heads + kv_heads) * head_dim + head * value_dim)
                    copy(qkv, row, column, bias, clip, flags, value_dim, values, to)
                    if head == 0 and lane == 0:
                        ptx.atomic_max_64(lengths, slot, place + 1)

    return store


def flags_of(bias: Array, q_norm: Array, k_norm: Array, neox: bool) -> int:
    """What a kernel is given, as bits."""
    given = ((bias is not None, BIAS), (q_norm is not None, Q_NORM), (k_norm is not None, K_NORM), (neox, NEOX))
    return sum(bit for there, bit in given if there)


@functools.cache
def rotate_and_store(kind: str) -> Callable[..., None]:
    """For a cache of that kind: ``run(qkv, bias, clip, q_norm, k_norm, epsilon, cos, sin, batch, neox, cache, lengths, q)``.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim)) float32, the projected rows
    bias : one row, added to each, or None;  clip : what all elements are clamped to, ±; 0 or None for no bound
    q_norm, k_norm : (head_dim,) float32 weights of an RMS norm over each head, before the rotation, or None
    epsilon : added to the mean square
    cos, sin : (positions, rope_dims / 2) float32;  neox : pairs are (i, i + rope_dims / 2), else (2i, 2i + 1)
    batch : `Batch`;  cache : CacheView, written;  lengths : (sequences,) int64, the new tokens counted in
    q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    Cost: one launch that reads qkv once (twice from the L1 cache, if there is a norm) and writes q and the new keys and
    values.  Nothing depends on what the arrays hold, so a CUDA graph can keep it.
    """  # noqa: E501
    launch = store_kernel(kind)

    def run(
        qkv: Array, bias: Array, clip: float | None, q_norm: Array, k_norm: Array, epsilon: float, cos: Array,
        sin: Array, batch: Batch, neox: bool, cache: Any, lengths: Array, q: Array,
    ) -> None:  # fmt: skip
        tokens, heads, head_dim = q.shape
        _, kv_heads, capacity, value_dim = cache.values.shape
        launch(
            qkv, bias, clip or NO_CLIP, q_norm, k_norm, epsilon, cos, sin, batch.slots, batch.places, batch.angles,
            cache.keys, cache.values, lengths, q, tokens, heads, kv_heads, head_dim, value_dim, capacity,
            cos.shape[1], flags_of(bias, q_norm, k_norm, neox),
            grid=-(-tokens * (heads + 2 * kv_heads) // WARPS), block=32 * WARPS,
        )  # fmt: skip

    return run
