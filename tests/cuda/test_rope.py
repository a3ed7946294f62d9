"""The rotary embedding on a GPU, fused with the write to the cache, against float64."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn.batch import Batch
from qattn.cuda import rope as cuda_rope
from qattn.rope import RotaryEmbedding
from tests import reference
from tests.cuda.cases import contents, empty_cache, in_pages, storage_of, widened
from tests.strategies import normal

KINDS = ("f32", "f16", "bf16")
STEP = {"f32": 2e-6, "f16": 2.0**-11, "bf16": 2.0**-8}  # the relative error of rounding to a cache's type

settings.register_profile("cuda", suppress_health_check=[HealthCheck.function_scoped_fixture])
one_cupy = settings.get_profile("cuda")


class Step(NamedTuple):
    """New tokens of several sequences, which are rotated and stored."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    new: tuple[int, ...]
    before: tuple[int, ...]
    rope: RotaryEmbedding
    extra: int = 0
    """Columns of a projected row behind q, k and v."""

    @property
    def tokens(self):
        return sum(self.new)

    @property
    def places(self):
        return np.concatenate([b + np.arange(n) for b, n in zip(self.before, self.new, strict=True)]).astype(np.int64)

    @property
    def slots(self):
        return np.repeat(np.arange(len(self.new)), self.new)

    @property
    def qkv(self):
        width = self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim) + self.extra
        return normal((self.tokens, width))

    def expected(self):
        """q, keys and values of the new tokens, float64."""
        ends = np.cumsum([self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim])
        parts, sizes = np.split(self.qkv, ends, axis=1), (self.head_dim, self.head_dim, self.value_dim)
        q, k, v = (part.reshape(self.tokens, -1, size) for part, size in zip(parts, sizes, strict=False))
        return reference.rotate(q, self.places, self.rope), reference.rotate(k, self.places, self.rope), v

    def arguments(self, cupy):
        """What a kernel takes before the cache: qkv, tables, batch, pairing."""
        cos, sin = (cupy.asarray(a) for a in self.rope.table(int(self.places.max()) + 1))
        offsets = np.concatenate([[0], np.cumsum(self.new)])
        places = cupy.asarray(self.places)
        batch = Batch(cupy.asarray(self.slots), places, places, cupy.asarray(offsets))
        return cupy.asarray(self.qkv), cos, sin, batch, self.rope.neox

    def run(self, cupy, kind, page=0):
        cache = empty_cache(cupy, kind, len(self.new), self.kv_heads, 128, self.head_dim, self.value_dim)
        cache = in_pages(cupy, cache, page) if page else cache
        lengths, q = cupy.asarray(np.array(self.before)), cupy.zeros((self.tokens, self.heads, self.head_dim), "f4")
        cuda_rope.rotate_and_store(storage_of(kind), *self.arguments(cupy), cache, lengths, q)
        return cache, lengths, q


ropes = st.builds(RotaryEmbedding, st.integers(1, 40).map(lambda i: 2 * i),
                  pairing=st.sampled_from(["interleaved", "neox"]))  # fmt: skip


@st.composite
def steps(draw):
    rope, sequences = draw(ropes), draw(st.integers(1, 3))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    new = draw(st.lists(st.integers(0, 4), min_size=sequences, max_size=sequences).filter(any))
    before = draw(st.lists(st.integers(0, 120), min_size=sequences, max_size=sequences))
    return Step(
        group * kv_heads, kv_heads, rope.rope_dims + draw(st.integers(0, 9)), draw(st.integers(1, 70)), tuple(new),
        tuple(before), rope, draw(st.integers(0, 9)),
    )  # fmt: skip


@settings(one_cupy, max_examples=30)
@given(step=steps(), kind=st.sampled_from(KINDS), page=st.sampled_from([0, 64]))
def test_queries_keys_and_values_agree_with_float64(cupy, step, kind, page):
    cache, lengths, q = step.run(cupy, kind, page)
    want_q, want_k, want_v = step.expected()
    assert np.abs(q.get() - want_q).max() < 1e-5
    stored = [contents(kind, cache, s) for s in range(len(step.new))]
    for i, want in enumerate((want_k, want_v)):
        got = np.array([stored[s][i][place] for s, place in zip(step.slots, step.places, strict=True)])
        assert (np.abs(got - want) <= STEP[kind] * np.abs(want) + 1e-5).all()
    assert np.array_equal(lengths.get(), np.add(step.before, step.new))


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_in_the_cache_is_written(cupy, kind, page):
    step = Step(4, 2, 24, 8, (2, 0, 3), (5, 7, 0), RotaryEmbedding(16))
    cache, lengths, _ = step.run(cupy, kind, page)
    keys, values = cache.keys.get(), cache.values.get()
    assert np.count_nonzero(keys) == 5 * 2 * 24 and np.count_nonzero(values) == 5 * 2 * 8
    assert lengths.get().tolist() == [7, 7, 3]


