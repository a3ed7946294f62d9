"""Rotary embedding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import RotaryEmbedding
from tests import reference
from tests.strategies import normal

ropes = st.builds(
    RotaryEmbedding,
    st.integers(1, 16).map(lambda pairs: 2 * pairs),
    st.sampled_from([100.0, 10000.0, 5e5]),
    pairing=st.sampled_from(["interleaved", "neox"]),
    scale=st.sampled_from([1.0, 4.0]),
)


@settings(max_examples=50)
@given(
    rope=ropes, tokens=st.integers(1, 9), heads=st.integers(1, 4), rest=st.integers(0, 7), start=st.integers(0, 5000)
)
def test_rotation_agrees_with_float64(rope, tokens, heads, rest, start):
    x = normal((tokens, heads, rope.rope_dims + rest))
    got = qattn.rope(x, start, rope)
    want = reference.rotate(x, np.arange(start, start + tokens), rope)
    assert np.abs(got - want).max() < 1e-5
    assert np.array_equal(got[..., rope.rope_dims :], x[..., rope.rope_dims :])


@settings(max_examples=30)
@given(rope=ropes, near=st.integers(0, 50), far=st.integers(0, 50), shift=st.integers(0, 4000))
def test_scores_depend_only_on_distance(rope, near, far, shift):
    q, k = normal((1, 1, rope.rope_dims)), normal((1, 1, rope.rope_dims), 1)

    def score(moved):
        return float((qattn.rope(q, [near + moved], rope) * qattn.rope(k, [far + moved], rope)).sum())

    assert abs(score(0) - score(shift)) < 1e-4


def test_pairings_differ_by_a_permutation():
    x = normal((3, 2, 8))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # interleaved pairs side by side → half a head apart
    normal_, neox = RotaryEmbedding(8), RotaryEmbedding(8, pairing="neox")
    assert np.array_equal(qattn.rope(x, 7, normal_)[..., order], qattn.rope(x[..., order], 7, neox))


def test_linear_scaling_divides_positions():
    x = normal((1, 1, 8))
    assert np.allclose(qattn.rope(x, [12], RotaryEmbedding(8, scale=4.0)), qattn.rope(x, [3], RotaryEmbedding(8)))


def test_factors_divide_frequencies():
    rope = RotaryEmbedding(8, factors=[1, 2, 4, 8])
    assert np.array_equal(rope.frequencies, RotaryEmbedding(8).frequencies / [1, 2, 4, 8])


def test_the_table_grows_and_is_kept():
    rope = RotaryEmbedding(8)
    short = rope.table(3)[0]
    assert rope.table(3)[0] is short
    long = rope.table(len(short) + 1)[0]
    assert len(long) >= 2 * len(short) and np.array_equal(long[: len(short)], short)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope_dims": 7}, "rope_dims is 7; pairs need a positive even number"),
        ({"rope_dims": 8, "theta": 0.0}, "theta is 0.0; expected a positive number"),
        ({"rope_dims": 8, "scale": float("nan")}, "scale is nan"),
        ({"rope_dims": 8, "pairing": "normal"}, "pairing is 'normal'; expected one of 'interleaved', 'neox'"),
        ({"rope_dims": 8, "factors": [1.0, 2.0]}, r"factors has shape \(2,\); rope_dims 8 needs \(4,\)"),
        ({"rope_dims": 8, "factors": [1.0, 2.0, 0.0, 1.0]}, "factors must be positive and finite"),
    ],
)
def test_wrong_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)


def test_wrong_positions_are_named():
    x, rope = normal((3, 2, 8)), RotaryEmbedding(8)
    with pytest.raises(ValueError, match=r"positions\[1\] is -4; a position is at least 0"):
        qattn.rope(x, [0, -4, 2], rope)
    with pytest.raises(ValueError, match=r"positions has shape \(2,\); expected \(3,\)"):
        qattn.rope(x, [0, 1], rope)
    with pytest.raises(ValueError, match="expected integers"):
        qattn.rope(x, [0.5, 1.0, 2.0], rope)
    with pytest.raises(ValueError, match="x has heads of 8, shorter than the 16 that rotate"):
        qattn.rope(x, 0, RotaryEmbedding(16))
