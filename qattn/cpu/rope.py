"""Rotary position embedding, fused with the write of keys and values into the cache."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from qattn.cpu._jit import kernel
from qattn.cpu.attention import pack
from qattn.cpu.simd import LANES, micro_kernel


@numba.njit
def _rotate(x, out, cos, sin, neox):  # type: ignore[no-untyped-def]
    """out = x with its first 2 · len(cos) elements rotated in pairs (2i, 2i + 1), or (i, i + len(cos)) if neox."""
    half = cos.size
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        first, second = x[a], x[b]
        out[a] = first * cos[i] - second * sin[i]
        out[b] = first * sin[i] + second * cos[i]
    for i in range(2 * half, x.size):
        out[i] = x[i]


@kernel(parallel=True)
def rotate(x, cos, sin, positions, neox, out):  # type: ignore[no-untyped-def]
    """out[t, h] = x[t, h] rotated by the angles of positions[t].

    x, out : (tokens, heads, head_dim) float32;  cos, sin : (positions, rope_dims / 2) float32
    """
    for t in numba.prange(x.shape[0]):
        for h in range(x.shape[1]):
            _rotate(x[t, h], out[t, h], cos[positions[t]], sin[positions[t]], neox)


def _narrow_kernel(kind: str) -> Any:
    """float32 → the cache's element type, 16 at a time."""

    @micro_kernel
    def run(e, x, out, vectors):  # type: ignore[no-untyped-def]
        with e.loop(vectors) as i:
            value = x.at(i * (4 * LANES)).load(e.F32)
            if kind == "f32":
                out.at(i * (4 * LANES)).store(value)
            elif kind == "f16":
                out.at(i * (2 * LANES)).store(e.to_f16(value))
            else:
                out.at(i * (2 * LANES)).store(e.to_bf16(value))

    return run


@functools.cache
def rotate_and_store(kind: str) -> Any:
    """The kernel for a cache of that kind: ``run(qkv, cos, sin, positions, neox, cache, slots, places, q)``.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim)) float32, the projected rows
    positions : (tokens,) int64, for the angles;  slots, places : (tokens,) int64, the sequence and index in the cache
    cache : CacheView, written;  q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    Cost: reads qkv once, writes q and the new keys and values.  The first write to a tile clears the rest of it.
    """
    narrow, packed = _narrow_kernel(kind), pack(kind)
    element = np.float32 if kind == "f32" else np.uint16

    @kernel(kind, parallel=True)
    def run(qkv, cos, sin, positions, neox, cache, slots, places, q):  # type: ignore[no-untyped-def]
        tokens, heads, head_dim = q.shape
        kv_heads, value_dim = cache.keys.shape[1], cache.value_dim
        keys_at, values_at = heads * head_dim, (heads + kv_heads) * head_dim
        vectors = (max(head_dim, value_dim) + LANES - 1) // LANES
        for h in numba.prange(kv_heads):
            rotated = np.zeros(vectors * LANES, np.float32)
            narrowed = np.zeros(vectors * LANES, element)
            for t in range(tokens):
                tile, lane = places[t] // LANES, places[t] % LANES
                keys, values = cache.keys[slots[t], h, tile], cache.values[slots[t], h, tile]
                if lane == 0:
                    keys[:] = 0
                    values[:] = 0
                row = qkv[t, keys_at + h * head_dim : keys_at + (h + 1) * head_dim]
                _rotate(row, rotated, cos[positions[t]], sin[positions[t]], neox)
                narrow((rotated, narrowed, vectors))
                for d in range(head_dim):
                    keys[(d // packed * LANES + lane) * packed + d % packed] = narrowed[d]
                rotated[:value_dim] = qkv[t, values_at + h * value_dim : values_at + (h + 1) * value_dim]
                narrow((rotated, narrowed, vectors))
                for d in range(value_dim):
                    pair = d // LANES * LANES + lane // packed * packed
                    values[pair * LANES + d % LANES * packed + lane % packed] = narrowed[d]
        for t in numba.prange(tokens):
            for h in range(heads):
                row = qkv[t, h * head_dim : (h + 1) * head_dim]
                _rotate(row, q[t, h], cos[positions[t]], sin[positions[t]], neox)

    return run
