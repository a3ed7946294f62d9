"""Attention over parts of the keys: merged states, and prefixes that sequences share."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qattn import (
    CacheError,
    DeviceError,
    KVCache,
    KVCacheParams,
    MHAMaskVariant,
    PagedKVCache,
    attention,
    merge_states,
)
from qattn.kv_cache.cascading import groups
from tests import reference
from tests.reference import nmse
from tests.strategies import normal
from tests.test_kv_machine import HIDDEN, PARAMS, layer


@settings(max_examples=40)
@given(keys=st.lists(st.integers(0, 50), min_size=2, max_size=4), dtype=st.sampled_from([np.float32, np.float64]))
def test_merged_states_are_attention_over_all_keys(keys, dtype):
    q, k, v = (normal((n, 3, 8), seed) for seed, n in enumerate((5, sum(keys), sum(keys))))
    edges = np.cumsum([0, *keys])
    parts = [attention(q, k[a:b], v[a:b], mask="null", return_lse=True) for a, b in itertools.pairwise(edges)]
    out, lse = (each.astype(dtype) for each in parts[0])
    for part in parts[1:]:
        out, lse = merge_states(out, lse, *part)
    assert out.dtype == lse.dtype == dtype
    want, want_lse = reference.attention(q, k, v, 8**-0.5, np.ones((5, sum(keys)), bool))
    assert nmse(out, want) < 1e-11
    assert np.allclose(lse, want_lse, atol=1e-5)


def test_merging_needs_shapes_that_fit():
    out, lse = np.ones((2, 3, 4)), np.ones((2, 3))
    with pytest.raises(ValueError, match=r"lse_a has shape \(2, 3, 4\); expected \(2, 3\)"):
        merge_states(out, out, out, lse)
    with pytest.raises(ValueError, match=r"out_b has shape \(2, 3\); expected \(2, 3, 4\)"):
        merge_states(out, lse, lse, lse)


def family(dtype="float32", hadamard=False):
    """A cache whose sequences share 3, 3, 0, 5, 5 and 1 pages with others, and the keys and values of each."""
    cache = PagedKVCache(KVCacheParams(2, 16, 8, dtype=dtype, hadamard=hadamard), 6, pages=40, cascade=True)

    def more(sequence, tokens, seed):
        kv = normal((tokens, 2, 24), seed)
        cache.append(kv[..., :16], kv[..., 16:], sequence)

    more(0, 400, 0)
    cache.fork(0, 1)
    more(2, 300, 1)
    cache.fork(0, 3)
    more(3, 260, 2)
    cache.fork(3, 4)
    cache.copy(0, 5, 0, 128)
    for sequence in range(6):
        more(sequence, 30 + sequence, 10 + sequence)
    return cache, [cache.read(s) for s in range(6)]


@settings(max_examples=40)
@given(
    counts=st.lists(st.sampled_from([0, 1, 1, 1, 2, 7, 30]), min_size=6, max_size=6),
    group=st.integers(1, 5),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    types=st.sampled_from([("float32", False), ("float16", False), ("float16", True)]),
)
def test_a_cascade_is_attention(counts, group, softcap, with_sinks, types):
    cache, pairs = family(*types)
    q, offsets = normal((sum(counts), 2 * group, 16), 5), np.cumsum([0, *counts])
    sinks = normal((2 * group,), 6) if with_sinks else None
    before = q.copy()
    out, lse = attention(q, cache, row_offsets=offsets, softcap=softcap, sinks=sinks, return_lse=True)
    assert np.array_equal(q, before)
    for s, (k, v) in enumerate(pairs):
        rows = slice(offsets[s], offsets[s + 1])
        visible = reference.causal(counts[s], len(k))
        want, want_lse = reference.attention(q[rows], k, v, 0.25, visible, cap=softcap, sinks=sinks)
        assert nmse(out[rows], want) < 1e-11
        assert np.allclose(lse[rows], want_lse, atol=1e-5)


def test_what_is_shared_is_read_once(monkeypatch):
    cache, _ = family()
    from qattn import backends

    read, attend = [], backends.get("cpu").attend

    def spy(q, part, *args, **kwargs):
        read.append(np.asarray(part.counts).tolist())
        return attend(q, part, *args, **kwargs)

    monkeypatch.setattr(backends.get("cpu"), "attend", spy)
    attention(normal((6, 2, 16)), cache, row_offsets=np.arange(7))
    # three pages for sequences 0, 1, 3 and 4, since that saves the most; for each what is left
    assert read == [[384], [46, 47, 332, 309, 310, 163]]


@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6),
    full=st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
def test_groups_save_the_most(rows, full):
    table, full = np.array(rows), np.array(full[: len(rows)])
    saved = {}
    for shared in range(1, 5):
        heads = [tuple(row[:shared]) for row, most in zip(rows, full, strict=True) if most >= shared]
        saved[shared] = shared * (len(heads) - len(set(heads)))
    plan = groups(table, full)
    if plan is None:
        assert not any(saved.values())
        return
    shared, members = plan
    assert shared * sum(len(group) - 1 for group in members) == max(saved.values()) > 0
    flat = [s for group in members for s in group]
    assert len(flat) == len(set(flat)) and (full[flat] >= shared).all()
    assert all(rows[s][:shared] == rows[group[0]][:shared] for group in members for s in group)


def test_a_contiguous_cache_shares_nothing_and_works():
    cache, q = KVCache(KVCacheParams(2, 16, dtype="float32")), normal((3, 4, 16))
    k, v = normal((40, 2, 16), 1), normal((40, 2, 16), 2)
    cache.append(k, v)
    cache.cascade = True
    assert np.array_equal(attention(q, cache), attention(q, k, v))


def test_wrong_arguments_are_named():
    cache, q = family()[0], normal((6, 2, 16))
    for arguments, row_offsets, message in (
        ((q, cache), None, "the cache has 6 sequences; row_offsets must say which tokens are whose"),
        ((q, cache), [0, 6], r"row_offsets has shape \(2,\); expected \(7,\)"),
        ((q, cache), [0, 1, 2, 3, 2, 5, 6], "expected to rise from 0 to 6, the tokens of q"),
        ((q[..., :8], cache), np.arange(7), r"q has shape \(6, 2, 8\); expected \(tokens, heads, 16\)"),
        ((q[:, :1], cache), np.arange(7), "q has 1 heads, the cache 2; expected a multiple"),
        ((normal((999, 2, 16)), cache), [0, *[999] * 6], "q has 999 tokens of sequence 0, k has 430"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, row_offsets=row_offsets)
    window = PagedKVCache(KVCacheParams(2, 16, dtype="float32"), pages=8, window=50, cascade=True)
    for seed in range(2):
        window.append(normal((300, 2, 16), seed), normal((300, 2, 16), seed))
    with pytest.raises(CacheError, match=r"by the mask Causal\(\), new tokens of sequence 0 see token 0"):
        attention(q, window)


def test_q_must_be_where_the_cache_is(cupy):
    cache, q = family()[0], cupy.asarray(normal((6, 2, 16)))
    with pytest.raises(DeviceError, match="q is on cuda:0, the cache is on cpu; both must be on the same"):
        attention(q, cache, row_offsets=np.arange(7))


def test_a_layer_may_cascade():
    attn = layer()
    plain, cache = (PagedKVCache(PARAMS, 3, pages=16, cascade=cascading) for cascading in (False, True))
    x = normal((330, HIDDEN))
    for each in (plain, cache):
        attn(x[:300], kv_cache=each, row_offsets=[0, 300, 300, 300])
        each.fork(0, 1)
        each.fork(0, 2)
    for offsets in ([0, 1, 2, 3], [0, 10, 10, 11], [0, 20, 25, 30]):
        got, want = (attn(x[: offsets[-1]], kv_cache=each, row_offsets=offsets) for each in (cache, plain))
        assert 0 < nmse(got, want) < 1e-11
    # What goes by indices, which a part of a sequence doesn't have, is computed as usual
    for changes in ({"alibi": 8.0}, {"mask_variant": MHAMaskVariant.NULL_MASK}):
        other = layer(**changes)
        assert np.array_equal(*(other(x[:6], kv_cache=each, row_offsets=[0, 2, 4, 6]) for each in (cache, plain)))
