"""The contiguous cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qattn import CacheError, KVCache, KVCacheParams, ops
from tests.strategies import normal

# What a value of that type may be off by, relative to the value
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def filled(params, tokens, seed=0):
    kv = normal((tokens, params.n_kv_heads * (params.head_dim + params.values)), seed)
    cache = KVCache(params)
    ops.store(kv, cache)
    keys, values = np.split(kv, [params.n_kv_heads * params.head_dim], axis=1)
    return cache, keys.reshape(tokens, params.n_kv_heads, -1), values.reshape(tokens, params.n_kv_heads, -1)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(ROUNDING)),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    value_dim=st.none() | st.integers(1, 40),
    tokens=st.integers(1, 70),
)
def test_what_was_written_is_read(dtype, heads, head_dim, value_dim, tokens):
    params = KVCacheParams(heads, head_dim, value_dim, dtype=dtype)
    cache, keys, values = filled(params, tokens)
    for got, want in zip(cache.read(), (keys, values), strict=True):
        assert got.shape == want.shape
        assert (np.abs(got - want) <= ROUNDING[dtype] * np.abs(want) + 1e-7 * (dtype == "float16")).all()


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(list(ROUNDING)), tokens=st.integers(1, 70), keep=st.integers(0, 70), more=st.integers(0, 40)
)
def test_truncating_keeps_the_beginning(dtype, tokens, keep, more):
    cache, *_ = filled(KVCacheParams(2, 5, 3, dtype=dtype), tokens)
    keep = min(keep, tokens)
    before = [a.copy() for a in cache.read(0, 0, keep)]
    cache.truncate(keep)
    assert len(cache) == keep
    ops.store(normal((more, 16), 9), cache)
    assert len(cache) == keep + more
    assert all(np.array_equal(got[:keep], want) for got, want in zip(cache.read(), before, strict=True))
    tail = cache.view().values[0, :, (keep + more) // 16 :][:, :1]
    lanes = tail.reshape(2, -1, 16 // (2 if dtype == "bfloat16" else 1), 16, 2 if dtype == "bfloat16" else 1)
    used = (keep + more) % 16
    if dtype != "bfloat16" and used and lanes.size:
        assert not lanes[:, :, used:].any()


def test_it_grows_by_doubling():
    params = KVCacheParams(2, 8)
    cache, sizes = KVCache(params), set()
    for _ in range(200):
        ops.store(normal((1, 32)), cache)
        sizes.add(cache.capacity)
    assert len(sizes) <= 5
    assert cache.nbytes <= 2 * 200 * params.bytes_per_token


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_vectors_lie_in_one_cache_line_each(dtype):
    for tokens in (1, 500):
        view = filled(KVCacheParams(2, 64, dtype=dtype), tokens)[0].view()
        assert view.keys.ctypes.data % 64 == view.values.ctypes.data % 64 == 0


def test_a_fixed_cache_that_is_full_says_so_and_keeps_what_it_has():
    cache, keys, _ = filled(KVCacheParams(1, 4, dtype="float32", max_length=20), 18)
    message = r"sequence 0 would have 21 tokens, but the cache holds at most 20 \(it has 18\)"
    with pytest.raises(CacheError, match=message):
        ops.store(normal((3, 8)), cache)
    assert len(cache) == 18 and np.array_equal(cache.read()[0], keys)
    ops.store(normal((2, 8)), cache)
    assert len(cache) == 20


def test_reading_past_the_end_is_an_error():
    cache, *_ = filled(KVCacheParams(1, 4), 5)
    with pytest.raises(CacheError, match="tokens 0 to 6 of sequence 0 were asked for; it has 5"):
        cache.read(0, 0, 6)
    with pytest.raises(CacheError, match="there is no sequence 1; the cache has 1"):
        cache.read(1)
    with pytest.raises(CacheError, match="length is 6; sequence 0 has 5 tokens"):
        cache.truncate(6)


def test_wrong_parameters_are_named():
    with pytest.raises(ValueError, match="dtype is 'int4'; a cache stores float32, float16, bfloat16"):
        KVCacheParams(1, 4, dtype="int4")
    with pytest.raises(ValueError, match="head_dim is 0; expected at least 1"):
        KVCacheParams(1, 0)
    with pytest.raises(ValueError, match="sequences is 0"):
        KVCache(KVCacheParams(1, 4), sequences=0)
    with pytest.raises(TypeError, match="no single length"):
        len(KVCache(KVCacheParams(1, 4), sequences=2))


def test_repr_and_reset():
    cache, *_ = filled(KVCacheParams(2, 16), 5)
    assert repr(cache) == "KVCache(1 sequences, tokens: 5, bfloat16, 0.0 MB)"
    cache.reset()
    assert len(cache) == 0 and cache.params.bytes_per_token == 128
