"""Attention of given queries over caches of every kind, and what `qattn.attention` takes beside masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import KVCache, KVCacheParams, PagedKVCache, attention, masks
from tests.reference import nmse
from tests.strategies import normal

KERNELS = [
    ("float32", "causal"), ("bfloat16", "null"), ("q8_0", "sliding_window_causal"), ("q8_0/q4_0", "causal"),
    ("float16/q5_1", "causal"), ("iq4_nl", "causal"),
]  # fmt: skip


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3), new=st.integers(0, 9), group=st.integers(1, 4),
    kernel=st.sampled_from(KERNELS),
    paged=st.booleans(), hadamard=st.booleans(), alibi=st.booleans(), capped=st.booleans(),
)  # fmt: skip
def test_a_cache_is_its_keys_and_values(lengths, new, group, kernel, paged, hadamard, alibi, capped):
    types, name = kernel
    params = KVCacheParams(2, 16, 24, dtype=types, hadamard=hadamard)
    cache = PagedKVCache(params, len(lengths), pages=12) if paged else KVCache(params, len(lengths))
    for s, length in enumerate(lengths):
        cache.append(normal((length, 2, 16), s), normal((length, 2, 24), s + 9), s)
    counts = np.minimum(new, lengths)
    rows, columns = np.cumsum([0, *counts]), np.cumsum([0, *lengths])
    k, v = (np.concatenate(each) for each in zip(*(cache.read(s) for s in range(len(lengths))), strict=True))
    q = normal((rows[-1], 2 * group, 16), 20)
    options = {
        "mask": name, "window": 70 if masks.has_window(name) else None, "softcap": 2.0 if capped else 0.0,
        "alibi": qattn.alibi_slopes(2 * group) if alibi else None, "row_offsets": rows, "return_lse": True,
    }  # fmt: skip
    before = q.copy()
    got, want = attention(q, cache, **options), attention(q, k, v, key_offsets=columns, **options)
    for a, b in zip(got, want, strict=True):
        seen = np.isfinite(b)
        assert np.array_equal(np.isfinite(a), seen) and nmse(a[seen], b[seen]) < 1e-9
    assert np.array_equal(q, before)


def test_the_fast_way_is_near():
    cache = KVCache(KVCacheParams(2, 64, dtype="q8_0"))
    cache.append(normal((200, 2, 64)), normal((200, 2, 64), 1))
    q = normal((5, 4, 64), 2)
    assert 0 < nmse(attention(q, cache, precision="int8"), attention(q, cache)) < 1e-3


def test_distances_are_a_bias():
    q, k, v, table = normal((9, 4, 16)), normal((30, 2, 16), 1), normal((30, 2, 16), 2), normal((4, 11), 3)
    apart = np.arange(30) - np.arange(21, 30)[:, None]
    bias = table[:, np.clip(apart, -5, 5) + 5].transpose(1, 0, 2)
    assert nmse(attention(q, k, v, distances=table), attention(q, k, v, bias=bias)) < 1e-11
    buckets = normal((8, 4), 4)
    assert qattn.relative_biases(buckets, two_sided=False).shape == (4, 257)
    for distance, bucket in ((0, 0), (1, 1), (3, 3), (4, 4), (200, 7)):
        attended = qattn.relative_biases(buckets, two_sided=False)[:, 128 - min(distance, 128)]
        assert np.array_equal(attended, buckets[bucket])


@pytest.mark.parametrize("first", [0, 10])
def test_the_last_query_is_aligned_with_the_last_key_also_where_keys_are_few(first):
    q, k, v, cache = normal((9, 4, 16)), normal((5, 2, 16), 1), normal((5, 2, 16), 2), KVCache(KVCacheParams(2, 16))
    cache.append(k, v, positions=first + np.arange(5))
    apart = np.arange(5) - np.arange(-4, 5)[:, None]
    bias = -qattn.alibi_slopes(4)[:, None] * np.abs(apart)[:, None]
    want = attention(q, *cache.read(), mask="null", bias=bias)
    assert nmse(attention(q, cache, mask="null", alibi=qattn.alibi_slopes(4)), want) < 1e-11


def test_mistakes_are_named():
    cache, q = KVCache(KVCacheParams(2, 16), 2), normal((3, 4, 16))
    cache.append(normal((5, 2, 16)), normal((5, 2, 16)))
    with pytest.raises(ValueError, match="the cache has 2 sequences; row_offsets must say"):
        attention(q, cache)
    with pytest.raises(ValueError, match="k is a cache, which has the values"):
        attention(q, cache, q)
    with pytest.raises(ValueError, match=r"q has shape \(3, 4, 8\); expected \(tokens, heads, 16\)"):
        attention(q[..., :8], cache, row_offsets=[0, 3, 3])
    with pytest.raises(ValueError, match="q has 3 heads, the cache 2; expected a multiple"):
        attention(q[:, :3], cache, row_offsets=[0, 3, 3])
    with pytest.raises(ValueError, match="q has 1 tokens of sequence 1, k has 0; the last of each are aligned"):
        attention(q, cache, row_offsets=[0, 2, 3])
    with pytest.raises(ValueError, match="distances has 4 columns; expected an odd number"):
        attention(q, cache, row_offsets=[0, 3, 3], distances=np.zeros((4, 4)))
    with pytest.raises(ValueError, match="precision is 'fp4'"):
        attention(q, cache, row_offsets=[0, 3, 3], precision="fp4")
    with pytest.raises(ValueError, match="positions have dtype float64; expected integers"):
        cache.append(normal((2, 2, 16)), normal((2, 2, 16)), positions=[-5, 1.7])
    window = PagedKVCache(KVCacheParams(2, 16), pages=8, window=100)
    window.append(normal((500, 2, 16)), normal((500, 2, 16)))
    with pytest.raises(qattn.CacheError, match="new tokens of sequence 0 see token 0, and the cache's window"):
        attention(q, window)
    assert attention(q, window, mask="sliding_window_causal", window=100).shape == (3, 4, 16)


def test_a_function_is_one_mask():
    def even(query, key):
        return key % 2 == 0

    assert masks.from_function(even) is masks.from_function(even)
    assert masks.from_function(even) is not masks.from_function(even, lambda query, keys: (0, query + 1))
