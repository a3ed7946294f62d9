"""Softmax attention over a tiled KV cache.

Keys and values lie in tiles of 16 positions, so that both products are the micro-kernel of `qattn.cpu.matmul` again,
*rows of activations, broadcast, times 16 lanes*:

- a key tile is (head_dim / pack, 16 keys, pack): the lanes of q·k are keys;
- a value tile is (head_dim / 16, 16 / pack, 16 lanes, pack): the lanes of p·v are head dimensions;

with ``pack`` = 2 for bfloat16, whose dot product takes pairs, and 1 otherwise.  Positions of the last tile that hold
no key are zero.

A *job* is one KV head of one sequence, some of its new tokens, and a range of keys.  Its rows are all query heads of
the group for each token, so K and V are read once for all of them.  It walks the keys in blocks with an online softmax
(Milakov and Gimelshein, 2018).  A sequence with a single new token and many keys is cut into jobs over ranges of keys,
and the parts are merged through their log-sum-exp.  Scores are kept in units of log 2, since exp2 is cheaper than exp.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from qattn.cpu._jit import generated
from qattn.cpu.activations import block_size
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.matmul import by_size
from qattn.cpu.simd import LANES, Emitter, Pointer, Value, micro_kernel
from qattn.cpu.target import TARGET

KEY_BLOCK = 128  # keys per step of the online softmax: scores of 96 rows then take 48 KiB
_AHEAD = 4096  # bytes of keys to ask for ahead: a tile of 16 heads of 128
_ROWS = 96  # query rows that share one pass over the keys
SPLIT = 512  # keys per job when a single token attends: small enough to occupy all threads, whatever their number
_LOG2E = np.float32(1.4426950408889634)
_MASKED = np.float32(-1e30)  # below every score; finite, so that a row without any visible key gives 0, not NaN


class CacheView(NamedTuple):
    """The tiles of a cache, as kernels see them."""

    keys: np.ndarray
    """(sequences, kv_heads, tiles, ceil(head_dim / pack) · 16 · pack), float32, or 16-bit floats as uint16."""
    values: np.ndarray
    """(sequences, kv_heads, tiles, ceil(value_dim / 16) · 256), likewise."""
    head_dim: int
    value_dim: int


class Storage(NamedTuple):
    """How a kernel reads a cache: what an element is, and what the products are computed in."""

    kind: str
    """"f32", "f16" or "bf16"."""
    compute: str
    """"f32", or "bf16": both factors rounded to bfloat16 and summed in float32, where the cache is bfloat16."""

    @property
    def pack(self) -> int:
        return pack(self.kind)

    @property
    def words(self) -> int:
        """Broadcast words of the left factor for each vector of the right one."""
        return 2 if self.kind == "bf16" and self.compute == "f32" else 1


def pack(kind: str) -> int:
    """Elements that lie side by side in a lane."""
    return 2 if kind == "bf16" else 1


def _accumulate(
    e: Emitter, storage: Storage, totals: list[Value], there: Pointer, left: list[list[Pointer]]
) -> list[Value]:
    """totals[m] + one vector of keys or values times the words that `left[m]` point to."""
    if storage.compute == "bf16":
        vector = there.load(e.I32V)
        return [e.dot2_bf16(t, vector, at[0].load(e.I32).splat(e.I32V)) for t, at in zip(totals, left, strict=True)]
    if storage.kind == "f32":
        vectors: tuple[Value, ...] = (there.load(e.F32),)
    elif storage.kind == "f16":
        vectors = (e.from_f16(there.load(e.I16V)),)
    else:
        vectors = e.split_bf16(there.load(e.I32V))
    for i, vector in enumerate(vectors):
        totals = [e.fma(at[i].load(e.F32S).splat(e.F32), vector, t) for t, at in zip(totals, left, strict=True)]
    return totals


def _scores_kernel(storage: Storage, rows: int) -> Any:
    """`rows` query rows times one tile of keys → scores, a row every KEY_BLOCK floats."""
    words, step = storage.words, (2 if storage.kind == "f16" else 4) * LANES

    @micro_kernel
    def run(e, q, keys, values, scores, steps):  # type: ignore[no-untyped-def]
        totals = [e.register(e.constant(0.0, e.F32)) for _ in range(rows)]
        with e.loop(steps) as k:
            if rows < TARGET.rows:  # memory binds: ask for the next tile of keys, and the values that follow
                e.prefetch(keys.at(k * step + _AHEAD))
                e.prefetch(values.at(k * step))
            at = q.at(k * (4 * words * rows))
            left = [[at.at(4 * (i * rows + m)) for i in range(words)] for m in range(rows)]
            for register, total in zip(
                totals, _accumulate(e, storage, [t.get() for t in totals], keys.at(k * step), left), strict=True
            ):
                register.set(total)
        for m in range(rows):
            scores.at(m * 4 * KEY_BLOCK).store(totals[m].get())

    return run


def _values_kernel(storage: Storage, rows: int) -> Any:
    """out = out · factor + weights times the tiles of a 16-lane slice of values; `out` holds a row every 16 floats."""
    words, step = storage.words, (2 if storage.kind == "f16" else 4) * LANES
    row = KEY_BLOCK * (2 if storage.compute == "bf16" else 4)

    @micro_kernel
    def run(e, weights, values, out, factors, tiles, tile_bytes):  # type: ignore[no-untyped-def]
        totals = []
        for m in range(rows):
            factor = factors.at(4 * m).load(e.F32S).splat(e.F32)
            totals.append(e.register(out.at(m * 4 * LANES).load(e.F32) * factor))
        with e.loop(tiles) as tile:
            at, there = weights.at(tile * (row * LANES // KEY_BLOCK)), values.at(tile * tile_bytes)
            sums = [t.get() for t in totals]
            for k in range(LANES // storage.pack):
                left = [[at.at(m * row + 4 * (k * words + i)) for i in range(words)] for m in range(rows)]
                sums = _accumulate(e, storage, sums, there.at(k * step), left)
            for register, total in zip(totals, sums, strict=True):
                register.set(total)
        for m in range(rows):
            out.at(m * 4 * LANES).store(totals[m].get())

    return run


def _softmax_kernel(storage: Storage, masked: bool) -> Any:
    """One row of scores of `tiles` tiles → weights, and the running maximum, sum and rescaling factor.

    If `masked`, keys outside first … end - 1, counted from the block's start, weigh nothing.
    """
    degree = 4 if storage.compute == "bf16" else 5  # weights rounded to 8 bits need no more

    @micro_kernel
    def run(e, scores, weights, tiles, first, end, row_max, row_sum, factor):  # type: ignore[no-untyped-def]
        lanes = e.constant(list(range(LANES)), e.I32V)
        low, high = (bound.to(e.I32).splat(e.I32V) for bound in (first, end))
        hidden = e.constant(float("-inf"), e.F32)
        largest = e.register(e.constant(float(_MASKED), e.F32))
        with e.loop(tiles) as tile:
            there = scores.at(tile * (4 * LANES))
            score = there.load(e.F32)
            if masked:
                key = lanes + (tile * LANES).to(e.I32).splat(e.I32V)
                score = key.compare(">=", low).where(key.compare("<", high).where(score, hidden), hidden)
                there.store(score)
            largest.set(e.maximum(score, largest.get()))
        old = row_max.load(e.F32S)
        peak = e.largest(largest.get())
        peak = peak.compare(">", old).where(peak, old)
        row_max.store(peak)
        shrink = e.exp2((old - peak).splat(e.F32), degree)
        total, peaks = e.register(e.constant(0.0, e.F32)), peak.splat(e.F32)
        with e.loop(tiles) as tile:
            p = e.exp2(scores.at(tile * (4 * LANES)).load(e.F32) - peaks, degree)
            total.set(total.get() + p)
            if storage.compute == "bf16":
                weights.at(tile * (2 * LANES)).store(e.to_bf16(p))
            else:
                weights.at(tile * (4 * LANES)).store(p)
        factor.store(shrink.lane(0))
        row_sum.store(row_sum.load(e.F32S) * shrink.lane(0) + e.sum(total.get()))

    return run


def _query_kernel(storage: Storage) -> Any:
    """Scatter one query row, times `scale`, into a column-major block: element d of it goes to word d of `panel`."""

    @micro_kernel
    def run(e, q, panel, scale, dims, steps, stride):  # type: ignore[no-untyped-def]
        def element(d: Value) -> Value:
            """Element d times the scale; 0 past the end, where an odd head is padded to a pair."""
            inside = d.compare("<", dims)
            value = q.at(inside.where(d, d * 0) * 4).load(e.F32S) * scale
            return inside.where(value, e.constant(0.0, e.F32S))

        with e.loop(steps) as k:
            if storage.compute == "bf16":
                word = e.round_bf16(element(k * 2)) | (e.round_bf16(element(k * 2 + 1)) << 16)
                panel.at(k * stride).store(word)
            else:
                for i in range(storage.words):
                    d = k * storage.words + i
                    panel.at(d * stride).store(element(d))

    return run


# ------------------------------------------------------------------------------------------------------- driver


class _Scratch(NamedTuple):
    """A thread's working memory; its size does not depend on the number of keys."""

    panel: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    out: np.ndarray
    row_max: np.ndarray
    row_sum: np.ndarray
    factor: np.ndarray


