"""What happens to projected rows on the GPU beside their rotation, against float64."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qattn.cuda import heads
from tests.strategies import normal

some = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def maybe(draw, array):
    return array if draw else None


@some
@given(
    tokens=st.integers(0, 4), n=st.integers(1, 600), factor=st.booleans(), bias=st.booleans(), limit=st.booleans()
)  # fmt: skip
def test_finish_rounds_as_float32_does(cupy, tokens, n, factor, bias, limit):
    x, factor, bias = normal((tokens, n)), maybe(factor, normal(n, 1)), maybe(bias, normal(n, 2))
    out, limit = cupy.asarray(x), maybe(limit, np.resize(np.array([0, 0.7, 3e38], np.float32), n))
    heads.finish(out, *(a if a is None else cupy.asarray(a) for a in (factor, bias, limit)))
    want = x if factor is None else x * factor
    want = want if bias is None else want.astype(np.float64) + bias
    want = want if limit is None else np.clip(want, -limit, limit)
    assert_allclose(out.get(), want, rtol=2e-7, atol=2e-7)


def test_a_clamp_keeps_nan(cupy):
    out = cupy.asarray(np.array([[np.nan, -3, 3]], np.float32))
    heads.finish(out, None, None, cupy.asarray(np.full(3, 2, np.float32)))
    assert_allclose(out.get(), [[np.nan, -2, 2]])


@some
@given(
    tokens=st.integers(1, 3), first=st.integers(0, 9), groups=st.integers(1, 5),
    size=st.integers(1, 200) | st.just(1500), weight=st.booleans(), bias=st.booleans(), layer=st.booleans(),
)  # fmt: skip
def test_norms_agree_with_float64(cupy, tokens, first, groups, size, weight, bias, layer):
    x = normal((tokens, first + groups * size + 3)) + np.float32(0.5)
    weight, bias = maybe(weight, normal((groups, size), 1)), maybe(bias, normal((groups, size), 2))
    out = cupy.asarray(x)
    given = (a if a is None else cupy.asarray(a) for a in (weight, bias))
    heads.norm_heads(out, first, groups, size, *given, 1e-5, layer)
    piece = x[:, first : first + groups * size].reshape(tokens, groups, size).astype(np.float64)
    if layer:
        piece = piece - piece.mean(axis=2, keepdims=True)
    piece = piece / np.sqrt((piece**2).mean(axis=2, keepdims=True) + 1e-5)
    piece = piece * (1 if weight is None else weight) + (0 if bias is None else bias)
    want = x.astype(np.float64)
    want[:, first : first + groups * size] = piece.reshape(tokens, -1)
    assert_allclose(out.get(), want, rtol=1e-5, atol=1e-4 if layer and size < 8 else 1e-5)


@some
@given(tokens=st.integers(1, 4), first=st.integers(0, 9), count=st.integers(1, 600))
def test_tokens_are_scaled(cupy, tokens, first, count):
    x, table, angles = normal((tokens, first + count + 2)), normal(50, 1), np.arange(tokens) * 11 % 50
    out = cupy.asarray(x)
    heads.scale_tokens(out, first, count, cupy.asarray(table), cupy.asarray(angles))
    want = x.copy()
    want[:, first : first + count] *= table[angles][:, None]
    assert np.array_equal(out.get(), want)


EXACT = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}


def test_every_gate_has_an_exact_one():
    assert tuple(EXACT) == heads.GATES


@some
@given(
    function=st.sampled_from(heads.GATES), tokens=st.integers(1, 3), count=st.integers(1, 4), size=st.integers(1, 90),
    first=st.integers(0, 5), per_head=st.booleans(), spread=st.sampled_from([0.1, 1, 20]),
)  # fmt: skip
def test_gates_agree_with_float64(cupy, function, tokens, count, size, first, per_head, spread):
    h, width = normal((tokens, count, size)), count if per_head else count * size
    x = normal((tokens, first + width + 1), 1) * np.float32(spread)
    out = cupy.asarray(h)
    heads.gate(out, cupy.asarray(x), first, per_head, function)
    factor = EXACT[function](x[:, first : first + width].astype(np.float64)).reshape(tokens, count, -1)
    assert_allclose(out.get(), h * factor, rtol=2e-6 + 2e-7 * spread * 4, atol=1e-30)


@pytest.mark.parametrize("function", heads.GATES)
def test_gates_have_no_overflow(cupy, function):
    x = np.array([[-1e30, -200, 0, 200, 1e30]], np.float32)
    out = cupy.asarray(np.ones((1, 5, 1), np.float32))
    heads.gate(out, cupy.asarray(x), 0, True, function)
    with np.errstate(over="ignore"):
        assert_allclose(out.get()[0, :, 0], EXACT[function](x[0].astype(np.float64)), rtol=2e-6, atol=1e-37)
