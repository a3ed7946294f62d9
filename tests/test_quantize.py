"""Quantizing: gguf's bits where gguf can do it, an error not above ggml's where it can't."""

import warnings

import gguf
import libgguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import qattn
from qattn import formats
from qattn.errors import FormatError
from tests.strategies import BLOCK_FORMATS, normal

BY_GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16", "F32"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WORKS = [*BY_GGUF, *K_QUANTS, "Q1_0", "Q2_0", "F64"]
BLOCKS = [name for name in WORKS if name in BLOCK_FORMATS]
F16_SCALES = [name for name in BLOCKS if name != "MXFP4"]
COLUMNS = 256  # whole blocks in every format
BAR = 1.05  # times the error of ggml's quantization
F16_STEP = 2.0**-11  # half a unit in the last place of a float16 scale, relative

RANDOM = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "shifted": lambda rng, shape: rng.standard_normal(shape) + 2,
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 20, 1),
}


def rms(error):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


def values(x, name):
    """What `x` becomes."""
    return np.asarray(qattn.quantize(x, name))


# Accuracy


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("name", BY_GGUF)
def test_bits_are_those_of_gguf(name, scale):
    x = normal((300, COLUMNS)) * np.float32(scale)
    want = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(qattn.quantize(x, name).data, want)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("name", K_QUANTS)
