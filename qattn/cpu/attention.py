"""Softmax attention over a tiled KV cache.

Keys and values lie in tiles of 16 positions, so that both products are the micro-kernel of `qattn.cpu.matmul` again,
*rows of activations, broadcast, times 16 lanes*:

- a key tile is (head_dim / pack, 16 keys, pack): the lanes of q·k are keys;
- a value tile is (head_dim / 16, 16 / pack, 16 lanes, pack): the lanes of p·v are head dimensions;

with ``pack`` = 2 for bfloat16, whose dot product takes pairs, and 1 otherwise; `qattn.cpu.amx_attention` has the
micro-kernels for that in tile registers.  Positions of the last tile that hold no key are zero.

A *job* is one KV head of one sequence, some of its new tokens, and a range of keys.  Its rows are all query heads of
the group for each token, so K and V are read once for all of them.  It walks the keys in blocks with an online softmax
(Milakov and Gimelshein, 2018).  A sequence with a single new token and many keys is cut into jobs over ranges of keys,
and the parts are merged through their log-sum-exp.  Scores are kept in units of log 2, since exp2 is cheaper than exp.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from qattn._meaning import is_ours, mask_key
from qattn.cache_types import BLOCK
from qattn.cpu import attend_sides, attend_tiles
from qattn.cpu._jit import generated, helper
from qattn.cpu.attend_tiles import KEY_BLOCK, LOG2E
from qattn.cpu.attend_tiles import Storage as Storage
from qattn.cpu.kernel import Kernel, kernel, share
from qattn.cpu.scratch import aligned
from qattn.cpu.simd import LANES
from qattn.cpu.target import TARGET

_ROWS = 96  # query rows that share one pass over the keys
SPLIT = 512  # keys per job when a single token attends: small enough to occupy all threads, whatever their number
_LOG2E, _MASKED = np.float32(LOG2E), np.float32(attend_tiles.MASKED)


class CacheView(NamedTuple):
    """The tiles of a cache, as kernels see them."""

    keys: np.ndarray
    """(pages, kv_heads, tiles, ceil(head_dim / pack) · 16 · pack), float32, 16-bit floats as uint16, or float8 and
    codes as uint8; tiles of codes have their scales behind them."""
    values: np.ndarray
    """(pages, kv_heads, tiles, ceil(value_dim / 16) · 256), likewise."""
    head_dim: int
    value_dim: int
    pages: np.ndarray
    """(sequences, pages of each) int64: token p of sequence s is token ``p % n`` of page ``pages[s, p // n]``, where a
    page has n tokens: all that there are, or a multiple of `KEY_BLOCK`."""


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
    query: np.ndarray
    """A query padded to whole blocks; afterwards a row of weights."""
    rounded: np.ndarray
    """Weights as bytes, with a unit and a constant for each row."""
    units: np.ndarray
    constants: np.ndarray


@helper
def _scratch(rows, row_words, slices, head_dim):
    rows += LANES  # since the last block may reach further
    weights = aligned(4 * rows * KEY_BLOCK).view(np.float32)
    weights[:] = 0
    return _Scratch(
        aligned(4 * rows * row_words).view(np.float32),
        aligned(4 * rows * KEY_BLOCK).view(np.float32),
        weights,
        aligned(4 * slices * rows * LANES).view(np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
        np.ones(rows, np.float32),
        np.zeros(max(KEY_BLOCK, head_dim + BLOCK), np.float32),
        np.empty(rows * KEY_BLOCK, np.uint8),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.float32),
    )


@numba.njit
def tokens_per_job(group):
    """Tokens whose query rows fill whole blocks of `TARGET.rows`, up to `_ROWS` rows; at least 1."""
    unit = TARGET.rows
    for tokens in range(1, TARGET.rows + 1):
        if tokens * group % TARGET.rows == 0:
            unit = tokens
            break
    return max(1, _ROWS // (group * unit) * unit) if group * unit <= _ROWS else max(1, _ROWS // group)


@helper
def _plan(row_offsets, ranges, counts, kv_heads, group):
    """The jobs of a ragged batch: (jobs, 8) of sequence, KV head, token, tokens, first key, end key, partial row, part.

    ranges : (sequences, 2) int64, the keys that a sequence's new tokens may see, from a multiple of SPLIT on
    counts : (sequences,) int64, into how many parts they are cut; then a job's partial row is where the part's result
        goes in `Partial`; for other jobs it is -1
    """
    per_job, count, partial = tokens_per_job(group), 0, 0
    for s in range(row_offsets.size - 1):
        count += (row_offsets[s + 1] - row_offsets[s] + per_job - 1) // per_job * kv_heads * counts[s]
    jobs, j = np.empty((count, 8), np.int64), 0
    for s in range(row_offsets.size - 1):
        low, high = ranges[s]
        for token in range(row_offsets[s], row_offsets[s + 1], per_job):
            for head in range(kv_heads):
                for part in range(counts[s]):
                    first, end, target = low, high, -1
                    if counts[s] > 1:
                        first, end, target = low + part * SPLIT, min(high, low + part * SPLIT + SPLIT), partial
                        partial += group
                    tokens = min(per_job, row_offsets[s + 1] - token)
                    for i, field in enumerate((s, head, token, tokens, first, end, target, part)):
                        jobs[j, i] = field
                    j += 1
    return jobs


def _ranges(bounds: Any, mask_name: str) -> Callable[..., Any]:
    """A function (mask, row_offsets, lengths, counts) → `ranges` of `_plan`; counts are overwritten.

    Sequences with one new token are cut by keys, those that it sees, where they are more than SPLIT.
    """

    @generated(f"ranges-{mask_name}")
    def run(mask, row_offsets, lengths, counts):
        ranges = np.zeros((lengths.size, 2), np.int64)
        for s in range(lengths.size):
            low, high = 0, lengths[s]
            if row_offsets[s + 1] - row_offsets[s] == 1:
                first, end = bounds(mask, high - 1, high)
                low, high = first // SPLIT * SPLIT, end
                counts[s] = max(1, (high - low + SPLIT - 1) // SPLIT)
            else:
                counts[s] = 1
            ranges[s, 0], ranges[s, 1] = low, high
        return ranges

    return run


def _method(mask: Any, name: str, key: str) -> Callable[..., Any]:
    """A mask's method for kernels, called with the mask first; the method itself may be a static one."""
    checks = {} if is_ours(mask) else {"boundscheck": True}  # others may index arrays
    function = generated(key, _nrt=True, **checks)(getattr(mask, name))
    if not isinstance(inspect.getattr_static(mask, name), staticmethod):
        return function

    @generated(f"{name}-{key}")
    def run(mask, query, key):
        return function(query, key)

    return run


def _bounds(mask: Any, key: str) -> Callable[..., Any]:
    """The keys that a mask's bounds leave of those that there are: the first, and the end."""
    bounds = _method(mask, "bounds", key)

    @generated(f"within-{key}")
    def run(mask, query, keys):
        first, end = bounds(mask, query, keys)
        return min(max(first, 0), keys), min(max(end, 0), keys)

    return run


def _adjust(mask: Any, key: str) -> Callable[..., Any]:
    """A function for a row of scores, in units of log 2, of the keys from `start` on: `Logits`, and what a mask hides.

    It costs a few comparisons for a row where nothing is asked for.
    """
    chosen = hasattr(mask, "sees")
    sees: Any = _method(mask, "sees", key) if chosen else None

    @generated(key)
    def run(scores, tiles, first, end, start, query, token, head, logits, mask):
        count = tiles * LANES
        if logits.cap > 0:
            attend_tiles.cap((scores, tiles, logits.cap * _LOG2E))
        if logits.slopes.size:
            attend_tiles.slope((scores, tiles, logits.slopes[head] * _LOG2E, start - query))
        if logits.distances.size:
            span = logits.distances.shape[1] // 2
            for i in range(count):
                away = min(max(start + i - query, -span), span)
                scores[i] += logits.distances[head, away + span] * _LOG2E
        if logits.bias.size:
            row = logits.bias[token, head if logits.bias.shape[1] > 1 else 0]
            for i in range(min(count, row.size - start)):
                scores[i] += row[start + i] * _LOG2E
        if chosen:
            for i in range(max(first, 0), min(end, count)):
                if not sees(mask, query, start + i):
                    scores[i] = -np.inf

    return run


@functools.cache
def attend(keys: Storage, values: Storage, mask: Any) -> Kernel:
    """The attention kernel for keys and values that are stored like this, and a mask.

    It is ``run(q, cache, row_offsets, lengths, logits, mask, out, lse, partial)``:

    q : (tokens, heads, head_dim) float32, rotated;  cache : CacheView
    row_offsets : (sequences + 1,) int64, the batch's tokens of each sequence
    lengths : (sequences,) int64, its keys, the new ones included
    logits : `Logits`, with empty arrays where there is nothing
    mask : the instance for `mask`, its class
    out : (tokens, heads, value_dim) float32;  lse : (tokens, heads) float32, natural logarithms; both overwritten
    partial : `Partial`, overwritten with what `merge` has to put together afterwards

    Cost: K and V of a sequence once for `_ROWS` query rows.  A token's bits depend on nothing else in the batch, except
    that a sequence's only new token takes the split path and then differs by rounding from the same token in a prompt.
    """
    mask_name = mask_key(mask)
    name = f"{keys.kind}-{keys.compute}-{values.kind}-{values.compute}-{mask_name}"
    run_job = _job(keys, values, mask, mask_name, name)
    ranges_of = _ranges(_bounds(mask, mask_name), mask_name)
    row_words, slices_of = attend_sides.keys(keys).row_words, attend_sides.values(values).slices

    @kernel(name, stable=is_ours(mask))
    def run(q, cache, row_offsets, lengths, logits, mask, out, lse, partial, part, parts):
        tokens, heads, _ = q.shape
        kv_heads, dims = cache.keys.shape[1], cache.value_dim
        group, slices = heads // kv_heads, slices_of(dims)
        counts = np.empty(lengths.size, np.int64)
        jobs = _plan(row_offsets, ranges_of(mask, row_offsets, lengths, counts), counts, kv_heads, group)
        if part == 0:
            for n in range(counts.size):
                partial.counts[n] = counts[n]
        rows, row_lse = out.reshape(tokens * heads, dims), lse.reshape(tokens * heads)
        most = 1  # tokens of a job
        for j in range(jobs.shape[0]):
            most = max(most, jobs[j, 3])
        s = _scratch(most * group, row_words(q.shape[2]), slices, q.shape[2])
        # In prompts, later jobs see more keys.  Single tokens read memory that follows what was read before.
        for j in share(jobs.shape[0], part, parts) if most == 1 else range(part, jobs.shape[0], parts):
            job = jobs[j]
            n, token = job[0], job[2]
            length = lengths[n]
            position = length - (row_offsets[n + 1] - token)
            run_job(job, q, cache, position, length, logits, mask, group, s)
            _finish(job, s, group, heads, rows, row_lse, partial)

    return run


@generated("rows", _nrt=False)
def _finish(job, s, group, heads, rows, lse, partial):
    """Write what a job has left in s, normalized, to rows and lse, or as a part."""
    dims, slice_bytes = rows.shape[1], 4 * LANES * s.row_max.size
    for row in range(job[3] * group):
        to, to_rows, to_lse = (job[2] + row // group) * heads + job[1] * group + row % group, rows, lse
        if job[6] >= 0:
            to, to_rows, to_lse = job[6] + row, partial.out, partial.lse
        total = s.row_sum[row]
        if s.row_max[row] == np.inf:  # a score was too large
            total = np.float32(np.nan)
        inverse = np.float32(1) / total if total != 0 else np.float32(0)
        to_lse[to] = (s.row_max[row] + np.log2(total)) / _LOG2E if total != 0 else np.float32(-np.inf)
        if job[6] >= 0 and total == 0:
            continue  # nobody reads it
        whole = dims // LANES
        attend_tiles.scale((s.out[row * LANES :], to_rows[to], inverse, whole, slice_bytes))
        last = (whole * s.row_max.size + row) * LANES
        for d in range(whole * LANES, dims):
            to_rows[to, d] = s.out[last + d % LANES] * inverse


def _job(keys: Storage, values: Storage, mask: Any, mask_name: str, name: str) -> Callable[..., Any]:
    """A function that leaves a job's unnormalized output in s.out, with s.row_max and s.row_sum."""
    _, load, score, early = attend_sides.keys(keys)
    slices_of, add, ahead = attend_sides.values(values)
    softmax = attend_tiles.some_rows(attend_tiles.softmax_kernel, values)
    masked_softmax = attend_tiles.softmax_kernel(values, 1, masked=True)
    bounds, adjust = _bounds(mask, mask_name), _adjust(mask, mask_name)
    half_weights = values.halves

    @generated(name)
    def begin(job, q, cache, position, length, logits, mask, group, s):
        """Prepare the rows → the range of keys that any of them sees."""
        head, token, rows = job[1], job[2], job[3] * group
        s.row_max[:rows] = _MASKED
        s.row_sum[:rows] = 0
        if logits.sinks.size and job[7] == 0:  # as if the first keys had been seen already, with values of 0
            for row in range(rows):
                s.row_max[row] = logits.sinks[head * group + row % group] * _LOG2E
                s.row_sum[row] = 1
        for part in range(slices_of(cache.value_dim)):
            s.out[part * s.row_max.size * LANES : (part * s.row_max.size + rows) * LANES] = 0
        low, high = job[5], job[4]
        for i in range(job[3]):
            first, end = bounds(mask, position + i, length)
            low, high = min(low, first), max(high, end)
        low, high = max(job[4], low // LANES * LANES), min(job[5], high)
        if low < high:
            for row in range(rows):
                load(q[token + row // group, head * group + row % group], s, row, rows, logits.scale * _LOG2E)
        return low, high

    @generated(name, _nrt=False)  # what it calls inherits this
    def run(job, q, cache, position, length, logits, mask, group, s):
        head, token, rows, page_keys = job[1], job[2], job[3] * group, cache.keys.shape[2] * LANES
        weights = s.weights.view(np.uint16) if half_weights else s.weights
        low, high = begin(job, q, cache, position, length, logits, mask, group, s)
        start = low
        while start < high:
            stop = min(high, start // KEY_BLOCK * KEY_BLOCK + KEY_BLOCK)
            tiles, page = (stop - start + LANES - 1) // LANES, cache.pages[job[0], start // page_keys]
            first_tile = start % page_keys // LANES
            keys, values = cache.keys[page, head, first_tile:], cache.values[page, head, first_tile:]
            fetch, follow = start == low or start % page_keys == 0 or not ahead, stop % page_keys != 0
            score(s, rows, keys, values, tiles, cache.head_dim, fetch)
            if early and rows <= attend_tiles.STREAMED and follow and stop < high:
                attend_tiles.fetch((keys[tiles], tiles * keys[0].nbytes * 3 // 4))
            for i in range(job[3]):
                first, end = bounds(mask, position + i, length)
                first, end, row = first - start, min(end, job[5]) - start, i * group
                for one in range(row, row + group):
                    adjust(s.scores[one * KEY_BLOCK :], tiles, first, end, start, position + i, token + i,
                           head * group + one % group, logits, mask)  # fmt: skip
                hides, last = first > 0 or end < tiles * LANES, row + group
                while row < last:
                    arguments = (s.scores[row * KEY_BLOCK :], weights[row * KEY_BLOCK :], tiles, first, end,
                                 s.row_max[row:], s.row_sum[row:], s.factor[row:])  # fmt: skip
                    if hides:
                        masked_softmax(arguments)
                        row += 1
                    else:
                        row += softmax(last - row, arguments)
            add(s, rows, values, tiles, follow, cache.value_dim)
            start = stop

    return run


class Partial(NamedTuple):
    """Results of the parts that a token's keys are split into, normalized each."""

    out: np.ndarray
    """(rows, value_dim) float32: for each split sequence its KV heads, for each the parts, for each the query heads."""
    lse: np.ndarray
    """(rows,) float32, natural logarithms."""
    counts: np.ndarray
    """(sequences,) int64, the parts of each."""

    @classmethod
    def room(cls, row_offsets: np.ndarray, capacity: int, heads: int, value_dim: int) -> Partial:
        """Arrays for the sequences of a batch, however many keys of a cache of `capacity` they have."""
        rows = int((np.diff(row_offsets) == 1).sum()) * heads * -(-capacity // SPLIT)
        counts = np.zeros(len(row_offsets) - 1, np.int64)
        return cls(np.empty((rows, value_dim), np.float32), np.empty(rows, np.float32), counts)


@kernel()
def merge(row_offsets, kv_heads, partial, out, lse, part, parts):
    """Combine the parts of each split token, in the order of their keys (Milakov and Gimelshein, 2018, eq. 4).

    out : (tokens, heads, value_dim) float32 and lse : (tokens, heads) float32, overwritten where a token was split
    """
    group, base = out.shape[1] // kv_heads, 0
    for s in range(row_offsets.size - 1):
        token = row_offsets[s]
        count = partial.counts[s]
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
                    if partial.lse[there] != -np.inf:
                        weight = np.exp(partial.lse[there] - peak)
                        total += weight
                        for d in range(out.shape[2]):
                            out[token, head, d] += weight * partial.out[there, d]
                if total != 0:
                    for d in range(out.shape[2]):
                        out[token, head, d] /= total
                lse[token, head] = peak + np.log(total) if total != 0 else np.float32(-np.inf)
            base += count * out.shape[1]
