"""Rotary embedding."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qattn
from qattn import NTK, DynamicNTK, LongRoPE, RotaryEmbedding, YaRN, backends
from qattn.rope import longrope_magnitude, shared, yarn_magnitude
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

contexts = st.sampled_from([64, 4096, 32768])
scalings = st.one_of(
    st.none(),
    st.builds(NTK, st.floats(1, 50)),
    st.builds(DynamicNTK, st.floats(1, 8), contexts, contexts),
    st.builds(
        YaRN, st.floats(1, 40), contexts, st.floats(0, 1), st.floats(0.5, 2), st.floats(8, 64), st.floats(0.5, 4)
    ),
)


@st.composite
def embeddings(draw, **fixed):
    """Any embedding of one position a token."""
    pairs = draw(st.integers(1, 16))
    factors = st.lists(st.floats(0.5, 4), min_size=pairs, max_size=pairs)
    arguments = {
        "theta": draw(st.sampled_from([100.0, 10000.0, 5e5])),
        "pairing": draw(st.sampled_from(["interleaved", "neox"])),
        "scale": draw(st.sampled_from([1.0, 4.0])),
        "factors": draw(st.none() | factors),
        "scaling": draw(scalings | st.builds(LongRoPE, factors, factors, contexts, contexts, st.floats(1, 1.5))),
    }
    return RotaryEmbedding(2 * pairs, **{**arguments, **fixed})


def apply(rotation, angles, x):
    """Heads rotated by a given table."""
    out = np.empty_like(x)
    backends.of(x).rotate(x, rotation, angles, out)
    return out


@settings(max_examples=80)
@given(
    rope=embeddings(),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    rest=st.integers(0, 7),
    start=st.integers(0, 5000),
)
def test_rotation_agrees_with_float64(rope, tokens, heads, rest, start):
    x = normal((tokens, heads, rope.rope_dims + rest))
    got = qattn.rope(x, start, rope)
    want = reference.rotate(x, np.arange(start, start + tokens), rope)
    want[..., : rope.rope_dims] *= rope.attention_factor
    assert np.abs(got - want).max() < 1e-5
    assert np.array_equal(got[..., rope.rope_dims :], x[..., rope.rope_dims :])


@settings(max_examples=50)
@given(rope=embeddings(), near=st.integers(0, 50), far=st.integers(0, 50), shift=st.integers(0, 4000))
def test_scores_depend_only_on_distance(rope, near, far, shift):
    q, k = normal((1, 1, rope.rope_dims)), normal((1, 1, rope.rope_dims), 1)

    def score(moved):
        return float((qattn.rope(q, [near + moved], rope) * qattn.rope(k, [far + moved], rope)).sum())

    assert abs(score(0) - score(shift)) < 1e-4


@settings(max_examples=50)
@given(rope=embeddings(), position=st.integers(0, 131072))
def test_lengths_grow_by_the_attention_factor(rope, position):
    x = normal((1, 3, rope.rope_dims))
    got, want = (np.linalg.norm(a.astype(np.float64), axis=-1) for a in (qattn.rope(x, position, rope), x))
    assert np.allclose(got, want * rope.attention_factor, rtol=1e-6)


@settings(max_examples=50)
@given(rope=embeddings(), steps=st.lists(st.integers(-500, 500), min_size=4, max_size=4))
def test_rotated_heads_turn_on_by_steps(rope, steps):
    x, at = normal((4, 2, rope.rope_dims)), np.array([500, 700, 501, 4000])
    moved = apply(*rope.rotation_by(np.array(steps)), qattn.rope(x, at, rope))
    assert np.abs(moved - qattn.rope(x, at + steps, rope)).max() < 1e-5


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


def test_equal_arguments_share_an_embedding():
    first, same, other = (shared(8, factors=(1.0, 2.0, 3.0, 4.0), scaling=NTK(alpha)) for alpha in (2.0, 2.0, 3.0))
    assert first is same and first is not other


# ---------------------------------------------------------------------------------------------------- scalings


@given(theta=st.floats(100, 1e7), alpha=st.floats(1, 1000), pairs=st.integers(2, 64))
def test_ntk_keeps_the_fastest_pair_and_slows_the_last_by_alpha(theta, alpha, pairs):
    plain, slowed = (RotaryEmbedding(2 * pairs, theta, scaling=s).frequencies for s in (None, NTK(alpha)))
    assert slowed[0] == plain[0] == 1 and math.isclose(slowed[-1], plain[-1] / alpha)
    larger = RotaryEmbedding(2 * pairs, theta * alpha ** (pairs / (pairs - 1))).frequencies
    assert np.allclose(slowed, larger, rtol=1e-12)


@given(factor=st.floats(1, 8), context=st.integers(1, 10000), used=st.integers(1, 100000))
def test_dynamic_ntk_follows_the_context(factor, context, used):
    got = RotaryEmbedding(16, scaling=DynamicNTK(factor, context, used)).frequencies
    alpha = factor * used / context - (factor - 1) if used > context else 1.0
    assert np.allclose(got, RotaryEmbedding(16, scaling=NTK(alpha)).frequencies, rtol=1e-12)


@given(factor=st.floats(1, 64), context=contexts, pairs=st.integers(1, 128), theta=st.floats(1e3, 1e7))
def test_yarn_slows_later_pairs_more_and_none_more_than_the_factor(factor, context, pairs, theta):
    slowed = YaRN(factor, context).multipliers(np.arange(pairs) / pairs, 2 * pairs, theta)
    assert (np.diff(slowed) <= 0).all() and slowed.min() >= 1 / factor - 1e-12 and slowed.max() <= 1


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones():
    """The ramp of a head of 128, theta 10000, 4096 tokens: pairs that turn 32 times to once are 20.9 and 45.0."""
    slowed = YaRN(4.0, 4096).multipliers(np.arange(64) / 64, 128, 10000.0)
    assert (slowed[:21] == 1).all() and slowed[21] < 1 and slowed[45] > 0.25 and (slowed[46:] == 0.25).all()


@given(factor=st.floats(0.5, 64), attn_factor=st.floats(0.5, 2))
def test_yarn_without_extrapolation_is_linear(factor, attn_factor):
    rope = RotaryEmbedding(32, scaling=YaRN(factor, 4096, ext_factor=0.0, attn_factor=attn_factor))
    assert np.allclose(rope.frequencies, RotaryEmbedding(32, scale=factor).frequencies, rtol=1e-12)
    assert rope.attention_factor == attn_factor


def test_attention_factors():
    """0.1 ln 32 + 1 is gpt-oss's, sqrt(1 + ln 32 / ln 4096) that of Phi-3's 131072 tokens; DeepSeek 3's is 1."""
    assert math.isclose(YaRN(32.0, 4096).attention_factor, 1.3465735902799727)
    assert math.isclose(longrope_magnitude(131072, 4096), 1.1902380714238083)
    assert longrope_magnitude(4096, 4096) == 1
    assert math.isclose(YaRN(40.0, 4096, attn_factor=1 / yarn_magnitude(40.0)).attention_factor, 1)
    assert math.isclose(yarn_magnitude(40.0, 0.707), 1.2608037774058553)


