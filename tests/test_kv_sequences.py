"""What can be done with the sequences of a cache: copies, edits, turned positions."""

import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import CacheError, KVCache, KVCacheParams, PagedKVCache, RotaryEmbedding
from tests import reference
from tests.reference import nmse
from tests.strategies import normal
from tests.test_kv_machine import EMBEDDINGS, HIDDEN, PARAMS, ROPE, layer

TYPES = ["float32", "float16", "bfloat16", "q8_0", "q5_1", "q4_0"]
# What turning keys of that type may cost, as normalized mean squared error of the keys
ROUNDING = {"float32": 1e-13, "float16": 1e-7, "bfloat16": 4e-6, "q8_0": 5e-5, "q5_1": 4e-3, "q4_0": 2e-2}


def paged(params, sequences=1):
    return PagedKVCache(params, sequences, pages=24)


def filled(kind, params, *lengths):
    """A cache with random tokens, and the same keys and values of each sequence."""
    cache = kind(params, len(lengths))
    for s, length in enumerate(lengths):
        kv = normal((length, params.n_kv_heads, params.head_dim + params.values), s)
        cache.append(kv[..., : params.head_dim], kv[..., params.head_dim :], s)
    return cache, [cache.read(s) for s in range(len(lengths))]


def equal(pair, other):
    return all(np.array_equal(a, b) for a, b in zip(pair, other, strict=True))


@pytest.fixture(params=[KVCache, paged], ids=["contiguous", "paged"])
def kind(request):
    return request.param


@pytest.mark.parametrize("name", ["base", "cascading", "contiguous", "sequences", "paged"])
def test_the_examples_in_the_documentation_run(name):
    module = importlib.import_module(f"qattn.kv_cache.{name}")
    names = {"np": np} | {each: getattr(qattn, each) for each in qattn.kv_cache.__dict__ if hasattr(qattn, each)}
    result = doctest.testmod(module, extraglobs=names | {"RotaryEmbedding": RotaryEmbedding})
    assert result.attempted > 0 and result.failed == 0


@settings(max_examples=40)
@given(
    kind=st.sampled_from([KVCache, paged]),
    dtype=st.sampled_from(TYPES),
    lengths=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    data=st.data(),
)
def test_copying_and_removing_keep_what_is_left(kind, dtype, lengths, data):
    cache, (first, second) = filled(kind, KVCacheParams(2, 32, dtype=dtype), *lengths)
    start = data.draw(st.integers(0, lengths[0]))
    stop = data.draw(st.integers(start, lengths[0]))
    cache.copy(0, 1, start, stop)
    cache.remove(0, start, stop)
    left = [np.concatenate([a[:start], a[stop:]]) for a in first]
    copied = [np.concatenate([b, a[start:stop]]) for a, b in zip(first, second, strict=True)]
    for s, want in enumerate((left, copied)):
        if dtype in ("float32", "float16", "bfloat16"):
            assert equal(cache.read(s), want)
        else:  # moved tokens are rounded a second time
            assert max(map(nmse, cache.read(s), want)) < ROUNDING[dtype]
    assert cache.positions(0).tolist() == [i for i in range(lengths[0]) if not start <= i < stop]
    assert cache.positions(1).tolist() == [*range(lengths[1]), *range(start, stop)]


@settings(max_examples=40)
@given(
    kind=st.sampled_from([KVCache, paged]),
    dtype=st.sampled_from(TYPES),
    pairing=st.sampled_from(["interleaved", "neox"]),
    hadamard=st.booleans(),
    length=st.integers(1, 300),
    by=st.integers(-50, 5000),
    data=st.data(),
)
def test_shifted_keys_are_those_of_the_other_positions(kind, dtype, pairing, hadamard, length, by, data):
    params, rope = KVCacheParams(2, 64, 32, dtype=dtype, hadamard=hadamard), RotaryEmbedding(48, pairing=pairing)
    cache, [(keys, values)] = filled(kind, params, length)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.none() | st.integers(start, length))
    by = max(by, -start)
    cache.shift(0, start, stop, by, rope)
    steps = np.zeros(length, int)
    steps[start:stop] = by
    assert nmse(cache.read()[0], reference.rotate(keys, steps, rope)) < ROUNDING[dtype]
    assert nmse(cache.read()[1], values) < ROUNDING[dtype]
    assert np.array_equal(cache.positions(), np.arange(length) + steps)


def test_a_text_that_outgrows_its_context_goes_on(kind):
    """Tokens are forgotten and the others shifted: as if the layer had seen only what is left."""
    attn, x = layer(), EMBEDDINGS[np.arange(300) % 64]
    cache, other = kind(PARAMS), kind(PARAMS)
    attn(x[:200], kv_cache=cache)
    cache.remove(0, 4, 104)
    cache.shift(0, 4, None, -100, attn.rope)
    assert cache.next_positions.tolist() == [100]
    attn(np.concatenate([x[:4], x[104:200]]), kv_cache=other)
    assert nmse(attn(x[200:], kv_cache=cache), attn(x[200:], kv_cache=other)) < 1e-11