@numba.njit
def _scratch(rows, head_dim, slices):  # type: ignore[no-untyped-def]
    rows += TARGET.rows
    return _Scratch(
        np.empty(rows * (head_dim + 1), np.float32),
        np.empty(rows * KEY_BLOCK, np.float32),
        np.zeros(rows * KEY_BLOCK, np.float32),
        np.empty(slices * rows * LANES, np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
        np.ones(rows, np.float32),
    )


@numba.njit
def tokens_per_job(group):  # type: ignore[no-untyped-def]
    """Tokens whose query rows fill whole blocks of `TARGET.rows`, up to `_ROWS` rows; at least 1."""
    unit = TARGET.rows
    for tokens in range(1, TARGET.rows + 1):
        if tokens * group % TARGET.rows == 0:
            unit = tokens
            break
    return max(1, _ROWS // (group * unit) * unit) if group * unit <= _ROWS else max(1, _ROWS // group)


@numba.njit
def _plan(row_offsets, lengths, kv_heads, group):  # type: ignore[no-untyped-def]
    """The jobs of a ragged batch: (jobs, 7) of sequence, KV head, token, tokens, first key, end key, partial row.

    Sequences with one new token are cut by keys where they have more than SPLIT; their partial row is where the part's
    result goes in `Partial`; for other jobs it is -1.
    """
    per_job, count, partial = tokens_per_job(group), 0, 0
    for s in range(row_offsets.size - 1):
        new = row_offsets[s + 1] - row_offsets[s]
        count += (new + per_job - 1) // per_job * kv_heads * _parts(new, lengths[s])
    jobs, j = np.empty((count, 7), np.int64), 0
    for s in range(row_offsets.size - 1):
        start, stop, keys = row_offsets[s], row_offsets[s + 1], lengths[s]
        parts = _parts(stop - start, keys)
        for token in range(start, stop, per_job):
            for head in range(kv_heads):
                for part in range(parts):
                    first, end, target = 0, keys, -1
                    if parts > 1:
                        first, end, target = part * SPLIT, min(keys, part * SPLIT + SPLIT), partial
                        partial += group
                    jobs[j] = (s, head, token, min(per_job, stop - token), first, end, target)
                    j += 1
    return jobs


@functools.cache
def attend(storage: Storage, mask: Any) -> Kernel:
    """The attention kernel of a storage and a mask.

    It is ``run(q, cache, slots, row_offsets, lengths, scale, mask, out, lse, partial)``:

    q : (tokens, heads, head_dim) float32, rotated;  cache : CacheView
    slots, lengths : (sequences,) int64, where a sequence lies in the cache, and its keys, the new ones included
    row_offsets : (sequences + 1,) int64, the batch's tokens of each sequence
    mask : the instance for `mask`, its class
    out : (tokens, heads, value_dim) float32;  lse : (tokens, heads) float32, natural logarithms; both overwritten
    partial : `Partial`, overwritten with what `merge` has to put together afterwards

    Cost: K and V of a sequence once for `_ROWS` query rows.  A token's bits depend on nothing else in the batch, except
    that a sequence's only new token takes the split path and then differs by rounding from the same token in a prompt.
    """
    ours, mask_name = mask.__module__.startswith("qattn."), f"{mask.__module__}.{mask.__qualname__}"
    scores = by_size(_scores_kernel, storage)
    values = by_size(_values_kernel, storage)
    softmax, masked_softmax = _softmax_kernel(storage, masked=False), _softmax_kernel(storage, masked=True)
    load_query = _query_kernel(storage)
    bounds = generated(mask_name)(mask.bounds)
    packed, words = storage.pack, storage.words
    name = f"{storage.kind}-{storage.compute}-{mask_name}"
    item = 2 if storage.kind in ("f16", "bf16") else 4
    value_step = LANES * LANES  # elements of one slice of a value tile
    half_weights = storage.compute == "bf16"

    @generated(name)
    def run_job(job, q, cache, slot, position, length, scale, mask, group, s):  # type: ignore[no-untyped-def]
        """Leave the job's unnormalized output in s.out, with s.row_max and s.row_sum."""
        head, token, first_key, end_key = job[1], job[2], job[4], job[5]
        rows, slices = job[3] * group, (cache.value_dim + LANES - 1) // LANES
        steps = (cache.head_dim + packed - 1) // packed
        size_of_row = steps * words
        s.row_max[:rows] = _MASKED
        s.row_sum[:rows] = 0
        for part in range(slices):
            s.out[part * s.row_max.size * LANES : (part * s.row_max.size + rows) * LANES] = 0
        low, high = end_key, first_key
        for row in range(rows):
            block = row // TARGET.rows * TARGET.rows
            size = block_size(rows - block)
            load_query((q[token + row // group, head * group + row % group],
                        s.panel[block * size_of_row + row - block :],
                        scale, cache.head_dim, steps, 4 * size))  # fmt: skip
        for i in range(job[3]):
            first, end = bounds(mask, position + i, length)
            low, high = min(low, first), max(high, end)
        low = max(first_key, low // LANES * LANES)
        high = min(end_key, high)
        keys, tile_values = cache.keys[slot, head], cache.values[slot, head]
        weights = s.weights.view(np.uint16) if half_weights else s.weights
        for start in range(low, high, KEY_BLOCK):
            tiles = (min(KEY_BLOCK, high - start) + LANES - 1) // LANES
            for tile in range(tiles):
                for block in range(0, rows, TARGET.rows):
                    scores(block_size(rows - block), (s.panel[block * size_of_row :], keys[start // LANES + tile],
                                                      tile_values[start // LANES + tile],
                                                      s.scores[block * KEY_BLOCK + tile * LANES :], steps))  # fmt: skip
            for row in range(rows):
                first, end = bounds(mask, position + row // group, length)
                first, end = first - start, min(end, end_key) - start
                arguments = (s.scores[row * KEY_BLOCK :], weights[row * KEY_BLOCK :], tiles, first, end,
                             s.row_max[row:], s.row_sum[row:], s.factor[row:])  # fmt: skip
                if first <= 0 and end >= tiles * LANES:
                    softmax(arguments)
                else:
                    masked_softmax(arguments)
            for part in range(slices):
                for block in range(0, rows, TARGET.rows):
                    values(block_size(rows - block), (weights[block * KEY_BLOCK :],
                           tile_values[start // LANES, part * value_step :],
                           s.out[(part * (s.row_max.size) + block) * LANES :], s.factor[block:], tiles,
                           tile_values.shape[1] * item))  # fmt: skip

    @kernel(name, kept=ours)  # the cache does not see changes in the code of others
    def run(q, cache, slots, row_offsets, lengths, scale, mask, out, lse, partial, part, parts):  # type: ignore[no-untyped-def]
        tokens, heads, _ = q.shape
        kv_heads, dims = cache.keys.shape[1], cache.value_dim
        group, slices = heads // kv_heads, (dims + LANES - 1) // LANES
        jobs = _plan(row_offsets, lengths, kv_heads, group)
        rows, row_lse = out.reshape(tokens * heads, dims), lse.reshape(tokens * heads)
        s = _scratch(tokens_per_job(group) * group if tokens > row_offsets.size - 1 else group, q.shape[2], slices)
        for j in range(part, jobs.shape[0], parts):
            job = jobs[j]
            n, token = job[0], job[2]
            length = lengths[n]
            position = length - (row_offsets[n + 1] - token)
            run_job(job, q, cache, slots[n], position, length, scale * _LOG2E, mask, group, s)
            for row in range(job[3] * group):
                to, to_rows, to_lse = (token + row // group) * heads + job[1] * group + row % group, rows, row_lse
                if job[6] >= 0:
                    to, to_rows, to_lse = job[6] + row, partial.out, partial.lse
                total = s.row_sum[row]
                inverse = np.float32(1) / total if total > 0 else np.float32(0)
                to_lse[to] = (s.row_max[row] + np.log2(total)) / _LOG2E if total > 0 else np.float32(-np.inf)
                for d in range(dims):
                    to_rows[to, d] = s.out[(d // LANES * s.row_max.size + row) * LANES + d % LANES] * inverse

    return run


class Partial(NamedTuple):
    """Results of the parts that a token's keys are split into, normalized each."""

    out: np.ndarray
    """(rows, value_dim) float32: for each split sequence its KV heads, for each the parts, for each the query heads."""
    lse: np.ndarray
    """(rows,) float32, natural logarithms."""

    @classmethod
    def room(cls, row_offsets: np.ndarray, capacity: int, heads: int, value_dim: int) -> Partial:
        """Arrays for the sequences of a batch, however many keys of a cache of `capacity` they have."""
        rows = int((np.diff(row_offsets) == 1).sum()) * heads * -(-capacity // SPLIT)
        return cls(np.empty((rows, value_dim), np.float32), np.empty(rows, np.float32))


@numba.njit
def _parts(tokens, keys):  # type: ignore[no-untyped-def]
    """Into how many parts the keys of a sequence with so many new tokens are split."""
    return (keys + SPLIT - 1) // SPLIT if tokens == 1 else 1


@kernel()
def merge(row_offsets, lengths, kv_heads, partial, out, lse, part, parts):  # type: ignore[no-untyped-def]
    """Combine the parts of each split token, in the order of their keys (Milakov and Gimelshein, 2018, eq. 4).

    out : (tokens, heads, value_dim) float32 and lse : (tokens, heads) float32, overwritten where a token was split
    """
    group, base = out.shape[1] // kv_heads, 0
    for s in range(row_offsets.size - 1):
        token = row_offsets[s]
        count = _parts(row_offsets[s + 1] - token, lengths[s])
        if count > 1:
            for head in share(out.shape[1], part, parts):
                first = base + head // group * count * group + head % group
                peak = np.float32(-np.inf)
                for i in range(count):
                    peak = max(peak, partial.lse[first + i * group])
                total = np.float32(0)
                out[token, head] = 0
                for i in range(count):
                    there = first + i * group
                    if partial.lse[there] > -np.inf:
                        weight = np.exp(partial.lse[there] - peak)
                        total += weight
                        for d in range(out.shape[2]):
                            out[token, head, d] += weight * partial.out[there, d]
                if total > 0:
                    for d in range(out.shape[2]):
                        out[token, head, d] /= total
                lse[token, head] = peak + np.log(total) if total > 0 else np.float32(-np.inf)
            base += count * out.shape[1]
