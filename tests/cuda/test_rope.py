"""The rotary embedding on a GPU, fused with bias, clamp, norm and the write to the cache, against float64."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn.batch import Batch
from qattn.cuda import rope as cuda_rope
from qattn.rope import RotaryEmbedding
from tests import reference
from tests.strategies import normal

KINDS = ("f32", "f16", "bf16")
STEP = {"f32": 2e-6, "f16": 2.0**-11, "bf16": 2.0**-8}  # the relative error of rounding to a cache's type

settings.register_profile("cuda", suppress_health_check=[HealthCheck.function_scoped_fixture])
one_cupy = settings.get_profile("cuda")


class View(NamedTuple):
    """A cache, as the kernels see it."""

    keys: Any
    values: Any
    head_dim: int
    value_dim: int


def empty_cache(cupy, kind, sequences, kv_heads, capacity, head_dim, value_dim):
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind]
    shape = (sequences, kv_heads, capacity)
    return View(
        cupy.zeros((*shape, head_dim), dtype), cupy.zeros((*shape, value_dim), dtype), head_dim, value_dim
    )  # fmt: skip


def widened(kind, stored):
    """The numbers in a cache."""
    stored = stored.get()
    return (stored.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else stored.astype(np.float32)


def rms_norm(x, weights, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weights


class Step(NamedTuple):
    """New tokens of several sequences, and what is done to them."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    new: tuple[int, ...]
    before: tuple[int, ...]
    rope: RotaryEmbedding
    bias: bool = False
    clip: float | None = None
    norm: bool = False

    @property
    def tokens(self):
        return sum(self.new)

    @property
    def places(self):
        return np.concatenate([b + np.arange(n) for b, n in zip(self.before, self.new, strict=True)]).astype(np.int64)

    @property
    def slots(self):
        return np.repeat(np.arange(len(self.new)), self.new)

    def parts(self):
        """qkv, bias, q_norm, k_norm: random."""
        width = self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim)
        qkv, bias = normal((self.tokens, width)), normal((width,), 1) if self.bias else None
        norms = [1 + normal((self.head_dim,), seed) / 4 if self.norm else None for seed in (2, 3)]
        return qkv, bias, *(a if a is None else a.astype(np.float32) for a in norms)

    def expected(self):
        """q, keys and values of the new tokens, float64."""
        qkv, bias, q_norm, k_norm = self.parts()
        x = qkv.astype(np.float64) + (0 if bias is None else bias)
        x = x if not self.clip else np.clip(x, -self.clip, self.clip)
        ends = np.cumsum([self.heads * self.head_dim, self.kv_heads * self.head_dim])
        q, k, v = (part.reshape(self.tokens, -1, d) for part, d in zip(
            np.split(x, ends, axis=1), (self.head_dim, self.head_dim, self.value_dim), strict=True))  # fmt: skip
        if self.norm:
            q, k = rms_norm(q, q_norm, 1e-6), rms_norm(k, k_norm, 1e-6)
        return reference.rotate(q, self.places, self.rope), reference.rotate(k, self.places, self.rope), v

    def arguments(self, cupy):
        """What a kernel takes before the cache: qkv, bias, clip, norms, epsilon, tables, batch, pairing."""
        qkv, *given = (a if a is None else cupy.asarray(a) for a in self.parts())
        bias, q_norm, k_norm = given
        cos, sin = (cupy.asarray(a) for a in self.rope.table(int(self.places.max()) + 1))
        offsets = np.concatenate([[0], np.cumsum(self.new)])
        places = cupy.asarray(self.places)
        batch = Batch(cupy.asarray(self.slots), places, places, cupy.asarray(offsets))
        return qkv, bias, self.clip, q_norm, k_norm, 1e-6, cos, sin, batch, self.rope.neox

    def run(self, cupy, kind, capacity=64):
        cache = empty_cache(cupy, kind, len(self.new), self.kv_heads, capacity, self.head_dim, self.value_dim)
        lengths, q = cupy.asarray(np.array(self.before)), cupy.zeros((self.tokens, self.heads, self.head_dim), "f4")
        cuda_rope.rotate_and_store(kind)(*self.arguments(cupy), cache, lengths, q)
        return cache, lengths, q


