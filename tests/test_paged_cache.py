"""The paged cache: pages that are shared, copied, found again, given back and taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qattn import CacheError, KVCache, KVCacheParams, MHAMaskVariant, PagedKVCache, RotaryEmbedding
from tests.reference import nmse
from tests.strategies import normal
from tests.test_kv_machine import EMBEDDINGS, HIDDEN, PARAMS, layer

SMALL = KVCacheParams(1, 4, 3, dtype="float32")
WINDOW = MHAMaskVariant.SLIDING_WINDOW_CAUSAL_MASK


def fill(cache, tokens, sequence=0, seed=0):
    """Append random tokens."""
    p = cache.params
    values = normal((tokens, p.n_kv_heads, p.head_dim + p.values), seed)
    cache.append(values[..., : p.head_dim], values[..., p.head_dim :], sequence)


def same(cache, sequence, pair):
    return all(np.array_equal(a, b) for a, b in zip(cache.read(sequence), pair, strict=True))


@settings(max_examples=30)
@given(
    steps=st.lists(st.lists(st.integers(0, 200), min_size=3, max_size=3), min_size=1, max_size=4),
    page_size=st.sampled_from([128, 256]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_layer_computes_the_same_bits_as_with_a_contiguous_cache(steps, page_size, dtype):
    attn, params = layer(), KVCacheParams(2, 8, dtype=dtype)
    paged, flat = PagedKVCache(params, 3, pages=24, page_size=page_size), KVCache(params, 3)
    for i, counts in enumerate(steps):
        offsets = np.concatenate([[0], np.cumsum(counts)])
        x = normal((offsets[-1], HIDDEN), i)
        got, want = (attn(x, kv_cache=cache, row_offsets=offsets) for cache in (paged, flat))
        assert np.array_equal(got, want)
    assert paged.pages - paged.free_pages == sum(-(-length // page_size) for length in flat.lengths)


def test_a_long_sequence_is_split_and_merged_over_its_pages():
    attn, x = layer(), normal((1600, HIDDEN))
    paged, flat = PagedKVCache(PARAMS, 2, pages=40), KVCache(PARAMS)
    fill(paged, 700, 1)  # so that the pages of sequence 0 lie apart
    for rows in (x[:600], x[600:1500], x[1500:1501], x[1501:]):
        got = attn(rows, kv_cache=paged, row_offsets=[0, len(rows), len(rows)])
        assert np.array_equal(got, attn(rows, kv_cache=flat))


# Sharing


def test_a_fork_shares_pages_and_copies_the_one_that_is_written_to():
    cache = PagedKVCache(SMALL, 3, pages=8)
    fill(cache, 300)
    before = cache.read(0)
    cache.fork(0, 1)
    cache.fork(0, 2)
    assert cache.free_pages == 5 and same(cache, 1, before)
    fill(cache, 1, 1, seed=5)
    assert cache.free_pages == 4  # the third page was copied, since it has room
    fill(cache, 1, 0, seed=6)
    fill(cache, 1, 2, seed=7)  # the last one that has the page writes to it
    assert cache.free_pages == 3
    for sequence, seed in ((1, 5), (0, 6), (2, 7)):
        alone = KVCache(SMALL)
        fill(alone, 300)
        fill(alone, 1, seed=seed)
        assert same(cache, sequence, alone.read())
    cache.keep(1)
    assert cache.free_pages == 5


@pytest.mark.parametrize("length", [256, 300])
def test_a_fork_that_is_cut_leaves_the_other_alone(length):
    cache = PagedKVCache(SMALL, 2, pages=8)
    fill(cache, length)
    before = cache.read(0)
    cache.fork(0, 1)
    cache.truncate(200, 1)
    fill(cache, 90, 1, seed=3)
    assert same(cache, 0, before)
    assert same(cache, 0, [np.concatenate([a[:200], b[200:]]) for a, b in zip(cache.read(1), before, strict=True)])


def test_whole_pages_are_copied_and_removed_without_moving_anything():
    cache = PagedKVCache(KVCacheParams(1, 32, dtype="q4_0"), 2, pages=8)
    fill(cache, 600)
    used, before = cache.pages - cache.free_pages, cache.read(0)
    cache.copy(0, 1, 128, 384)
    assert cache.pages - cache.free_pages == used
    cache.remove(0, 128, 256)
    assert cache.pages - cache.free_pages == used  # sequence 1 still has the page
    assert same(cache, 0, [np.delete(a, slice(128, 256), axis=0) for a in before])
    assert same(cache, 1, [a[128:384] for a in before])
    assert cache.positions(1).tolist() == list(range(128, 384))


def test_out_of_pages_is_an_error_that_loses_nothing():
    cache = PagedKVCache(PARAMS, 3, pages=4)
    attn, x = layer(), normal((300, HIDDEN))
    attn(x, kv_cache=cache, row_offsets=[0, 300, 300, 300])
    before = cache.read(0)
    message = (
        "2 more pages of 128 tokens are needed, and 1 of 4 are free; "
        r"release\(\) or reset\(\) sequences, or resize\(\) the cache"
    )
    with pytest.raises(CacheError, match=message):
        attn(x[:200], kv_cache=cache, row_offsets=[0, 100, 200, 200])
    assert cache.lengths.tolist() == [300, 0, 0] and cache.free_pages == 1 and same(cache, 0, before)
    cache.fork(0, 1)
    cache.fork(0, 2)
    with pytest.raises(CacheError, match="2 more pages of 128 tokens are needed, and 1 of 4 are free"):
        attn(x[:3], kv_cache=cache, row_offsets=[0, 1, 2, 3])  # the third page would have to be copied twice
    with pytest.raises(CacheError, match="3 more pages of 128 tokens are needed, and 1 of 4 are free"):
        cache.shift(1, 0, None, 7, attn.rope)
    with pytest.raises(CacheError, match="3 more pages of 128 tokens are needed, and 1 of 4 are free"):
        cache.remove(2, 3, 5)
    assert cache.lengths.tolist() == [300] * 3 and all(same(cache, s, before) for s in range(3))
    assert np.array_equal(cache.positions(1), np.arange(300))
    cache.resize(7)
    attn(x[:3], kv_cache=cache, row_offsets=[0, 1, 2, 3])
    assert cache.free_pages == 2


def test_max_length_holds_too():
    cache = PagedKVCache(KVCacheParams(1, 4, dtype="float32", max_length=200), 2, pages=8)
    fill(cache, 150)
    with pytest.raises(CacheError, match="sequence 0 would have 250 tokens, but the cache holds at most 200"):
        fill(cache, 100)
    fill(cache, 128, 1)
    with pytest.raises(CacheError, match="sequence 1 would have 278 tokens"):
        cache.copy(0, 1)
    assert cache.lengths.tolist() == [150, 128] and cache.free_pages == 5


# Prefixes


def test_a_prompt_finds_its_longest_prefix():
    cache, prompt = PagedKVCache(SMALL, 2, pages=8), np.arange(400)
    fill(cache, 390)
    before = cache.read(0)
    cache.release(0, prompt)
    assert cache.free_pages == 8 and cache.lengths[0] == 0
    other = prompt.copy()
    other[300] = 7
    assert [cache.match(p) for p in (prompt, other, prompt[:256], prompt[:257], prompt[1:])] == [384, 256, 128, 256, 0]
    assert cache.begin(1, other) == 256
    assert same(cache, 1, [a[:256] for a in before]) and cache.free_pages == 6
    assert cache.begin(0, prompt) == 384 and cache.free_pages == 5  # two of the three pages are in use by both
    assert same(cache, 0, [a[:384] for a in before])
    assert cache.begin(0, prompt) == 384 and cache.free_pages == 5


def test_a_sequence_is_found_while_it_lasts():
    cache, prompt = PagedKVCache(SMALL, 3, pages=8), np.arange(300)
    fill(cache, 300)
    cache.remember(0, prompt)
    cache.remember(0, prompt)
    assert cache.begin(1, prompt) == 256 and cache.free_pages == 5
    fill(cache, 44, 1, seed=8)
    fill(cache, 1, 0, seed=9)
    cache.reset(0)
    assert cache.begin(2, prompt) == 256 and cache.free_pages == 5


def test_what_was_used_last_is_taken_last_and_ends_before_beginnings():
    cache, a, b = PagedKVCache(SMALL, 2, pages=5), np.arange(300), np.arange(300) + 1000
    for prompt in (a, b):
        fill(cache, 256)
        cache.release(0, prompt)
    cache.begin(0, a)
    cache.release(0)  # a was used last now
    found = []
    for tokens in (129, 256, 384, 512, 640):
        fill(cache, tokens)
        found.append((cache.match(a), cache.match(b)))
        cache.reset(0)
    assert found == [(256, 128), (256, 128), (256, 0), (128, 0), (0, 0)]


def test_a_page_that_is_written_to_is_found_no_longer():
    cache, prompt = PagedKVCache(SMALL, 2, pages=8), np.arange(300)
    fill(cache, 256)
    cache.remember(0, prompt)
    cache.truncate(200)
    assert cache.match(prompt) == 256
    fill(cache, 1, seed=4)
    assert cache.match(prompt) == 128
    cache.begin(1, prompt)
    cache.shift(0, 0, 5, 3, RotaryEmbedding(4))  # writes to the first page, which sequence 1 has, too
    assert cache.match(prompt) == 128 and cache.begin(1, prompt) == 128


def test_edited_tokens_and_other_positions_are_no_prefix():
    rope, prompt = RotaryEmbedding(4), np.arange(600)

    def found(edit):
        cache = PagedKVCache(SMALL, 2, pages=16)
        fill(cache, 520)
        edit(cache)
        cache.release(0, prompt)
        return cache.match(prompt)

    def there_and_back(cache):
        cache.shift(0, 300, None, 5, rope)
        cache.shift(0, 300, None, -5, rope)

    def removed(cache):
        cache.remove(0, 130, 140)
        cache.shift(0, 130, None, -10, rope)

    def cut_before_the_edit(cache):
        removed(cache)
        cache.truncate(130)
        fill(cache, 300)

    def elsewhere(cache):
        cache.reset()
        cache.append(np.ones((300, 1, 4)), np.ones((300, 1, 3)), positions=np.arange(300) + 7)

    def of_another(cache):
        cache.fork(0, 1)
        removed(cache)
        cache.copy(0, 1, 128, 256)
        cache.fork(1, 0)

    edits = (lambda cache: None, there_and_back, removed, cut_before_the_edit, elsewhere, of_another)
    assert [found(edit) for edit in edits] == [512, 256, 128, 384, 0, 512]


def test_wrong_token_ids_are_named():
    cache = PagedKVCache(SMALL, pages=4)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 2\); expected \(tokens,\)"):
        cache.match([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="tokens have dtype float64; expected integers"):
        cache.begin(0, [0.5])
    with pytest.raises(CacheError, match="there is no sequence 1; the cache has 1"):
        cache.begin(1, [1])
    assert cache.match([]) == cache.begin(0, []) == 0


# Windows


@settings(max_examples=30)
@given(
    window=st.integers(1, 300),
    chunks=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    page=st.sampled_from([128, 256]),
)
def test_a_window_cache_keeps_what_the_window_sees(window, chunks, page):
    attn = layer(mask_variant=WINDOW, local_window_size=window)
    flat, cache = KVCache(PARAMS, 2), PagedKVCache(PARAMS, 2, pages=12, page_size=page, window=window)
    for i, chunk in enumerate(chunks):
        x, offsets = normal((chunk + 1, HIDDEN), i), [0, chunk, chunk + 1]
        assert np.array_equal(*(attn(x, kv_cache=each, row_offsets=offsets) for each in (cache, flat)))
        used = -(-(window + chunk - 1) // page) + 1 + -(-(i + 1) // page)
        assert cache.pages - cache.free_pages <= used
    assert cache.positions().tolist() == list(range(sum(chunks)))


def test_pages_that_a_window_has_left_are_not_read():
    attn = layer(mask_variant=WINDOW, local_window_size=100)
    flat, cache = KVCache(PARAMS), PagedKVCache(PARAMS, pages=12, window=100)
    for i, chunk in enumerate([300, 1, 200, 130, 1, 1, 300, 5]):
        x = normal((chunk, HIDDEN), i)
        assert np.array_equal(attn(x, kv_cache=cache), attn(x, kv_cache=flat))
        idle = np.flatnonzero(cache._pool.references == 0)
        cache.view().keys[idle], cache.view().values[idle] = np.nan, np.nan
        cache.view().pages[0, : cache.starts[0] // 128] = idle[0]
    assert cache.starts[0] == 768


def test_a_window_cache_says_what_it_has_left_behind():
    cache, attn = PagedKVCache(PARAMS, pages=8, window=100), layer(mask_variant=WINDOW, local_window_size=100)
    attn(normal((400, HIDDEN)), kv_cache=cache)
    cache.truncate(390)  # the last chunk can be taken back
    attn(normal((10, HIDDEN)), kv_cache=cache)
    assert cache.starts.tolist() == [256] and cache.free_pages == 6
    with pytest.raises(
        CacheError, match="token 3 of sequence 0 was asked for; its window has left those before 256 behind"
    ):
        cache.read(0, 3)
    for edit in (lambda: cache.truncate(300), lambda: cache.remove(0, 300, 390)):
        with pytest.raises(
            CacheError, match=r"a token behind 3.0 of sequence 0 would see token 2\d\d, and the window has left"
        ):
            edit()
    with pytest.raises(
        CacheError, match=r"by the mask Causal\(\), new tokens of sequence 0 see token 0, and the cache's window"
    ):
        layer()(normal((1, HIDDEN)), kv_cache=cache)
    assert len(cache) == 400
    cache.reset()
    layer()(normal((90, HIDDEN)), kv_cache=cache)  # nothing is left behind yet


def test_window_caches_fork_find_prefixes_and_defragment():
    attn, x = layer(mask_variant=WINDOW, local_window_size=100), EMBEDDINGS[np.arange(700) % 64]
    cache, flat = PagedKVCache(PARAMS, 3, pages=12, window=100), KVCache(PARAMS)
    attn(x[:300], kv_cache=cache, row_offsets=[0, 300, 300, 300])
    attn(x[300:520], kv_cache=cache, row_offsets=[0, 220, 220, 220])
    assert cache.starts[0] == 128
    cache.remember(0, np.arange(700))
    assert cache.match(np.arange(700)) == 512 and cache.begin(1, np.arange(700)) == 512
    assert cache.starts[1] == 384
    cache.fork(0, 2)
    assert cache.defragment() and cache.starts.tolist() == [128, 384, 128]
    got = attn(np.concatenate([x[520:], x[512:], x[520:]]), kv_cache=cache, row_offsets=[0, 180, 368, 548])
    want = attn(x, kv_cache=flat)
    for rows, first in ((got[:180], 520), (got[180:368], 512), (got[368:], 520)):
        assert nmse(rows, want[first:]) < 1e-11


# The pool


def test_defragmenting_and_resizing_keep_sequences_and_prefixes():
    cache, prompt = PagedKVCache(SMALL, 4, pages=12), np.arange(300)
    for sequence in range(3):
        fill(cache, 256, sequence, seed=sequence)
    fill(cache, 300, 3, seed=3)
    cache.release(1, prompt)
    before = [cache.read(s) for s in range(4)]
    assert cache.defragment() == 7  # three that sequences have, and two that are only known, are behind them now
    assert cache.view().pages.max() == 6 and cache.defragment() == 0
    assert all(same(cache, s, pair) for s, pair in enumerate(before)) and cache.match(prompt) == 256
    for pages, known in ((20, 256), (9, 256), (8, 128), (7, 0)):
        cache.resize(pages)
        assert all(same(cache, s, pair) for s, pair in enumerate(before))
        assert (cache.pages, cache.free_pages, cache.match(prompt)) == (pages, pages - 7, known)
    with pytest.raises(CacheError, match="pages is 6; sequences have 7"):
        cache.resize(6)


def test_it_says_what_it_is():
    cache = PagedKVCache(SMALL, 2, pages=4)
    fill(cache, 300)
    assert repr(cache) == "PagedKVCache(2 sequences, tokens: 300, 0, float32, 0.0 MB, 1 of 4 pages free)"
    assert cache.capacity == 384 and cache.nbytes == 4 * 8 * 16 * (4 + 16) * 4


def test_wrong_parameters_are_named():
    with pytest.raises(ValueError, match="page_size is 200; expected a multiple of 128"):
        PagedKVCache(SMALL, pages=4, page_size=200)
    for name, value in (("pages", 0), ("page_size", 64), ("window", 0), ("sequences", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected at least"):
            PagedKVCache(SMALL, **({"pages": 4} | {name: value}))
