"""The kernels between a decoder's products, on the GPU, against float64."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qattn.cuda.feed_forward import add, gated, rms_norm, softcap
from tests.strategies import normal
from tests.test_feed_forward import activated

some = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70) | st.sampled_from([576, 2050, 4100]))


@some
@given(shape=SHAPES, size=st.floats(1e-3, 1e3))
def test_rms_norm_agrees_with_float64(cupy, shape, size):
    x, weight = normal(shape) * np.float32(size), normal(shape[1:], 1)
    out = cupy.empty(shape, np.float32)
    rms_norm(cupy.asarray(x), cupy.asarray(weight), 1e-5, out)
    exact = x.astype(np.float64)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert_allclose(out.get(), want, rtol=1e-5, atol=1e-7)


@some
@given(shape=SHAPES)
def test_a_norm_in_place_gives_the_same_bits(cupy, shape):
    x, weight = cupy.asarray(normal(shape)), cupy.asarray(normal(shape[1:], 1))
    out = cupy.empty(shape, np.float32)
    rms_norm(x, weight, 1e-5, out)
    rms_norm(x, weight, 1e-5, x)
    assert (x.get() == out.get()).all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@some
@given(shape=SHAPES, size=st.floats(1e-2, 300))
def test_a_gated_activation_agrees_with_float64(cupy, activation, shape, size):
    tokens, n = shape
    gate_up = normal((tokens, 2 * n)) * np.float32(size)
    out = cupy.empty(shape, np.float32)
    gated(cupy.asarray(gate_up), out, activation)
    gate, up = gate_up[:, :n].astype(np.float64), gate_up[:, n:]
    want, exponent = activated(gate, activation)
    limit = 1e-6 + 2e-7 * exponent  # the exponent is a float32 too, and its rounding grows with it
    assert (np.abs(out.get() - want * up) <= limit * np.abs(want * up) + 1e-30).all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("n", [10, 12])
def test_an_activation_has_no_overflow_and_keeps_nan(cupy, n, activation):
    gate = np.array([-1e38, -200, 200, 1e30, np.nan, *range(n - 5)], np.float32)[None]
    out = cupy.empty((1, n), np.float32)
    gated(cupy.asarray(np.concatenate([gate, np.ones((1, n), np.float32)], axis=1)), out, activation)
    assert_allclose(out.get()[0, :4], [0, 0, 200, 1e30])
    assert np.isnan(out.get()[0, 4]) and not np.isnan(out.get()[0, 5:]).any()


@some
@given(shape=SHAPES, limit=st.floats(0.5, 60), size=st.floats(1e-3, 1e3))
def test_the_soft_cap_agrees_with_float64(cupy, shape, limit, size):
    x = normal(shape) * np.float32(size)
    out = cupy.asarray(x)
    softcap(out, limit)
    assert_allclose(out.get(), limit * np.tanh(x.astype(np.float64) / limit), rtol=4e-6, atol=4e-7 * limit)


@some
@given(shape=SHAPES)
def test_add_rounds_as_float32_does(cupy, shape):
    x, y = normal(shape), normal(shape, 1)
    out = cupy.asarray(x)
    add(out, cupy.asarray(y))
    assert (out.get() == x + y).all()


def test_nothing_is_launched_for_no_tokens(cupy):
    none = cupy.empty((0, 8), np.float32)
    rms_norm(none, cupy.ones(8, np.float32), 1e-5, none)
    gated(cupy.empty((0, 16), np.float32), none, "silu")
    softcap(none, 5.0)
    add(none, none)