def test_longrope_chooses_by_the_context():
    short, long = (1.0, 1.5, 2.0, 3.0), (2.0, 4.0, 8.0, 16.0)
    for context, chosen in ((4096, short), (4097, long)):
        rope = RotaryEmbedding(8, scaling=LongRoPE(short, long, 4096, context, attn_factor=1.25))
        assert np.array_equal(rope.frequencies, RotaryEmbedding(8).frequencies / chosen)
        assert rope.attention_factor == 1.25


# ---------------------------------------------------------------------------------------------------- sections


@st.composite
def sectioned(draw):
    """An embedding with sections, and positions for it."""
    order, pairs = draw(st.sampled_from(["blocks", "interleaved", "vision"])), draw(st.integers(2, 16))
    sections = tuple(draw(st.lists(st.integers(1, pairs), min_size=1, max_size=4)))
    rope = RotaryEmbedding(
        2 * pairs, draw(st.sampled_from([20.0, 10000.0])), pairing=draw(st.sampled_from(["interleaved", "neox"])),
        scaling=draw(scalings), sections=sections, section_order=order,
    )  # fmt: skip
    tokens, rows = draw(st.integers(0, 5)), draw(st.integers(len(sections), 4))
    positions = st.lists(st.integers(0, 5000), min_size=rows * tokens, max_size=rows * tokens)
    return rope, np.array(draw(positions), np.int64).reshape(rows, tokens)


