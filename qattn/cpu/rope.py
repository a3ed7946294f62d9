"""Rotary position embedding, fused with the write of keys and values into the cache."""

from __future__ import annotations

import functools

import numpy as np

from qattn.cache_types import BLOCK
from qattn.cpu._jit import generated, helper
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.simd import LANES
from qattn.cpu.store import store


@helper
def _rotate(x, out, cos, sin, neox):
    """out = x with its first 2 · len(cos) elements rotated in pairs (2i, 2i + 1), or (i, i + len(cos)) if neox."""
    half = cos.size
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        first, second = x[a], x[b]
        out[a] = first * cos[i] - second * sin[i]
        out[b] = first * sin[i] + second * cos[i]
    for i in range(2 * half, x.size):
        out[i] = x[i]


@helper
def _rotate_row(x, cos, sin, neox, out):
    """out[h] = head h of a row rotated, where the heads lie side by side at the beginning of x."""
    size = out.shape[1]
    for h in range(out.shape[0]):
        _rotate(x[h * size : (h + 1) * size], out[h], cos, sin, neox)


@kernel()
def rotate(x, cos, sin, positions, neox, out, part, parts):
    """out[t, h] = x[t, h] rotated by the angles of positions[t].

    x, out : (tokens, heads, head_dim) float32;  cos, sin : (positions, rope_dims / 2) float32
    """
    for t in share(x.shape[0], part, parts):
        _rotate_row(x[t].reshape(-1), cos[positions[t]], sin[positions[t]], neox, out[t])


@kernel()
def rotate_heads(rows, heads, size, cos, sin, angles, neox, part, parts):
    """Rotate the first `heads` heads of `size` elements of each row in place, by the angles of angles[t].

    rows : (tokens, columns) float32;  cos, sin : (positions, rope_dims / 2) float32
    """
    for t in share(rows.shape[0], part, parts):
        for h in range(heads):
            head = rows[t, h * size : (h + 1) * size]
            _rotate(head, head, cos[angles[t]], sin[angles[t]], neox)


@functools.cache
def rotate_and_store(key_kind: str, value_kind: str) -> Kernel:
    """The kernel for a cache of keys and values of these kinds: ``run(qkv, cos, sin, batch, neox, cache, lengths, q)``.

    qkv : (tokens, heads · head_dim + kv_heads · (head_dim + value_dim)) float32, the projected rows
    batch : `Batch`;  cache : CacheView, written;  lengths : (sequences,) int64, the new tokens counted in
    q : (tokens, heads, head_dim) float32, overwritten with the rotated queries
    Cost: reads qkv once, writes q and the new keys and values.  The first write to a tile clears the rest of it.
    """
    key_room, put_key = store(key_kind, True)
    value_room, put_value = store(value_kind, False)

    @generated(f"{key_kind}-{value_kind}")
    def store_head(qkv, cos, sin, batch, neox, cache, keys_at, values_at, h):
        """Append one KV head's new keys and values to their tiles."""
        head_dim, value_dim, page_keys = cache.head_dim, cache.value_dim, cache.keys.shape[2] * LANES
        rotated = np.zeros((max(head_dim, value_dim) + BLOCK - 1) // BLOCK * BLOCK, np.float32)
        room_of_key, room_of_value = key_room(head_dim), value_room(value_dim)
        for t in range(qkv.shape[0]):
            page = cache.pages[batch.slots[t], batch.places[t] // page_keys]
            tile, lane, angle = batch.places[t] % page_keys // LANES, batch.places[t] % LANES, batch.angles[t]
            keys, values = cache.keys[page, h, tile], cache.values[page, h, tile]
            if lane == 0:
                keys[:] = 0
                values[:] = 0
            row = qkv[t, keys_at + h * head_dim : keys_at + (h + 1) * head_dim]
            _rotate(row, rotated, cos[angle], sin[angle], neox)
            rotated[head_dim:] = 0
            put_key(rotated, head_dim, keys, lane, room_of_key)
            for d in range(value_dim):
                rotated[d] = qkv[t, values_at + h * value_dim + d]
            rotated[value_dim:] = 0
            put_value(rotated, value_dim, values, lane, room_of_value)

    @kernel(f"{key_kind}-{value_kind}")
    def run(qkv, cos, sin, batch, neox, cache, lengths, q, part, parts):
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
