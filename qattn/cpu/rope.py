"""Rotary position embedding, fused with the write of keys and values into the cache."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.attention import pack
from qattn.cpu.kernel import Kernel, kernel, share
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


@numba.njit
def _rotate_row(x, cos, sin, neox, out):  # type: ignore[no-untyped-def]
    """out[h] = head h of a row rotated, where the heads lie side by side at the beginning of x."""
    size = out.shape[1]
    for h in range(out.shape[0]):
        _rotate(x[h * size : (h + 1) * size], out[h], cos, sin, neox)


@kernel()
def rotate(x, cos, sin, positions, neox, out, part, parts):  # type: ignore[no-untyped-def]
    """out[t, h] = x[t, h] rotated by the angles of positions[t].

    x, out : (tokens, heads, head_dim) float32;  cos, sin : (positions, rope_dims / 2) float32
    """
    for t in share(x.shape[0], part, parts):
        _rotate_row(x[t].reshape(-1), cos[positions[t]], sin[positions[t]], neox, out[t])


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
def rotate_and_store(kind: str) -> Kernel:
    """The kernel for a cache of that kind: ``run(qkv, cos, sin, batch, neox, cache, lengths, q)``.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim)) float32, the projected rows
    batch : `Batch`;  cache : CacheView, written;  lengths : (sequences,) int64, the new tokens counted in
    q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    Cost: reads qkv once, writes q and the new keys and values.  The first write to a tile clears the rest of it.
    """
    narrow, packed = _narrow_kernel(kind), pack(kind)
    element = np.float32 if kind == "f32" else np.uint16

    @generated(kind)
    def store_head(qkv, cos, sin, batch, neox, cache, keys_at, values_at, h):  # type: ignore[no-untyped-def]
        """Append one KV head's new keys and values to their tiles."""
        head_dim, value_dim = cache.head_dim, cache.value_dim
        vectors = (max(head_dim, value_dim) + LANES - 1) // LANES
        rotated = np.zeros(vectors * LANES, np.float32)
        narrowed = np.zeros(vectors * LANES, element)
        for t in range(qkv.shape[0]):
            tile, lane, angle = batch.places[t] // LANES, batch.places[t] % LANES, batch.angles[t]
            keys, values = cache.keys[batch.slots[t], h, tile], cache.values[batch.slots[t], h, tile]
            if lane == 0:
                keys[:] = 0
                values[:] = 0
            row = qkv[t, keys_at + h * head_dim : keys_at + (h + 1) * head_dim]
            _rotate(row, rotated, cos[angle], sin[angle], neox)
            narrow((rotated, narrowed, vectors))
            for d in range(head_dim):
                keys[(d // packed * LANES + lane) * packed + d % packed] = narrowed[d]
            rotated[:value_dim] = qkv[t, values_at + h * value_dim : values_at + (h + 1) * value_dim]
            narrow((rotated, narrowed, vectors))
            for d in range(value_dim):
                pair = d // LANES * LANES + lane // packed * packed
                values[pair * LANES + d % LANES * packed + lane % packed] = narrowed[d]

    @kernel(kind)
    def run(qkv, cos, sin, batch, neox, cache, lengths, q, part, parts):  # type: ignore[no-untyped-def]
        tokens, heads, head_dim = q.shape
        kv_heads = cache.keys.shape[1]
        keys_at, values_at = heads * head_dim, (heads + kv_heads) * head_dim
        for h in share(kv_heads, part, parts):
            store_head(qkv, cos, sin, batch, neox, cache, keys_at, values_at, h)
        for t in share(tokens, part, parts):
            _rotate_row(qkv[t], cos[batch.angles[t]], sin[batch.angles[t]], neox, q[t])
        if part == 0:
            for t in range(tokens):
                lengths[batch.slots[t]] = max(lengths[batch.slots[t]], batch.places[t] + 1)

    return run