def test_a_length_never_shrinks(cupy):
    """A token that is stored again leaves what stands behind it."""
    step = Step(1, 1, 8, 8, (1,), (3,), RotaryEmbedding(8))
    cache, lengths, q = step.run(cupy, "f32")
    lengths[:] = 20
    cuda_rope.rotate_and_store(storage_of("f32"), *step.arguments(cupy), cache, lengths, q)
    assert lengths.get().tolist() == [20]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_keys_and_values_are_rounded_to_the_nearest(cupy, kind):
    step = Step(1, 1, 64, 64, (8,), (0,), RotaryEmbedding(2))
    exact, narrow = step.run(cupy, "f32")[0], step.run(cupy, kind)[0]
    for wide, got in ((exact.keys, narrow.keys), (exact.values, narrow.values)):
        want = wide.get()
        if kind == "bf16":
            bits = want.view(np.uint32)
            want = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
        assert np.array_equal(widened(kind, got, 64), want.astype(np.float16) if kind == "f16" else want)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_stored_finite(cupy, kind):
    """What is forgotten stays in the cache, and is multiplied with 0."""
    step = Step(1, 1, 8, 8, (1,), (0,), RotaryEmbedding(8))
    cache, lengths, q = step.run(cupy, kind)
    qkv, *others = step.arguments(cupy)
    qkv[0, -8:-5] = cupy.asarray(np.array([np.nan, np.inf, -1e38], np.float32))
    cuda_rope.rotate_and_store(storage_of(kind), qkv, *others, cache, lengths, q)
    assert np.isfinite(widened(kind, cache.values, 8)).all()


@settings(one_cupy, max_examples=20)
@given(rope=ropes, tokens=st.integers(1, 9), heads=st.integers(1, 4), rest=st.integers(0, 9))
def test_rotate_agrees_with_float64(cupy, rope, tokens, heads, rest):
    x, positions = normal((tokens, heads, rope.rope_dims + rest)), np.arange(tokens) * 37
    cos, sin = (cupy.asarray(a) for a in rope.table(400))
    out, there = cupy.zeros(x.shape, "f4"), cupy.asarray(positions)
    cuda_rope.rotate(cupy.asarray(x), cos, sin, there, rope.neox, out)
    assert np.abs(out.get() - reference.rotate(x, positions, rope)).max() < 1e-5
    assert np.array_equal(out.get()[..., rope.rope_dims :], x[..., rope.rope_dims :])
    same = cupy.array(x)
    cuda_rope.rotate(same, cos, sin, there, rope.neox, same)
    assert np.array_equal(same.get(), out.get())
    rows = cupy.asarray(np.concatenate([x.reshape(tokens, -1), x[:, 0]], axis=1))
    cuda_rope.rotate_heads(rows, heads, x.shape[2], cos, sin, there, rope.neox)
    assert np.array_equal(rows.get(), np.concatenate([out.get().reshape(tokens, -1), x[:, 0]], axis=1))


def test_a_step_can_be_captured(cupy):
    """The kernel reads where tokens go on the device: a captured launch follows what the arrays hold."""
    step = Step(2, 1, 16, 16, (1, 1), (3, 9), RotaryEmbedding(16))
    cache, lengths, q = step.run(cupy, "f16")
    arguments = step.arguments(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the stream doesn't wait for what was done before
    with stream:
        stream.begin_capture()
        cuda_rope.rotate_and_store(storage_of("f16"), *arguments, cache, lengths, q)
        graph = stream.end_capture()
        arguments[3].places[:] += 1
        graph.launch(stream)
    stream.synchronize()
    assert lengths.get().tolist() == [5, 11]
    assert np.array_equal(cache.values.get()[0, 0, 3], cache.values.get()[0, 0, 4])
