"""Attention of sequences that begin alike: what they share is read once for all of them.

The queries of such sequences attend to the shared pages as if they were one sequence's, and to the rest each to its
own.  Softmax attention over two sets of keys follows from that over each and its log-sum-exp: `merge_states`.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from qattn import _check, backends, devices
from qattn._backend import as_array, check_device, is_cupy, namespace
from qattn.batch import check_row_offsets
from qattn.kv_cache.base import Array
from qattn.kv_cache.paged_memory import PagedMemory
from qattn.kv_cache.sequences import SequenceCache
from qattn.logits import Logits
from qattn.masks import Causal, Null


def merge_states(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Attention over two sets of keys together, from that over each of them.

    Parameters
    ----------
    out_a, out_b : (..., value_dim) floats
        The outputs.
    lse_a, lse_b : (...) floats
        The logarithms of the sums of exponentials; -inf where no key was seen.

    Returns
    -------
    (..., value_dim) floats, (...) floats
        Output and logarithm of the sum.

    Raises
    ------
    ValueError
        For shapes that don't fit together.

    Examples
    --------
    >>> out, lse = merge_states(np.array([[1.0]]), np.array([0.0]), np.array([[3.0]]), np.array([0.0]))
    >>> float(out[0, 0]), round(float(lse[0]), 4)
    (2.0, 0.6931)
    """
    out_a, lse_a, out_b, lse_b = (as_array(each) for each in (out_a, lse_a, out_b, lse_b))
    xp = namespace(out_a)
    _check.shape("lse_a", lse_a, out_a.shape[:-1])
    _check.shape("out_b", out_b, out_a.shape)
    _check.shape("lse_b", lse_b, out_a.shape[:-1])
    peak = xp.maximum(lse_a, lse_b)
    peak = xp.where(peak > -np.inf, peak, xp.zeros_like(peak))
    a, b = xp.exp(lse_a - peak), xp.exp(lse_b - peak)
    total = a + b
    with np.errstate(divide="ignore"):
        lse = xp.log(total) + peak
    total = xp.where(total > 0, total, xp.ones_like(total))
    return out_a * (a / total)[..., None] + out_b * (b / total)[..., None], lse


def check_queries(q: Array, cache: SequenceCache, row_offsets: Any) -> Array:
    """Check queries of a cache's last tokens → their row offsets, on the host.

    Raises
    ------
    DeviceError, ValueError
        They are elsewhere, or don't fit.
    """
    check_device("q", q, "the cache is", cache.device)
    _check.shape("q", q, ("tokens", "heads", cache.params.head_dim))
    if not q.shape[1] or q.shape[1] % cache.params.n_kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, the cache {cache.params.n_kv_heads}; expected a multiple")
    if row_offsets is None and cache.sequences > 1:
        raise ValueError(f"the cache has {cache.sequences} sequences; row_offsets must say which tokens are whose")
    offsets = check_row_offsets([0, len(q)] if row_offsets is None else row_offsets, len(q), "q")
    _check.shape("row_offsets", offsets, (cache.sequences + 1,))
    return offsets


class _Part(NamedTuple):
    """Some pages of a cache, as back ends see a cache."""

    params: Any
    sequences: int
    capacity: int
    counts: Any
    """(sequences,) int64 on the device, the tokens of each sequence."""
    memory: Any

    @classmethod
    def of(cls, cache: PagedMemory, rows: Array, counts: Array) -> _Part:
        """Sequences with these pages, (sequences, entries) int64, and so many tokens."""
        there, capacity = cache.view(), rows.shape[1] * cache.page_size
        counts, rows = (devices.asarray(np.ascontiguousarray(a), cache.device) for a in (counts, rows))
        return cls(cache.params, len(rows), capacity, counts, there._replace(pages=rows))

    def view(self) -> Any:
        return self.memory


def attend(
    q: Array, cache: SequenceCache, row_offsets: Array, mask: Any, logits: Logits, *, exact: bool, out: Array
) -> tuple[Array, Array]:
    """What a back end's function of that name does, but shared pages are read once, where that can be.

    It can where the mask is causal, and scores depend on no index.  Of row offsets on a GPU, the cache knows what the
    host needs to: `coming`.
    """
    backend, plan, lengths, there = backends.of(q), None, cache.lengths, devices.asarray(row_offsets, cache.device)
    if is_cupy(row_offsets) and cache.coming is not None:
        lengths, row_offsets = cache.coming
    indexed = any(each is not None for each in (logits.slopes, logits.bias, logits.distances))
    if isinstance(cache, PagedMemory) and not is_cupy(row_offsets) and not indexed and type(mask) is Causal:
        new = np.diff(row_offsets)
        plan = groups(cache.table, np.where(new > 0, (lengths - new) // cache.page_size, 0))
    if plan is None or not isinstance(cache, PagedMemory):
        return backend.attend(q, cache, there, mask, logits, exact=exact, out=out)
    shared, members = plan
    xp, rows = namespace(q), cache.table
    # What groups share: their tokens together are the last of one sequence, and see all of it
    tokens = [np.concatenate([np.arange(row_offsets[s], row_offsets[s + 1]) for s in group]) for group in members]
    counts = np.full(len(members), shared * cache.page_size)
    part = _Part.of(cache, np.stack([rows[group[0], :shared] for group in members]), counts)
    chosen, offsets = xp.asarray(np.concatenate(tokens)), xp.asarray(np.cumsum([0, *map(len, tokens)]))
    some, some_lse = backend.attend(q[chosen], part, offsets, Null(), logits._replace(sinks=None), exact=exact)
    # What each sequence has for itself
    skip = np.zeros(cache.sequences, np.int64)
    skip[[s for group in members for s in group]] = shared
    width = max(int((-(-lengths // cache.page_size) - skip).max()), 1)
    at = np.minimum(np.arange(width) + skip[:, None], rows.shape[1] - 1)
    own = _Part.of(cache, np.take_along_axis(rows, at, axis=1), lengths - skip * cache.page_size)
    out, lse = backend.attend(q, own, there, mask, logits, exact=exact, out=out)
    out[chosen], lse[chosen] = merge_states(out[chosen], lse[chosen], some, some_lse)
    return out, lse


def groups(rows: Array, full: Array) -> tuple[int, list[list[int]]] | None:
    """Which sequences share how many of their first pages, so that the fewest pages are read; None if none do.

    rows : (sequences, entries) int64, the page table
    full : (sequences,) int64, how many entries of each row can be shared

    Examples
    --------
    >>> groups(np.array([[7, 1, 2], [7, 1, 3], [4, 5, 6], [7, 1, 2]]), np.array([3, 3, 3, 3]))
    (2, [[0, 3, 1]])
    """
    order = sorted(range(len(rows)), key=lambda s: rows[s, : full[s]].tobytes())  # the alike are neighbours
    alike = []
    for one, next_one in itertools.pairwise(order):
        most = int(min(full[one], full[next_one]))
        differ = np.flatnonzero(rows[one, :most] != rows[next_one, :most])
        alike.append(int(differ[0]) if differ.size else most)
    shared = max(alike, key=lambda pages: pages * sum(each >= pages for each in alike), default=0)
    if not shared:
        return None
    members: list[list[int]] = []
    for i, each in enumerate(alike):
        if each >= shared:
            if i and alike[i - 1] >= shared:
                members[-1].append(order[i + 1])
            else:
                members.append([order[i], order[i + 1]])
    return shared, members
