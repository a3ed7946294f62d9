"""Caches of codes on a GPU: what is stored has the bits of a CPU's, and attention agrees with float64 on it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn import KVCache, KVCacheParams, cache_types
from qattn.cache_types import stride
from qattn.cuda import heads
from qattn.kv_cache import layouts
from qattn.masks.causal import Causal
from qattn.rope import RotaryEmbedding
from tests.cuda.cases import CODES, Case, Strided, Window, decode, widened
from tests.cuda.test_rope import Step
from tests.strategies import normal

one_cupy = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
some = settings(one_cupy, max_examples=8)


def stored(cupy, kind, step):
    """What the first token of each sequence becomes, on a GPU and on a CPU: keys and values."""
    cache, _, _ = step.run(cupy, kind)
    slots = np.arange(len(step.new))
    gpu = [
        widened(kind, array, size)[slots, :, 0]
        for array, size in ((cache.keys, step.head_dim), (cache.values, step.value_dim))
    ]
    params = KVCacheParams(
        step.kv_heads, step.head_dim, step.value_dim, next(t.name for t in cache_types.TYPES if t.kind == kind)
    )
    _, keys, values = step.expected()
    cpu = KVCache(params)
    cpu.append(keys.astype(np.float32), values.astype(np.float32))
    return gpu, cpu.read()


@pytest.mark.parametrize("kind", CODES)
@settings(some)
@given(
    head_dim=st.integers(2, 130), value_dim=st.integers(1, 130), seed=st.integers(0, 99),
    special=st.sampled_from([0, 1e-9, 300, 70000, -0.5]),
)  # fmt: skip
def test_a_row_has_the_bits_of_a_cpus(cupy, kind, head_dim, value_dim, seed, special):
    """Also where an element is far larger than the others, or all are tiny, or alike."""

    class Odd(Step):
        @property
        def qkv(self):
            rows = normal((3, 2 * head_dim + value_dim), seed)
            rows[0, head_dim], rows[0, 2 * head_dim] = special, special
            rows[1] = special if abs(special) < 60000 else 0
            rows[2, 1::2] = -rows[2, : rows.shape[1] // 2]
            return rows

    step = Odd(1, 1, head_dim, value_dim, (1, 1, 1), (0, 0, 0), RotaryEmbedding(2))
    for gpu, cpu in zip(*stored(cupy, kind, step), strict=True):
        assert np.array_equal(gpu, cpu)


@pytest.mark.parametrize("kind", CODES)
def test_rows_take_what_the_type_says(kind):
    type_ = cache_types.of_kind(kind)
    for size in (64, 128, 192, 256):
        assert stride(kind, size) == type_.row_bytes(size)
    assert stride(kind, 96) <= type_.row_bytes(96) + 2


@pytest.mark.parametrize("kind", CODES)
def test_values_become_finite(cupy, kind):
    class Wild(Step):
        @property
        def qkv(self):
            rows = normal((1, 3 * 64))
            rows[0, -3:] = np.nan, np.inf, -np.inf
            return rows

    cache, _, _ = Wild(1, 1, 64, 64, (1,), (0,), RotaryEmbedding(2)).run(cupy, kind)
    assert np.isfinite(widened(kind, cache.values, 64)).all()


@pytest.mark.parametrize("kind", CODES)
def test_few_and_many_tokens_attend(cupy, kind):
    decode(kind, 4, 128, 128, (200, 63, 64, 0)).check(cupy, Causal())
    Case(kind, 4, 2, 128, 128, (70, 1), (33, 100)).check(cupy, Causal())


@pytest.mark.parametrize(("kind", "head_dim", "value_dim"), [("q8_0", 16, 48), ("q5_1", 80, 112)])
def test_heads_of_many_sizes(cupy, kind, head_dim, value_dim):
    Case(kind, 3, 1, head_dim, value_dim, (1,), (150,)).check(cupy, Causal())
    Case(kind, 3, 1, head_dim, value_dim, (40,), (90,)).check(cupy, Window(50))


PAIRS = "q8_0/q4_0 bf16/q5_1 q4_1/f16 q8_0/f32"


@pytest.mark.parametrize("kind", PAIRS.split())
def test_keys_and_values_of_two_types(cupy, kind):
    decode(kind, 4, 64, 64, (500, 100), capacity=2048, page=64).check(cupy, Causal())
    Case(kind, 4, 2, 64, 64, (40, 3), (33, 100), page=64).check(cupy, Causal())


@pytest.mark.parametrize("kind", ["f8", "q5_1"])
def test_exact_in_pages(cupy, kind):
    Case(kind, 2, 1, 70, 33, (9, 1), (33, 100), exact=True, page=64).check(cupy, Causal())


def test_options_and_pages(cupy):
    case = Case("q5_1", 4, 2, 64, 64, (1, 40), (300, 20), options=("cap", "sinks", "bias"), page=128)
    case.check(cupy, Strided(3))
    case._replace(new=(1, 1)).check(cupy, Strided(3))


@settings(some)
@given(size=st.integers(1, 300), heads_=st.integers(1, 4), tokens=st.integers(1, 4))
def test_hadamard_is_that_of_a_cpu(cupy, size, heads_, tokens):
    x = normal((tokens, 3 + heads_ * size + 2))
    rows = cupy.asarray(x)
    heads.hadamard(rows, 3, heads_, size)
    want = x.copy()
    want[:, 3:-2] = layouts.hadamard(x[:, 3:-2].reshape(tokens, heads_, size)).reshape(tokens, -1)
    assert np.abs(rows.get() - want).max() < 1e-5
    assert np.array_equal(rows.get()[:, [0, 1, 2, -2, -1]], x[:, [0, 1, 2, -2, -1]])
