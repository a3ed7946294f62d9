"""What a cache rounds keys and values to, and attention over it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import KVCache, KVCacheParams, cache_types, masks
from qattn.backends import cpu
from qattn.logits import Logits
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

TYPES = tuple(type_.name for type_ in cache_types.TYPES)
# What a type adds to the output on Gaussian q, k and v, as normalized mean squared error.
ERRORS = {
    "float32": 1e-12, "float16": 1e-6, "bfloat16": 1e-4, "float8": 5e-3, "q8_0": 2e-4,
    "q5_1": 4e-3, "q5_0": 5e-3, "q4_1": 2e-2, "q4_0": 2e-2, "iq4_nl": 2e-2,
}  # fmt: skip


def filled(dtype, keys, kv_heads=2, head_dim=64, value_dim=64, **changes):
    cache = KVCache(KVCacheParams(kv_heads, head_dim, value_dim, dtype=dtype, **changes))
    cache.append(normal((keys, kv_heads, head_dim), 1), normal((keys, kv_heads, value_dim), 2))
    return cache


def attend(cache, q, exact):
    offsets = np.array([0, len(q)])
    return cpu.attend(q.copy(), cache, offsets, masks.Causal(), Logits(q.shape[2] ** -0.5), exact=exact)


def want(cache, q):
    """Attention in float64 over what the cache gives out."""
    keys, values = cache.read()
    return reference.attention(q, keys, values, q.shape[2] ** -0.5, reference.causal(len(q), len(keys)))


@pytest.mark.parametrize("dtype", TYPES)
def test_attention_over_each_type(dtype):
    """A token, whose keys are cut into parts, and a prompt; in float32, and as fast as can be."""
    cache = filled(dtype, 600)
    for tokens in (1, 7):
        q = normal((tokens, 6, 64), 3)
        out, lse = want(cache, q)
        exact, exact_lse = attend(cache, q, exact=True)
        assert nmse(exact, out) < 1e-10
        assert np.abs(exact_lse - lse).max() < 1e-4
        assert nmse(attend(cache, q, exact=False)[0], out) < 5e-4


@pytest.mark.parametrize("dtype", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_are_rounded_as_in_files(dtype):
    for stored, given_values in zip(
        filled(dtype, 40).read(), (normal((40, 2, 64), 1), normal((40, 2, 64), 2)), strict=True
    ):
        rounded = np.asarray(qattn.quantize(given_values.reshape(-1, 64), dtype.upper()))
        assert np.abs(stored.reshape(-1, 64) - rounded).max() < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_the_error_of_each_type(dtype):
    """On Gaussian keys and values, which have no outliers."""
    cache, q = filled(dtype, 500, head_dim=128, value_dim=128), normal((4, 8, 128), 3)
    keys, values = normal((500, 2, 128), 1), normal((500, 2, 128), 2)
    exact, _ = reference.attention(q, keys, values, 128**-0.5, reference.causal(4, 500))
    error = nmse(attend(cache, q, exact=True)[0], exact)
    assert error < ERRORS[dtype]
    assert error > ERRORS[dtype] / 100 or dtype == "float32"  # so that the bounds say something


@settings(max_examples=20)
@given(
    pair=st.sampled_from(["float16/q5_1", "q8_0/q4_0", "iq4_nl"]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    head_dim=st.integers(2, 80),
    value_dim=st.integers(1, 80),
    keys=st.integers(1, 150),
    kept=st.integers(0, 150),
)
def test_any_pair_and_any_shape(pair, kv_heads, group, head_dim, value_dim, keys, kept):
    """A sequence that was cut within a tile and continued is like one that never had what was cut."""
    cache = filled(pair, keys, kv_heads, head_dim, value_dim)
    kept = min(kept, keys)
    cache.truncate(kept)
    cache.append(normal((20, kv_heads, head_dim), 5), normal((20, kv_heads, value_dim), 6))
    fresh = KVCache(cache.params)
    fresh.append(normal((keys, kv_heads, head_dim), 1)[:kept], normal((keys, kv_heads, value_dim), 2)[:kept])
    fresh.append(normal((20, kv_heads, head_dim), 5), normal((20, kv_heads, value_dim), 6))
    q = normal((3, kv_heads * group, head_dim), 7)
    out, _ = want(cache, q)
    assert nmse(attend(cache, q, exact=True)[0], out) < 1e-10
    assert np.array_equal(attend(cache, q, exact=False)[0], attend(fresh, q, exact=False)[0])


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_0/q5_1"])
def test_a_hadamard_rotation_spreads_outliers(dtype):
    """One element in each head is forty times as large as the rest."""
    keys, values, q = normal((300, 2, 64), 1), normal((300, 2, 64), 2), normal((3, 4, 64), 3)
    keys[..., 5] *= 40
    q[..., 5] /= 40
    exact, _ = reference.attention(q, keys, values, 0.125, reference.causal(3, 300))
    errors = []
    for hadamard in (False, True):
        attn_cache = KVCache(KVCacheParams(2, 64, dtype=dtype, hadamard=hadamard))
        attn_cache.append(keys, values)
        errors.append(nmse(attend(attn_cache, q, exact=True)[0], exact))
    assert errors[1] < errors[0] / 2


def test_bytes_are_what_the_type_says():
    for dtype, bits in (("float32", 32), ("bfloat16", 16), ("float8", 8), ("q8_0", 8.5), ("q4_0", 4.5), ("q5_1", 6)):
        params = KVCacheParams(4, 128, dtype=dtype)
        assert params.bytes_per_token == 4 * 256 * bits / 8
        cache = KVCache(params)
        cache.reserve(np.array([1024]))
        assert cache.nbytes <= 1.03 * 1024 * params.bytes_per_token


def test_a_type_that_is_none_is_named():
    with pytest.raises(ValueError, match="dtype is 'q3_0'; a cache stores float32, float16, bfloat16, float8, q8_0"):
        KVCacheParams(1, 32, dtype="q3_0")
