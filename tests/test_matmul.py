"""Products with packed weights: every format against float64, at any shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import formats
from tests.reference import nmse
from tests.strategies import BLOCK_FORMATS, FLOAT_FORMATS, normal, random_weights, weights

INT8_NMSE = 5e-4  # what llama.cpp's own backend tests allow a product with int8 activations
EXACT_NMSE = 1e-11  # float32 sums of a few thousand products


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_format_multiplies(name):
    w = random_weights(name, 37, 512)
    x = normal((13, 512))
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    assert nmse(qattn.matmul(x, w), want) < INT8_NMSE
    assert nmse(qattn.matmul(x, w, precision="exact"), want) < EXACT_NMSE


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_float_weights_multiply_in_float32(name):
    w = random_weights(name, 37, 70)
    x = normal((13, 70))
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    assert nmse(qattn.matmul(x, w), want) < EXACT_NMSE


@settings(max_examples=60)
@given(
    w=weights(("Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "TQ1_0", "F32")),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_products_agree_with_float64_at_any_shape(w, tokens, seed):
    x = normal((tokens, w.shape[1]), seed)
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(np.asarray(w, np.float64)).T
    assert (np.abs(qattn.matmul(x, w, precision="exact") - want) <= 1e-6 * scale + 1e-30).all()
    assert (np.abs(qattn.matmul(x, w) - want) <= 0.02 * scale + 1e-30).all()


def with_outliers(x, seed=0):
    """The same with about two hundred times as much in one column, as real models have it, and in one place."""
    rng = np.random.default_rng(seed)
    x[:, rng.integers(x.shape[1])] *= 200
    x[rng.integers(len(x)), rng.integers(x.shape[1])] *= 200
    return x


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "NVFP4", "TQ2_0"])
def test_outliers_do_not_coarsen_what_lies_beside_them(name):
    """Columns beside the outlier are seen alone: rounded with its scale of 32, most of them would be 0."""
    x, w = normal((13, 512)), random_weights(name, 37, 512)
    x[:, 40] = 0
    want = qattn.matmul(x, w, precision="exact")
    x[:, 40] = 300
    got = qattn.matmul(x, w) - 300 * np.asarray(w)[:, 40]
    assert nmse(got, want) < INT8_NMSE


@settings(max_examples=30)
@given(w=weights(("Q4_0", "Q4_K", "Q5_1")), tokens=st.integers(1, 40), cut=st.integers(0, 40))
def test_a_row_does_not_depend_on_its_neighbours(w, tokens, cut):
    x = with_outliers(normal((tokens, w.shape[1])), cut)
    whole, cut = qattn.matmul(x, w, precision="int8"), min(cut, tokens)
    parts = np.concatenate([qattn.matmul(x[:cut], w, precision="int8"), qattn.matmul(x[cut:], w, precision="int8")])
    assert (whole.view(np.uint32) == parts.view(np.uint32)).all()


def test_threads_do_not_change_the_bits():
    w, x = random_weights("Q5_K", 100, 512), normal((33, 512))
    before = qattn.get_num_threads()
    want = qattn.matmul(x, w)
    try:
        qattn.set_num_threads(1)
        assert np.array_equal(qattn.matmul(x, w), want)
    finally:
        qattn.set_num_threads(before)


def test_stacked_formats_keep_the_order_of_rows():
    arrays = [random_weights(name, rows, 256) for name, rows in (("Q4_K", 5), ("Q6_K", 20), ("Q4_K", 17), ("F32", 3))]
    w, x = np.concatenate(arrays), normal((4, 256))
    want = np.concatenate([qattn.matmul(x, a) for a in arrays], axis=1)
    assert np.array_equal(qattn.matmul(x, w), want)
    assert np.array_equal(np.asarray(qattn.PackedMatrix(w)), np.asarray(w))


@settings(max_examples=80)
@given(w=weights())
def test_packing_loses_nothing(w):
    (planes,) = qattn.PackedMatrix(w).unpack()
    fmt = formats.get(w.format)
    want = fmt.split(w.data.reshape(-1, fmt.bytes))
    assert np.array_equal(planes.levels, want.levels.reshape(w.shape))
    assert np.array_equal(planes.scale, want.scale.reshape(len(w), -1), equal_nan=True)
    if want.offset is None:
        assert planes.offset is None
    else:
        assert np.array_equal(planes.offset, want.offset.reshape(len(w), -1), equal_nan=True)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_packed_weights_are_hardly_larger_than_the_file(name):
    w = random_weights(name, 128, 2048)
    limit = 1.15 if w.bits_per_weight >= 4 else 2.4
    assert qattn.PackedMatrix(w).nbytes <= limit * w.nbytes + 1024


def test_leading_axes_and_out():
    w, x = random_weights("Q8_0", 6, 64), normal((2, 3, 64))
    out = np.empty((2, 3, 6), np.float32)
    assert qattn.matmul(x, w, out=out) is out
    assert np.array_equal(out[1, 2], qattn.matmul(x[1, 2], w))
    assert np.array_equal(x @ w.T, out)
    assert qattn.matmul(x[:, :0], w).shape == (2, 0, 6)


def test_a_row_with_nan_or_infinity_gives_nan_and_spoils_no_other():
    w, x = random_weights("Q4_0", 20, 128), normal((3, 128))
    want = qattn.matmul(x, w)
    x[0, 5], x[2, 100] = np.nan, np.inf
    got = qattn.matmul(x, w)
    assert np.isnan(got[0]).all() and np.isnan(got[2]).all()
    assert np.array_equal(got[1], want[1])


def test_errors_name_what_came_and_what_was_needed():
    w = random_weights("Q4_K", 6, 4096)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4095\); weights \(6, 4096\) need \(\.\.\., 4096\)"):
        qattn.matmul(normal((2, 4095)), w)
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of 'fast', 'int8', 'exact'"):
        qattn.matmul(normal((2, 4096)), w, precision="int4")
    with pytest.raises(ValueError, match=r"out is float64 \(2, 6\); expected a C-contiguous float32 array of shape"):
        qattn.matmul(normal((2, 4096)), w, out=np.empty((2, 6)))
    with pytest.raises(ValueError, match="expected 1 to"):
        qattn.set_num_threads(0)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        qattn.PackedMatrix(np.ones(3, np.float32))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_layout_knows_the_largest_byte_of_its_codes(name):
    """Sums of products are kept short by it."""
    ((_, layout, packed),) = qattn.PackedMatrix(random_weights(name, 16, 256)).parts
    bytes_ = packed.table if layout.table else np.arange(1 << layout.bits)
    largest = np.abs(bytes_.astype(np.uint8).view(np.int8).astype(int)) if layout.signed else bytes_
    assert largest.max() <= layout.largest