@settings(max_examples=50)
@given(case=sectioned(), start=st.integers(0, 5000))
def test_a_text_token_has_its_position_in_three_sections(case, start):
    rope, positions = case
    tokens = positions.shape[1]
    x = normal((tokens, 2, rope.rope_dims))
    own = np.arange(start, start + tokens)
    rows = np.stack([own, own, own, 0 * own])
    assert np.array_equal(qattn.rope(x, start, rope), qattn.rope(x, rows, rope))
    assert np.array_equal(qattn.rope(x, own, rope), qattn.rope(x, rows, rope))


@settings(max_examples=50)
@given(case=sectioned(), start=st.integers(0, 5000))
def test_sections_with_equal_positions_are_one(case, start):
    rope, _ = case
    assume(rope.section_order != "vision")
    plain = RotaryEmbedding(rope.rope_dims, rope.theta, pairing=rope.pairing, scaling=rope.scaling)
    x, positions = normal((3, 2, rope.rope_dims)), np.arange(start, start + 3)
    assert np.array_equal(qattn.rope(x, [positions] * 4, rope), qattn.rope(x, positions, plain))


@given(quarter=st.integers(1, 20), height=st.integers(0, 200), width=st.integers(0, 200))
def test_vision_rotates_halves_by_height_and_by_width(quarter, height, width):
    rope = RotaryEmbedding(4 * quarter, sections=(quarter, quarter), section_order="vision")
    x, half = normal((1, 2, 4 * quarter)), RotaryEmbedding(2 * quarter)
    halves = [qattn.rope(part, [at], half) for part, at in zip(np.split(x, 2, -1), (height, width), strict=True)]
    assert np.allclose(qattn.rope(x, [[height], [width]], rope), np.concatenate(halves, -1), atol=1e-6)


def test_pairs_take_turns_in_interleaved_sections():
    """Qwen 3 VL's 24, 20, 20 of 64 pairs: what is left over turns by the fourth position, as ggml has it."""
    rope = RotaryEmbedding(128, pairing="neox", sections=(24, 20, 20, 0), section_order="interleaved")
    x, turned = normal((1, 1, 128)), []
    for row in range(4):
        positions = np.zeros((4, 1), np.int64)
        positions[row] = 5
        same = qattn.rope(x, positions, rope) == x
        turned.append(np.flatnonzero(~same[0, 0, :64]).tolist())
    assert turned == [[*range(0, 60, 3), 60, 63], list(range(1, 60, 3)), list(range(2, 60, 3)), [61, 62]]


# ------------------------------------------------------------------------------------------- devices and errors


@pytest.mark.parametrize(
    ("arguments", "positions"),
    [
        ({"scaling": YaRN(8.0, 64), "pairing": "neox"}, [5, 900, 3]),
        ({"sections": (2, 1, 1), "section_order": "interleaved"}, [[1, 7, 500], [2, 8, 9], [3, 0, 4]]),
        ({"sections": (2, 2), "section_order": "vision"}, 70),
    ],
)
def test_a_gpu_gives_what_a_cpu_gives(cupy, arguments, positions):
    x, rope = normal((3, 2, 10)), RotaryEmbedding(8, **arguments)
    got, want = qattn.rope(cupy.asarray(x), positions, rope), qattn.rope(x, positions, rope)
    assert isinstance(got, cupy.ndarray) and nmse(got, want) < 1e-12


