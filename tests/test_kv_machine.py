"""Random operations on a paged cache, a contiguous one, and a list of tokens in float64, side by side."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qattn import AttentionWithRope, CacheError, KVCache, KVCacheParams, PagedKVCache, RotaryEmbedding
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

HIDDEN, HEADS, KV_HEADS, DIM, SEQUENCES, PAGES = 16, 4, 2, 8, 3, 7
EMBEDDINGS, ROPE = normal((64, HIDDEN), 1), RotaryEmbedding(DIM)
PARAMS = KVCacheParams(KV_HEADS, DIM, dtype="float32")
TEXTS = np.random.default_rng(2).integers(0, 64, (2, 4000))
CHUNKS = st.sampled_from([0, 0, 1, 2, 15, 16, 100, 128, 150, 260])
TEXT = st.sampled_from([0, 0, 0, 1])
SLOTS = st.integers(0, SEQUENCES - 1)


@pytest.fixture(scope="module", autouse=True)
def _layer():
    Caches.attn = layer()


def layer(**changes):
    attn = AttentionWithRope(
        **({"rope": ROPE, "precision": "exact", "hidden_size": HIDDEN, "kv_params": PARAMS} | changes),
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    )  # fmt: skip
    shapes = {"q": (HEADS * DIM, HIDDEN), "k": (KV_HEADS * DIM, HIDDEN), "v": (KV_HEADS * DIM, HIDDEN),
              "o": (HIDDEN, HEADS * DIM)}  # fmt: skip
    attn.load_state_dict(
        {f"{name}_proj.weight": normal(shape, i) / 4 for i, (name, shape) in enumerate(shapes.items())}
    )
    return attn


class Caches(RuleBasedStateMachine):
    attn = None

    def __init__(self):
        super().__init__()
        self.paged, self.flat = PagedKVCache(PARAMS, SEQUENCES, pages=PAGES), KVCache(PARAMS, SEQUENCES)
        self.model = [[] for _ in range(SEQUENCES)]  # of (token id, position of the key)

    # The model

    def heads(self, ids):
        """q, k and v of tokens, not rotated."""
        qkv = EMBEDDINGS[ids].astype(np.float64) @ np.asarray(self.attn.wqkv, np.float64).T
        parts = np.split(qkv, [HEADS * DIM, (HEADS + KV_HEADS) * DIM], axis=1)
        return [part.reshape(len(ids), -1, DIM) for part in parts]

    def expected(self, tokens, new):
        """The output for the last `new` of a sequence's tokens."""
        ids, positions = (np.array(each, np.int64) for each in zip(*tokens, strict=True))
        q, k, v = self.heads(ids)
        q, k = (reference.rotate(a, positions, ROPE) for a in (q, k))
        out, _ = reference.attention(q[-new:], k, v, DIM**-0.5, reference.causal(new, len(ids)))
        return out.reshape(new, -1) @ np.asarray(self.attn.o_proj.weights, np.float64).T

    def both(self, operation, *args):
        """Do the same to both caches → whether it was done: the pool may be full, and then nothing has changed."""
        before = [self.paged.read(s) for s in range(SEQUENCES)]
        try:
            getattr(self.paged, operation)(*args)
        except CacheError as error:
            assert "more pages of 128 tokens are needed" in str(error)
            for s, pair in enumerate(before):
                assert all(np.array_equal(a, b) for a, b in zip(self.paged.read(s), pair, strict=True))
            return False
        getattr(self.flat, operation)(*args)
        return True

    def span(self, data, sequence):
        length = len(self.model[sequence])
        start = data.draw(st.integers(0, length) | st.integers(0, length // 128).map(lambda page: page * 128), "start")
        stop = data.draw(
            st.none()
            | st.integers(start, length)
            | st.integers(0, (length - start) // 128).map(lambda n: start + 128 * n)
        )
        return start, stop

    # What happens

    @initialize(length=st.integers(0, 300))
    def prompt(self, length):
        self.append([length, 0, 130], 0)

    @rule(text=TEXT)
    def decode(self, text):
        self.append([1] * SEQUENCES, text)

    @rule(counts=st.lists(CHUNKS, min_size=SEQUENCES, max_size=SEQUENCES), text=TEXT)
    def append(self, counts, text):
        new, starts = [], [len(tokens) for tokens in self.model]
        for tokens, count in zip(self.model, counts, strict=True):
            first, position = len(tokens), tokens[-1][1] + 1 if tokens else 0
            new.append([(int(TEXTS[text, (first + i) % 4000]), position + i) for i in range(count)])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        x = EMBEDDINGS[[id for tokens in new for id, _ in tokens]].reshape(-1, HIDDEN)
        try:
            got = self.attn(x, kv_cache=self.paged, row_offsets=offsets)
        except CacheError as error:
            assert "more pages of 128 tokens are needed" in str(error)
            assert self.paged.lengths.tolist() == starts
            return
        assert np.array_equal(got, self.attn(x, kv_cache=self.flat, row_offsets=offsets))
        for s, tokens in enumerate(new):
            self.model[s] = self.model[s] + tokens
            if tokens:
                want = self.expected(self.model[s], len(tokens))
                assert nmse(got[offsets[s] : offsets[s + 1]], want) < 1e-9

    @rule(counts=st.lists(CHUNKS, min_size=SEQUENCES, max_size=SEQUENCES))
    def reserve(self, counts):
        self.both("reserve", self.paged.lengths + counts)

    @rule(data=st.data(), sequence=SLOTS)
    def truncate(self, data, sequence):
        length = data.draw(st.integers(0, len(self.model[sequence])))
        assert self.both("truncate", length, sequence)
        self.model[sequence] = self.model[sequence][:length]

    @rule(source=SLOTS, other=SLOTS)
    def fork(self, source, other):
        assert self.both("fork", source, other)
        self.model[other] = list(self.model[source])

    @rule(data=st.data(), source=SLOTS, other=SLOTS)
    @precondition(lambda self: sum(map(len, self.model)) < 4000)
    def copy(self, data, source, other):
        start, stop = self.span(data, source)
        if source != other and self.both("copy", source, other, start, stop):
            self.model[other] = self.model[other] + self.model[source][start:stop]

    @rule(data=st.data(), sequence=SLOTS)
    def remove(self, data, sequence):
        start, stop = self.span(data, sequence)
        if self.both("remove", sequence, start, stop):
            stop = len(self.model[sequence]) if stop is None else stop
            del self.model[sequence][start:stop]

    @rule(sequence=SLOTS)
    def keep(self, sequence):
        self.both("keep", sequence)
        self.model = [tokens if s == sequence else [] for s, tokens in enumerate(self.model)]

    @rule(data=st.data(), sequence=SLOTS, by=st.integers(-200, 200))
    def shift(self, data, sequence, by):
        start, stop = self.span(data, sequence)
        lowest = min((position for _, position in self.model[sequence][start:stop]), default=0)
        by = max(by, -lowest)
        if self.both("shift", sequence, start, stop, by, ROPE):
            moved = [(id, position + by) for id, position in self.model[sequence][start:stop]]
            self.model[sequence][start : start + len(moved)] = moved

    @rule(data=st.data(), sequence=SLOTS, by=st.integers(1, 5))
    def divide(self, data, sequence, by):
        start, stop = self.span(data, sequence)
        if self.both("divide", sequence, start, stop, by, ROPE):
            moved = [(id, position // by) for id, position in self.model[sequence][start:stop]]
            self.model[sequence][start : start + len(moved)] = moved

    @rule(sequence=SLOTS)
    def remember(self, sequence):
        self.paged.remember(sequence, [id for id, _ in self.model[sequence]])

    @rule(sequence=SLOTS)
    def release(self, sequence):
        self.paged.release(sequence, [id for id, _ in self.model[sequence]])
        self.flat.reset(sequence)
        self.model[sequence] = []

    @rule(sequence=SLOTS, text=TEXT, length=st.sampled_from([128, 129, 200, 257, 300, 600]))
    def begin(self, sequence, text, length):
        prompt = TEXTS[text, :length]
        expected = self.paged.match(prompt)
        found = self.paged.begin(sequence, prompt)
        assert found == expected and found % 128 == 0 and found < length
        self.flat.reset(sequence)
        offsets = np.where(np.arange(SEQUENCES + 1) > sequence, found, 0)
        self.attn(EMBEDDINGS[prompt[:found]], kv_cache=self.flat, row_offsets=offsets)
        self.model[sequence] = [(int(id), i) for i, id in enumerate(prompt[:found])]

    @rule(sequence=SLOTS, other=SLOTS, crosswise=st.booleans())
    def save_and_load(self, sequence, other, crosswise):
        paths = [self.directory / f"{kind}.kv" for kind in ("paged", "contiguous")]
        for cache, path in zip((self.paged, self.flat), paths, strict=True):
            cache.save(path, sequence, overwrite=True)
        try:
            self.paged.load(paths[crosswise], other)
        except CacheError as error:
            assert "more pages of 128 tokens are needed" in str(error)
            return
        self.flat.load(paths[not crosswise], other)
        self.model[other] = list(self.model[sequence])

    @rule()
    def defragment(self):
        self.paged.defragment()
        used = self.paged.pages - self.paged.free_pages
        assert self.paged.view().pages.max() <= max(used - 1, 0)

    @rule(pages=st.integers(6, 8))
    def resize(self, pages):
        used = self.paged.pages - self.paged.free_pages
        if pages >= used:
            self.paged.resize(pages)
        else:
            with pytest.raises(CacheError, match=f"pages is {pages}; sequences have {used}"):
                self.paged.resize(pages)

    @invariant()
    def all_agree(self):
        for s, tokens in enumerate(self.model):
            assert self.paged.lengths[s] == self.flat.lengths[s] == len(tokens)
            want = [position for _, position in tokens]
            assert self.paged.positions(s).tolist() == self.flat.positions(s).tolist() == want
            assert all(np.array_equal(a, b) for a, b in zip(self.paged.read(s), self.flat.read(s), strict=True))

    @invariant()
    def pages_are_counted(self):
        pool, table = self.paged._pool, self.paged._table
        held = [row[:count] for row, count in zip(table.rows, table.held, strict=True)]
        counts = np.bincount(np.concatenate(held), minlength=len(pool))
        assert np.array_equal(counts, pool.references)
        assert sorted(pool._idle) == np.flatnonzero(counts == 0).tolist()
        assert np.flatnonzero(pool.indexed).tolist() == sorted(pool._digests) == sorted(pool._found.values())

    def teardown(self):
        self.append([1] * SEQUENCES, 0)


@pytest.fixture(scope="module", autouse=True)
def _directory(tmp_path_factory):
    Caches.directory = tmp_path_factory.mktemp("saved")


class TestCaches(Caches.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40)