def test_error_of_k_quants_is_not_above_ggmls(name, kind):
    x = RANDOM[kind](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    type_ = gguf.GGMLQuantizationType[name]
    ggml = rms(libgguf.dequantize_rows(libgguf.quantize_rows(x, type_), type_) - x)
    assert rms(values(x, name) - x) <= BAR * ggml


@pytest.mark.parametrize("name", K_QUANTS)
def test_gguf_reads_k_quants_alike(name):
    w = qattn.quantize(normal((8, COLUMNS)), name)
    np.testing.assert_array_equal(gguf.quants.dequantize(w.data, gguf.GGMLQuantizationType[name]), np.asarray(w))


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_stay_as_accurate_where_ideal_scales_are_below_float16(name):
    x = normal((16, 1024))
    tiny = x * np.float32(1e-5)
    assert rms(values(tiny, name) - tiny) / 1e-5 < 1.2 * rms(values(x, name) - x)


def test_float64_is_kept():
    x = np.random.default_rng(0).standard_normal((3, 5)) * 1e-300
    np.testing.assert_array_equal(qattn.quantize(x, "F64").data.view(np.float64), x)


def test_q1_0_holds_signs_and_the_mean_magnitude():
    w = qattn.quantize(np.tile([3.0, -1.0], 64), "Q1_0")
    assert w.data.tobytes() == np.float16(2).tobytes() + b"\x55" * 16


def test_q2_0_finds_levels_that_are_there():
    w = qattn.quantize(np.tile([-0.5, 0.0, 0.5, 1.0], 16), "Q2_0")
    assert w.data.tobytes() == np.float16(0.5).tobytes() + b"\xe4" * 16  # codes 0 1 2 3, the first lowest
    flipped = qattn.quantize(np.tile([0.5, 0.0, -0.5, -1.0], 16), "Q2_0")
    assert flipped.data.tobytes() == np.float16(-0.5).tobytes() + b"\xe4" * 16


def test_q2_0_is_better_than_ternary():
    x = normal((16, COLUMNS))
    assert rms(values(x, "Q2_0") - x) < rms(values(x, "TQ2_0") - x) / 2


# Properties


@pytest.mark.parametrize("name", WORKS)
def test_zero_stays_zero(name):
    assert not values(np.zeros((2, COLUMNS)), name).any()
    x = normal((2, COLUMNS))
    x[1] = 0
    assert not values(x, name)[1].any()


@pytest.mark.parametrize("constant", [3.0, -3.0, 60000.0, 0.5])  # float16 scales are then normal numbers
@pytest.mark.parametrize("name", [name for name in WORKS if name != "MXFP4"])  # whose scales are powers of two
def test_constant_rows_are_kept(name, constant):
    x = np.full((2, COLUMNS), constant)
    if name == "BF16":
        np.testing.assert_allclose(values(x, name), x, rtol=2.0**-9)
    else:
        np.testing.assert_allclose(values(x, name), x, rtol=F16_STEP)


@pytest.mark.parametrize("name", BLOCKS)
@given(power=st.integers(0, 8), seed=st.integers(0, 2**32))
@settings(max_examples=10)
def test_power_of_two_passes_through(name, power, seed):
    x = 16 * normal((2, COLUMNS), seed)  # likewise
    np.testing.assert_array_equal(values(x * 2.0**power, name), values(x, name) * 2.0**power)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
@given(seed=st.integers(0, 2**32), power=st.integers(-4, 8))
@settings(max_examples=20)
def test_quantizing_again_does_not_get_worse(name, seed, power):
    once = values(normal((2, COLUMNS), seed) * 2.0**power, name)
    np.testing.assert_allclose(values(once, name), once, rtol=0, atol=2 * F16_STEP * np.abs(once).max())


@pytest.mark.parametrize("name", K_QUANTS)
def test_quantizing_again_loses_less_than_at_first(name):
    x = normal((16, 1024))
    once = values(x, name)
    assert rms(values(once, name) - once) < rms(once - x)


@pytest.mark.parametrize("name", WORKS)
def test_rows_do_not_depend_on_their_neighbours(name):
    x = normal((300, COLUMNS))
    whole = qattn.quantize(x, name).data
    for row in (0, 255, 256, 299):
        np.testing.assert_array_equal(qattn.quantize(x[row], name).data, whole[row])


@pytest.mark.parametrize("name", F16_SCALES)
@given(x=npst.arrays(np.float32, (2, COLUMNS), elements=st.floats(-60000, 60000, width=32)))
@settings(max_examples=15)
def test_any_numbers_give_numbers_of_their_size(name, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = values(x, name)
    peak = np.abs(x).max()
    assert got.shape == x.shape and np.isfinite(got).all()
    assert (np.abs(got - x) <= peak + 2.0**-24).all()


@pytest.mark.parametrize("name", WORKS)
def test_denormals_become_next_to_nothing_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(values(normal((2, COLUMNS)) * 1e-40, name)).max() < 1e-38


# What comes in


@pytest.mark.parametrize("shape", [(COLUMNS,), (0, COLUMNS), (3, 0), (2, 3, 2 * COLUMNS), (1, 1, 1, COLUMNS)])
@pytest.mark.parametrize("name", WORKS)
def test_shape_is_kept(name, shape):
    w = qattn.quantize(normal(shape), name)
    assert (w.shape, w.format) == (shape, name)
    assert w.nbytes == w.size // formats.get(name).block * formats.get(name).bytes


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q2_0", "F16"])
def test_any_array_of_numbers_counts_as_its_float32(name):
    x = np.random.default_rng(0).integers(-9, 9, (4, COLUMNS))
    want = qattn.quantize(x.astype(np.float32), name).data
    for same in (
        x,
        x.astype(np.float16),
        x.astype(np.float64),
        x.astype(">f4"),
        np.asfortranarray(x, np.float32),
        np.repeat(x, 2, axis=1)[:, ::2],
        x.tolist(),
        qattn.quantize(x, "F32"),
    ):
        np.testing.assert_array_equal(qattn.quantize(same, name).data, want)


@pytest.mark.parametrize("name", WORKS)
def test_input_is_left_alone(name):
    x = normal(formats.get(name).block)
    before = x.copy()
    w = qattn.quantize(x, name)
    np.testing.assert_array_equal(x, before)
    assert not np.shares_memory(w.data, x)


def test_every_format_is_written_or_refused_by_name():
    for name in formats.names():
        if name in WORKS:
            assert qattn.quantize(np.ones(COLUMNS), name).format == name
        else:
            with pytest.raises(NotImplementedError, match=f"can't quantize to {name}; these work: BF16, .* TQ2_0$"):
                qattn.quantize(np.ones(COLUMNS), name)


def test_error_names_the_unknown_format():
    with pytest.raises(FormatError, match="there is no format 'Q4_2'"):
        qattn.quantize(np.ones(COLUMNS), "Q4_2")


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        (100, "Q4_K", "x has 100 columns; Q4_K has blocks of 256: pad x to 256 columns"),
        (300, "Q4_K", "x has 300 columns; .* pad x to 512 columns"),
        (33, "Q8_0", "x has 33 columns; Q8_0 has blocks of 32: pad x to 64 columns"),
    ],
)
def test_error_names_the_columns_that_would_fit(columns, name, message):
    with pytest.raises(FormatError, match=message):
        qattn.quantize(np.ones((2, columns)), name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_K", "Q1_0", "F16", "F32", "F64"])
def test_error_names_the_place_of_what_is_not_finite(name, bad):
    x = normal((2, 300, COLUMNS))
    x[1, 250, 7] = bad
    with pytest.raises(ValueError, match=rf"x\[1, 250, 7\] is {bad}; expected finite numbers"):
        qattn.quantize(x, name)


@pytest.mark.parametrize("name", [*F16_SCALES, "F16"])
def test_error_names_the_place_of_what_is_too_large(name):
    x = normal((300, COLUMNS))
    x[299, 3] = -4e8
    with pytest.raises(ValueError, match=rf"x\[299, 3\] is -400000000.0; too large for {name}"):
        qattn.quantize(x, name)


@pytest.mark.parametrize("name", [name for name in WORKS if name != "F64"])
def test_float64_beyond_float32_is_too_large(name):
    x = np.ones(COLUMNS)
    x[3] = 1e300
    with pytest.raises(ValueError, match=rf"x\[3\] is 1e\+300; too large for {name}"):
        qattn.quantize(x, name)


def test_large_numbers_that_fit_are_taken():
    x = normal((2, COLUMNS)) * np.float32(1e6)
    for name in ("Q8_0", "Q4_K", "Q6_K", "MXFP4", "BF16", "F32"):
        assert rms(values(x, name) - x) < 0.15e6


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(COLUMNS, np.complex64), "x has dtype complex64; expected real numbers"),
        (np.array(["1"] * COLUMNS), "x has dtype str32; expected real numbers"),
        (1.0, r"x has shape \(\); expected \(..., columns\)"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        qattn.quantize(x, "Q4_0")