def test_it_tells_what_it_is():
    rope = RotaryEmbedding(8, scaling=YaRN(4.0, 64), sections=(2, 2, 0))
    text = (
        "RotaryEmbedding(8, theta=10000, pairing='interleaved', scaling=YaRN, sections=(2, 2), section_order='blocks')"
    )
    assert repr(rope) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope_dims": 7}, "rope_dims is 7; pairs need an even number from 2 to 65536"),
        ({"rope_dims": 8, "theta": 0.0}, "theta is 0.0; expected a positive number"),
        ({"rope_dims": 8, "scale": float("nan")}, "scale is nan"),
        ({"rope_dims": 8, "pairing": "normal"}, "pairing is 'normal'; expected one of 'interleaved', 'neox'"),
        ({"rope_dims": 8, "factors": [1.0, 2.0]}, r"factors has shape \(2,\); rope_dims 8 needs \(4,\)"),
        ({"rope_dims": 8, "factors": [1.0, 2.0, 0.0, 1.0]}, "factors must be finite, and not 0"),
        ({"rope_dims": 8, "sections": (1, -1)}, r"sections is \(1, -1\); expected up to 4 numbers of pairs"),
        ({"rope_dims": 8, "sections": (1,) * 5}, "expected up to 4 numbers of pairs"),
        ({"rope_dims": 8, "section_order": "mixed"}, "section_order is 'mixed'; expected one of 'blocks', "),
        ({"rope_dims": 8, "section_order": "vision", "sections": (0, 0)}, "'vision', and there are no sections"),
        ({"rope_dims": 8, "theta": 1.0, "scaling": YaRN(2.0, 64)}, "theta is 1.0; YaRN needs a theta above 1"),
        (
            {"rope_dims": 8, "scaling": LongRoPE((1.0,), (1.0,), 64, 65)},
            r"long has shape \(1,\); rope_dims 8 needs \(4,\)",
        ),
    ],
)
def test_wrong_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NTK(0.0), "alpha is 0.0; expected a positive number"),
        (lambda: DynamicNTK(float("inf"), 64, 65), "factor is inf"),
        (lambda: DynamicNTK(1.0, 0, 65), "original_context is 0; expected at least 1"),
        (lambda: YaRN(0.0, 64), "factor is 0.0"),
        (lambda: YaRN(1.0, 64, ext_factor=-1.0), "ext_factor is -1.0; expected 0 or a positive number"),
        (lambda: YaRN(1.0, 64, beta_slow=0.0), "beta_slow is 0.0"),
        (lambda: YaRN(1.0, 0), "original_context is 0"),
        (lambda: LongRoPE((1.0,), (1.0,), 64, 0), "context_length is 0; expected at least 1"),
    ],
)
def test_wrong_scalings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_positions_are_named():
    x, rope = normal((3, 2, 8)), RotaryEmbedding(8)
    with pytest.raises(ValueError, match=r"positions\[1\] is -4; a position is at least 0"):
        qattn.rope(x, [0, -4, 2], rope)
    with pytest.raises(ValueError, match=r"positions has shape \(2,\); expected \(3,\)"):
        qattn.rope(x, [0, 1], rope)
    with pytest.raises(ValueError, match=r"positions has shape \(1, 3\); expected \(3,\)"):
        qattn.rope(x, [[0, 1, 2]], rope)
    with pytest.raises(ValueError, match="expected integers"):
        qattn.rope(x, [0.5, 1.0, 2.0], rope)
    with pytest.raises(ValueError, match="x has heads of 8, shorter than the 16 that rotate"):
        qattn.rope(x, 0, RotaryEmbedding(16))
    rope = RotaryEmbedding(8, sections=(2, 1, 1))
    with pytest.raises(ValueError, match=r"positions\[1, 2\] is -1; a position is at least 0"):
        qattn.rope(x, [[0, 1, 2], [0, 1, -1], [0, 1, 2]], rope)
    for rows, expected in ((2, 3), (5, 4)):
        with pytest.raises(ValueError, match=rf"positions has shape \({rows}, 3\); expected \({expected}, 3\)"):
            qattn.rope(x, np.zeros((rows, 3), int), rope)


def test_a_position_far_out_takes_no_table_up_to_it():
    x, rope = normal((2, 1, 64)), qattn.RotaryEmbedding(64)
    got = qattn.rope(x, [2**24 - 1, 5], rope)
    want = qattn.rope(x[1:], [5], rope)
    assert np.array_equal(got[1:], want) and len(rope.table(0)[0]) < 1000
    angles = (2**24 - 1) * rope.frequencies
    pairs = x[0, 0].reshape(-1, 2).astype(np.float64)
    turned = np.stack([pairs[:, 0] * np.cos(angles) - pairs[:, 1] * np.sin(angles),
                       pairs[:, 0] * np.sin(angles) + pairs[:, 1] * np.cos(angles)], axis=1)  # fmt: skip
    assert np.abs(got[0, 0] - turned.ravel()).max() < 1e-6