ropes = st.builds(RotaryEmbedding, st.integers(1, 40).map(lambda i: 2 * i),
                  pairing=st.sampled_from(["interleaved", "neox"]))  # fmt: skip


@st.composite
def steps(draw):
    rope, sequences = draw(ropes), draw(st.integers(1, 3))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    new = draw(st.lists(st.integers(0, 4), min_size=sequences, max_size=sequences).filter(any))
    before = draw(st.lists(st.integers(0, 50), min_size=sequences, max_size=sequences))
    return Step(
        group * kv_heads, kv_heads, rope.rope_dims + draw(st.integers(0, 9)), draw(st.integers(1, 70)), tuple(new),
        tuple(before), rope, draw(st.booleans()), draw(st.sampled_from([None, 0, 0.7])), draw(st.booleans()),
    )  # fmt: skip


@settings(one_cupy, max_examples=30)
@given(step=steps(), kind=st.sampled_from(KINDS))
def test_queries_keys_and_values_agree_with_float64(cupy, step, kind):
    cache, lengths, q = step.run(cupy, kind)
    want_q, want_k, want_v = step.expected()
    assert np.abs(q.get() - want_q).max() < 1e-5
    for stored, want in ((cache.keys, want_k), (cache.values, want_v)):
        got = widened(kind, stored)[step.slots, :, step.places]
        assert (np.abs(got - want) <= STEP[kind] * np.abs(want) + 1e-5).all()
    assert np.array_equal(lengths.get(), np.add(step.before, step.new))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_in_the_cache_is_written(cupy, kind):
    step = Step(4, 2, 24, 8, (2, 0, 3), (5, 7, 0), RotaryEmbedding(16))
    cache, lengths, _ = step.run(cupy, kind)
    keys, values = cache.keys.get(), cache.values.get()
    assert np.count_nonzero(keys) == 5 * 2 * 24 and np.count_nonzero(values) == 5 * 2 * 8
    assert lengths.get().tolist() == [7, 7, 3]


def test_a_length_never_shrinks(cupy):
    """A token that is stored again leaves what stands behind it."""
    step = Step(1, 1, 8, 8, (1,), (3,), RotaryEmbedding(8))
    cache, lengths, q = step.run(cupy, "f32")
    lengths[:] = 20
    cuda_rope.rotate_and_store("f32")(*step.arguments(cupy), cache, lengths, q)
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
        assert np.array_equal(widened(kind, got), want.astype(np.float16) if kind == "f16" else want)


@settings(one_cupy, max_examples=20)
@given(rope=ropes, tokens=st.integers(1, 9), heads=st.integers(1, 4), rest=st.integers(0, 9))
def test_rotate_agrees_with_float64(cupy, rope, tokens, heads, rest):
    x, positions = normal((tokens, heads, rope.rope_dims + rest)), np.arange(tokens) * 37
    cos, sin = (cupy.asarray(a) for a in rope.table(400))
    out = cupy.zeros(x.shape, "f4")
    cuda_rope.rotate(cupy.asarray(x), cos, sin, cupy.asarray(positions), rope.neox, out)
    assert np.abs(out.get() - reference.rotate(x, positions, rope)).max() < 1e-5
    assert np.array_equal(out.get()[..., rope.rope_dims :], x[..., rope.rope_dims :])


def test_a_step_can_be_captured(cupy):
    """The kernel reads where tokens go on the device: a captured launch follows what the arrays hold."""
    step = Step(2, 1, 16, 16, (1, 1), (3, 9), RotaryEmbedding(16))
    cache, lengths, q = step.run(cupy, "f16")
    arguments = step.arguments(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the stream doesn't wait for what was done before
    with stream:
        stream.begin_capture()
        cuda_rope.rotate_and_store("f16")(*arguments, cache, lengths, q)
        graph = stream.end_capture()
        arguments[8].places[:] += 1
        graph.launch(stream)
    stream.synchronize()
    assert lengths.get().tolist() == [5, 11]
    assert np.array_equal(cache.values.get()[0, 0, 3], cache.values.get()[0, 0, 4])
