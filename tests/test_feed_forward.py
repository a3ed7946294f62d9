"""The kernels between a decoder's products."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qattn.cpu.feed_forward import gated, rms_norm, softcap
from tests.strategies import normal

SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 70))


@given(shape=SHAPES, size=st.floats(1e-3, 1e3))
def test_rms_norm_agrees_with_float64(shape, size):
    x, weight = normal(shape) * np.float32(size), normal(shape[1:], 1)
    out = np.empty(shape, np.float32)
    rms_norm(x, weight, np.float32(1e-5), out, parts=2)
    exact = x.astype(np.float64)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert_allclose(out, want, rtol=1e-5, atol=1e-7)


def activated(gate, activation):
    """The activation g · sigmoid(z) in float64, and |z|."""
    z = gate if activation == "silu" else 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return gate * np.exp(-np.logaddexp(0, -z)), np.abs(z)


@given(shape=SHAPES)
def test_a_norm_in_place_gives_the_same_bits(shape):
    x, weight = normal(shape), normal(shape[1:], 1)
    out = np.empty(shape, np.float32)
    rms_norm(x, weight, np.float32(1e-5), out)
    rms_norm(x, weight, np.float32(1e-5), x)
    assert np.array_equal(x, out)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@given(shape=SHAPES, size=st.floats(1e-2, 300))
def test_a_gated_activation_agrees_with_float64(activation, shape, size):
    tokens, n = shape
    gate_up = normal((tokens, 2 * n)) * np.float32(size)
    out = np.empty(shape, np.float32)
    gated(activation)(gate_up, out, parts=2)
    gate, up = gate_up[:, :n].astype(np.float64), gate_up[:, n:]
    want, exponent = activated(gate, activation)
    limit = 1e-6 + 2e-7 * exponent  # the exponent is a float32 too, and its rounding grows with it
    assert (np.abs(out - want * up) <= limit * np.abs(want * up) + 1e-30).all()


def test_gelu_is_the_published_formula():
    gate = np.linspace(-4, 4, 64, dtype=np.float32)[None]
    out = np.empty_like(gate)
    gated("gelu")(np.concatenate([gate, np.ones_like(gate)], axis=1), out)
    x = gate.astype(np.float64)
    want = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    assert_allclose(out, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("n", [11, 16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_activation_has_no_overflow_and_keeps_nan(activation, n):
    gate = np.array([-1e38, -200, 200, 1e30, np.nan, *range(n - 5)], np.float32)[None]
    out = np.empty((1, n), np.float32)
    gated(activation)(np.concatenate([gate, np.ones((1, n), np.float32)], axis=1), out)
    assert_allclose(out[0, :4], [0, 0, 200, 1e30])
    assert np.isnan(out[0, 4]) and not np.isnan(out[0, 5:]).any()


@given(shape=SHAPES, limit=st.floats(0.5, 60), size=st.floats(1e-3, 1e3))
def test_the_soft_cap_agrees_with_float64(shape, limit, size):
    x = normal(shape) * np.float32(size)
    want = limit * np.tanh(x.astype(np.float64) / limit)
    softcap(x, np.float32(limit), parts=3)
    assert_allclose(x, want, rtol=2e-6, atol=2e-7 * limit)