def test_new_positions_follow_the_last_one(kind):
    attn, x = layer(), normal((8, HIDDEN))
    cache, other = kind(PARAMS, 2), kind(PARAMS, 2)
    attn(x[:4], kv_cache=cache, row_offsets=[0, 2, 4], positions=[5, 9, 0, 3])
    assert cache.positions(0).tolist() == [5, 9] and cache.next_positions.tolist() == [10, 4]
    attn(x[:4], kv_cache=other, row_offsets=[0, 2, 4], positions=[5, 9, 0, 3])
    got = attn(x[4:], kv_cache=cache, row_offsets=[0, 3, 4])
    assert np.array_equal(got, attn(x[4:], kv_cache=other, row_offsets=[0, 3, 4], positions=[10, 11, 12, 4]))
    cache.truncate(1)
    assert cache.positions().tolist() == [5] and cache.next_positions.tolist() == [6, 5]
    cache.reset(0)
    assert cache.next_positions.tolist() == [0, 5]


def test_of_several_positions_the_largest_counts(kind):
    rope = RotaryEmbedding(8, pairing="neox", sections=(1, 1, 2))
    attn, cache = layer(rope=rope), kind(PARAMS)
    attn(normal((3, HIDDEN)), kv_cache=cache, positions=[[0, 1, 2], [0, 5, 2], [0, 1, 3]])
    assert cache.positions().tolist() == [0, 5, 3] and cache.next_positions.tolist() == [4]
    with pytest.raises(NotImplementedError, match="positions in sections can't be divided"):
        cache.divide(0, 0, None, 2, rope)


def test_self_extend_shares_positions(kind):
    attn, cache, x = layer(), kind(PARAMS), normal((40, HIDDEN))
    attn(x[:30], kv_cache=cache)
    cache.divide(0, 0, 20, 4, attn.rope)
    cache.shift(0, 20, None, -15, attn.rope)
    positions = [*(i // 4 for i in range(20)), *range(5, 15)]
    assert cache.positions().tolist() == positions and cache.next_positions.tolist() == [15]
    other = kind(PARAMS)
    attn(x[:30], kv_cache=other, positions=positions)
    assert nmse(attn(x[30:], kv_cache=cache), attn(x[30:], kv_cache=other)) < 1e-11


def test_a_layer_without_rotation_moves_positions_alone(kind):
    cache, [pair] = filled(kind, PARAMS, 20)
    cache.shift(0, 3, 7, 5, None)
    cache.divide(0, 10, None, 2, None)
    assert equal(cache.read(), pair)
    assert cache.positions().tolist() == [0, 1, 2, 8, 9, 10, 11, 7, 8, 9, *(i // 2 for i in range(10, 20))]


def test_keep_and_fork(kind):
    cache, pairs = filled(kind, PARAMS, 20, 30, 40)
    cache.fork(1, 2)
    cache.fork(1, 1)
    assert equal(cache.read(2), pairs[1]) and equal(cache.read(1), pairs[1])
    cache.keep(2)
    assert cache.lengths.tolist() == [0, 0, 30]


def test_what_does_not_fit_is_named_and_changes_nothing(kind):
    cache, pairs = filled(kind, KVCacheParams(2, 8, dtype="float32", max_length=300), 20, 290)
    cases = [
        (lambda: cache.copy(0, 0), "source and target are both sequence 0"),
        (lambda: cache.copy(0, 2), "there is no sequence 2; the cache has 2"),
        (lambda: cache.fork(2, 0), "there is no sequence 2"),
        (lambda: cache.fork(0, -1), "there is no sequence -1"),
        (lambda: cache.keep(2), "there is no sequence 2"),
        (lambda: cache.copy(0, 1, 3, 21), "tokens 3 to 21 of sequence 0 were asked for; it has 20"),
        (lambda: cache.copy(0, 1), "sequence 1 would have 310 tokens, but the cache holds at most 300"),
        (lambda: cache.remove(0, 5, 4), "tokens 5 to 4 of sequence 0 were asked for; it has 20"),
        (lambda: cache.remove(0, -1), "tokens -1 to 20 of sequence 0 were asked for"),
        (lambda: cache.shift(0, 3, None, -4, ROPE), "by is -4; positions of sequence 0 would reach from -1 to 15"),
        (lambda: cache.shift(0, 0, 30, 1, ROPE), "tokens 0 to 30 of sequence 0 were asked for"),
        (lambda: cache.positions(2), "there is no sequence 2"),
    ]
    for run, message in cases:
        with pytest.raises(CacheError, match=message):
            run()
    with pytest.raises(ValueError, match="rope turns 16 elements; the cache has heads of 8"):
        cache.shift(0, 0, None, 1, RotaryEmbedding(16))
    with pytest.raises(ValueError, match="by is 0; expected at least 1"):
        cache.divide(0, 0, None, 0, ROPE)
    with pytest.raises(ValueError, match=r"keys has shape \(3, 2, 7\); expected \(tokens, 2, 8\)"):
        cache.append(np.ones((3, 2, 7)), np.ones((3, 2, 8)))
    with pytest.raises(ValueError, match=r"positions has shape \(2,\); expected \(3,\)"):
        cache.append(np.ones((3, 2, 8)), np.ones((3, 2, 8)), positions=[1, 2])
    assert all(equal(cache.read(s), pair) for s, pair in enumerate(pairs))
    assert np.array_equal(cache.positions(0), np.arange(20))
