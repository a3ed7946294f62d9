"""The kernels between a decoder's products."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qattn.cpu.feed_forward import rms_norm, swiglu
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


@given(shape=SHAPES, size=st.floats(1e-2, 300))
def test_swiglu_agrees_with_float64(shape, size):
    tokens, n = shape
    gate_up = normal((tokens, 2 * n)) * np.float32(size)
    out = np.empty(shape, np.float32)
    swiglu(gate_up, out, parts=2)
    gate, up = gate_up[:, :n].astype(np.float64), gate_up[:, n:]
    want = gate * np.exp(-np.logaddexp(0, -gate)) * up
    limit = 1e-6 + 1e-7 * np.abs(gate)  # the exponent is a float32 too, and its rounding grows with it
    assert (np.abs(out - want) <= limit * np.abs(want) + 1e-30).all()


def test_swiglu_has_no_overflow_and_keeps_nan():
    gate = np.array([-1e38, -200, 200, 1e30, np.nan, *range(11)], np.float32)[None]
    out = np.empty((1, 16), np.float32)
    swiglu(np.concatenate([gate, np.ones((1, 16), np.float32)], axis=1), out)
    assert_allclose(out[0, :4], [0, 0, 200, 1e30])
    assert np.isnan(out[0, 4]) and not np.isnan(out[0, 5:]).any()
