"""QuantArray: what NumPy would do with the values, done with the quantized rows."""

import math
import pickle

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GGML
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qattn.array import QuantArray
from qattn.errors import FormatError

FORMATS = [
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q5_1",
    "Q8_0",
    "TQ2_0",
]  # with and without scales, offsets, super-blocks
INT8_ERROR = 0.02  # products round x to int8; relative to that of the magnitudes
COLUMNS = 256  # whole blocks in every format


def quantized(shape, name="Q4_0", seed=0):
    """Normally distributed weights in a format."""
    *leading, columns = shape if isinstance(shape, tuple) else (shape,)
    rows = math.prod(leading)
    values = np.random.default_rng(seed).standard_normal((max(rows, 1), columns), np.float32)
    data = gguf.quantize(values, GGML[name]).view(np.uint8)
    return QuantArray(data[:rows].reshape(*leading, data.shape[-1]), name)


formats_ = st.sampled_from(FORMATS)


@st.composite
def single(draw, min_dims=1, max_dims=3):
    leading = draw(st.lists(st.integers(0, 5), min_size=min_dims - 1, max_size=max_dims - 1))
    return quantized((*leading, COLUMNS), draw(formats_), draw(st.integers(0, 99)))


@st.composite
def stacked(draw, min_parts=1):
    parts = draw(st.lists(single(2, 2), min_size=min_parts, max_size=4))
    return QuantArray.stack(parts)


def same_values(array, expected):
    assert isinstance(array, QuantArray)
    assert array.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(array), expected)


# Indexing


@given(w=single(2), data=st.data())
def test_indexing_commutes_with_dequantizing(w, data):
    key = data.draw(npst.basic_indices(w.shape[:-1], allow_newaxis=False))
    key = (*(key if isinstance(key, tuple) else (key,)), slice(None))  # an ellipsis stops before the columns
    same_values(w[key], np.asarray(w)[key])


def row_choices(rows):
    """Indices of every kind for an axis: integers, slices, lists, integer and boolean arrays."""
    kinds = [
        st.slices(rows),
        npst.arrays(np.bool_, rows),
        st.lists(st.booleans(), min_size=rows, max_size=rows),
    ]
    if rows:
        integers = st.integers(-rows, rows - 1)
        kinds += [integers, integers.map(np.int64), st.lists(integers, max_size=8)]
        kinds += [npst.arrays(np.intp, st.integers(0, 8), elements=integers)]
    return st.one_of(kinds)


@given(w=st.one_of(stacked(), single(2)), data=st.data())
def test_choosing_rows_commutes_with_dequantizing(w, data):
    key = data.draw(row_choices(len(w)))
    same_values(w[key], np.asarray(w)[key])


@pytest.mark.parametrize(
    "key",
    [
        np.array([[0, 1], [2, 0]]),
        ([0, 1], [1, 1]),
        (slice(None), [0, 1]),
        (..., 1, slice(None)),
        np.eye(3, 2) > 0,
    ],
)
def test_several_axes_are_indexed_like_those_of_values(key):
    w = quantized((3, 2, COLUMNS))
    same_values(w[key], np.asarray(w)[key])


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((4, COLUMNS), (slice(2, 5), 3)),
        ((4, COLUMNS), (0, slice(1, 2))),
        ((4, COLUMNS), (..., 0)),
        ((4, COLUMNS), np.zeros((4, COLUMNS), bool)),
        ((4, COLUMNS), (0, 0, 0)),
        ((COLUMNS,), 5),
        ((COLUMNS,), slice(0, 32)),
    ],
)
def test_columns_are_not_indexed_without_dequantizing(shape, key):
    with pytest.raises(IndexError, match=r"reaches into the quantized last axis .*np\.asarray\(w\)"):
        quantized(shape)[key]


@pytest.mark.parametrize("key", [None, True, np.False_, (0, None), (..., None)])
def test_index_that_adds_an_axis_is_refused(key):
    with pytest.raises(IndexError, match=r"would add an axis to quantized rows; dequantize first"):
        quantized((4, COLUMNS))[key]


def test_index_out_of_range_is_numpys_error():
    w = quantized((4, COLUMNS))
    for array in (w, np.concatenate([w, w])):
        with pytest.raises(IndexError, match="out of bounds"):
            array[len(array)]
        with pytest.raises(IndexError, match="boolean"):
            array[np.ones(3, bool)]
        with pytest.raises(IndexError):
            array[0.5]


def test_stacked_array_refuses_what_would_shuffle_its_parts():
    w = np.concatenate([quantized((2, 3, COLUMNS)), quantized((2, 3, COLUMNS), "Q8_0")])
    same_values(w[3][1], np.asarray(w)[3, 1])
    with pytest.raises(IndexError, match=r"w\[i\]\[j\] instead of w\[i, j\]"):
        w[3, 1]
    with pytest.raises(IndexError, match=r"1-D index; got one of shape \(2, 2\)"):
        w[np.zeros((2, 2), int)]


def test_slices_are_views():
    w = quantized((6, COLUMNS))
    assert np.shares_memory(w[2:5].data, w.data)
    assert np.shares_memory(w[5].data, w.data)
    assert np.shares_memory(w[::-2].data, w.data)
    stack = np.concatenate([w, quantized((3, COLUMNS), "Q8_0")])
    for part in stack[8:1:-1].parts[1:]:
        assert np.shares_memory(part.data, w.data)


def test_whole_array_is_itself():
    w = quantized((4, COLUMNS))
    assert w[...] is w and w[:] is w and w[()] is w and w[:, :] is w


def test_rows_are_iterated():
    w = quantized((3, COLUMNS))
    assert len(w) == 3
    for row, values in zip(w, np.asarray(w), strict=True):
        same_values(row, values)
    with pytest.raises(IndexError, match="has no single weights; dequantize first"):
        iter(w[0])


# Stacking


@given(arrays=st.lists(single(2, 2), min_size=1, max_size=4))
def test_concatenating_commutes_with_dequantizing(arrays):
    w = np.concatenate(arrays)
    same_values(w, np.concatenate([np.asarray(array) for array in arrays]))
    assert w.nbytes == sum(array.nbytes for array in arrays)
    assert {part.format for part in w.parts} <= {array.format for array in arrays}


def test_concatenated_rows_are_not_copied():
    q, k = quantized((4, COLUMNS)), quantized((2, COLUMNS), "Q8_0")
    w = np.concatenate([q, k], axis=0)
    assert w.format == "mixed" and [part.format for part in w.parts] == ["Q4_0", "Q8_0"]
    assert np.shares_memory(w.parts[0].data, q.data)
    assert np.concatenate([q, q]).format == "Q4_0"
    with pytest.raises(ValueError, match="stacked of 2 parts, so there is no single data"):
        w.data  # noqa: B018


def test_parts_of_a_stack_are_never_stacks():
    w = np.concatenate([np.concatenate([quantized((1, COLUMNS))] * 2), quantized((3, COLUMNS), "Q8_0")])
    assert [len(part) for part in w.parts] == [1, 1, 3]
    assert all(part.parts == (part,) for part in w.parts)


@pytest.mark.parametrize(("dtype", "name"), [("f2", "F16"), ("f4", "F32"), ("f8", "F64"), ("i4", "F32")])
def test_float_rows_join_exactly(dtype, name):
    rows = np.arange(2 * COLUMNS).reshape(2, COLUMNS).astype(dtype)
    w = np.concatenate([quantized((4, COLUMNS)), rows])
    assert w.parts[1].format == name
    np.testing.assert_array_equal(np.asarray(w)[4:], rows)


def test_vstack_makes_rows_of_vectors():
    row, rows = quantized(COLUMNS), quantized((2, COLUMNS), "Q8_0")
    same_values(np.vstack([row, rows]), np.vstack([np.asarray(row), np.asarray(rows)]))


def test_concatenating_vectors_or_columns_gives_values():
    v, w = quantized(COLUMNS), quantized((2, COLUMNS))
    np.testing.assert_array_equal(np.concatenate([v, v]), np.tile(np.asarray(v), 2))
    np.testing.assert_array_equal(np.concatenate([w, w], axis=1), np.tile(np.asarray(w), (1, 2)))
    np.testing.assert_array_equal(np.concatenate([w, v], axis=None), np.r_[np.asarray(w).ravel(), np.asarray(v)])


def test_rows_of_different_lengths_are_not_stacked():
    message = r"can't stack rows of shapes \(2, 256\), \(2, 32\); only the first axis may differ"
    with pytest.raises(ValueError, match=message):
        np.concatenate([quantized((2, 256)), quantized((2, 32))])


# Products


@given(w=st.one_of(stacked(), single(2, 2)), leading=st.lists(st.integers(0, 3), max_size=2))
def test_product_is_that_of_values(w, leading):
    x = np.random.default_rng(1).standard_normal((*leading, COLUMNS), np.float32)
    values = np.asarray(w, np.float64)
    expected, scale = x.astype(np.float64) @ values.T, np.abs(x).astype(np.float64) @ np.abs(values).T
    for product in (x @ w.T, np.matmul(x, w.T), np.dot(x, w.T)):
        assert product.shape == expected.shape and (np.abs(product - expected) <= INT8_ERROR * scale).all()
    if len(leading) < 2:
        assert (np.abs(w @ x.T - expected.T) <= INT8_ERROR * scale.T).all()


def test_product_goes_into_out():
    w, x = quantized((4, COLUMNS)), np.ones((2, COLUMNS), np.float32)
    out = np.empty((2, 4), np.float32)
    assert np.matmul(x, w.T, out=out) is out
    np.testing.assert_array_equal(out, x @ w.T)
    np.testing.assert_array_equal(np.dot(x, w.T, np.empty_like(out)), out)
    with pytest.raises(ValueError, match=r"out has shape \(4, 2\); expected \(2, 4\)"):
        np.matmul(x, w.T, out=out.T)
    with pytest.raises(TypeError, match="Cannot cast"):
        np.matmul(x, w.T, out=out.astype(int))


def test_product_takes_integers_lists_and_quantized_factors():
    w = quantized((4, COLUMNS))
    ones = np.ones(COLUMNS, np.float32) @ w.T
    np.testing.assert_array_equal(np.ones(COLUMNS, int) @ w.T, ones)
    np.testing.assert_array_equal([1.0] * COLUMNS @ w.T, ones)
    assert np.array_equal(w[:2] @ w.T, np.asarray(w[:2]) @ w.T)


def test_other_products_are_those_of_values():
    w, x = quantized((4, COLUMNS)), np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(x @ w, x @ np.asarray(w))
    np.testing.assert_array_equal(w.T @ x.T, np.asarray(w).T @ x.T)
    experts = quantized((3, 4, COLUMNS))
    np.testing.assert_array_equal(x @ experts, x @ np.asarray(experts))
    np.testing.assert_array_equal(w @ experts[0].T, np.asarray(w) @ experts[0].T)
    with pytest.raises(ValueError, match="matmul"):
        1.0 @ w.T
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\); weights \(4, 256\) need"):
        x @ w.T


class OnlyDLPack:
    """An array that NumPy knows nothing of, like a torch tensor's DLPack side."""

    def __init__(self, array, device=(1, 0)):
        self._array, self._device = array, device

    def __dlpack__(self, **keywords):
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._device


def test_dlpack_array_is_multiplied():
    w, x = quantized((4, COLUMNS)), np.ones((2, COLUMNS), np.float32)
    np.testing.assert_array_equal(OnlyDLPack(x) @ w.T, x @ w.T)
    np.testing.assert_array_equal(np.matmul(OnlyDLPack(x), w.T), x @ w.T)
    np.testing.assert_array_equal(w @ OnlyDLPack(x[0]), w @ x[0])


def test_transpose_knows_its_shape_and_values():
    w = quantized((4, COLUMNS))
    assert w.T.shape == (COLUMNS, 4) and len(w.T) == COLUMNS and w.T.T is w
    assert np.transpose(w).T is w and w[0].T.shape == (COLUMNS,)
    np.testing.assert_array_equal(np.asarray(w.T), np.asarray(w).T)
    np.testing.assert_array_equal(w.T + 1, np.asarray(w).T + 1)
    assert repr(w.T) == repr(w) + ".T"
    with pytest.raises(ValueError, match=r"no transpose of shape \(2, 4, 256\); .* w\[0\].T"):
        quantized((2, 4, COLUMNS)).T  # noqa: B018


# Values


def test_float32_rows_are_viewed_without_a_copy():
    w = quantized((4, COLUMNS), "F32")
    values = np.asarray(w)
    assert np.shares_memory(values, w.data) and not values.flags.writeable
    assert not np.shares_memory(np.array(w, copy=True), w.data)
    assert np.array(w, copy=True).flags.writeable
    unaligned = np.empty(w.nbytes + 1, np.uint8)[1:].reshape(w.data.shape)
    unaligned[:] = w.data
    np.testing.assert_array_equal(np.asarray(QuantArray(unaligned, "F32")), values)


def test_dequantizing_makes_a_new_array_or_says_that_it_would():
    w = quantized((4, COLUMNS))
    values = np.asarray(w)
    values[:] = 0
    assert np.asarray(w).any()
    assert np.asarray(w, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="Q4_0 to float32 needs a copy"):
        w.__array__(copy=False)
    with pytest.raises(ValueError, match="F32 to float16 needs a copy"):
        quantized((4, COLUMNS), "F32").__array__(np.float16, copy=False)


def test_comparison_is_elementwise():
    w = quantized((4, COLUMNS))
    assert (w == w).all() and (w == np.asarray(w)).all()
    assert (w == quantized((4, COLUMNS), "Q8_0")).shape == (4, COLUMNS)
    assert not (w != w).any()
    np.testing.assert_array_equal(w > 0, np.asarray(w) > 0)
    with pytest.raises(TypeError, match="unhashable"):
        hash(w)


def test_numpy_functions_work_on_values():
    w = quantized((4, COLUMNS))
    values = np.asarray(w)
    assert np.mean(w) == values.mean()
    assert np.linalg.norm(w) == np.linalg.norm(values)
    assert np.allclose(w, values) and np.array_equal(w, values)
    assert np.shape(w) == (4, COLUMNS) and np.ndim(w) == 2
    np.testing.assert_array_equal(np.add.reduce(w, axis=0), values.sum(0))
    np.testing.assert_array_equal(np.hstack([w, w]), np.hstack([values, values]))
    np.testing.assert_array_equal(2 * w - values, values)
    np.testing.assert_array_equal(np.vstack([w, w], dtype=np.float64), np.vstack([values, values]))
    np.testing.assert_array_equal(np.transpose(quantized((2, 1, 32)), (2, 1, 0)).shape, (32, 1, 2))


def test_nothing_writes_into_quantized_rows():
    w = quantized((4, COLUMNS))
    with pytest.raises(TypeError, match="item assignment"):
        w[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        w += 1
    with pytest.raises(ValueError, match="read-only"):
        np.copyto(w, 0)
    with pytest.raises(ValueError, match="read-only"):
        w.data[0] = 0


# What it is


def test_bytes_and_bits_are_those_of_the_format():
    w = quantized((4, COLUMNS))
    assert (w.ndim, w.size, w.nbytes, w.bits_per_weight) == (2, 4 * COLUMNS, 4 * COLUMNS // 32 * 18, 4.5)
    assert w.dtype == np.float32
    assert quantized((0, COLUMNS)).bits_per_weight == 4.5
    mixed = np.concatenate([w, quantized((4, COLUMNS), "Q8_0")])
    assert mixed.bits_per_weight == (4.5 + 8.5) / 2


def test_repr_is_one_short_line():
    bytes_of = QuantArray(np.zeros((4096, 14336 // 32 * 18), np.uint8), "Q4_0")
    assert repr(bytes_of) == "QuantArray(shape=(4096, 14336), format='Q4_0', 4.50 bits/weight, 33.0 MB)"
    assert repr(quantized(COLUMNS, "F16")).endswith("16.00 bits/weight, 512 B)")
    mixed = np.concatenate([quantized((4, COLUMNS)), quantized((4, COLUMNS), "Q8_0"), quantized((4, COLUMNS))])
    expected = "QuantArray(shape=(12, 256), format='mixed' (Q4_0, Q8_0), 5.83 bits/weight, 2.2 kB)"
    assert repr(mixed) == expected


@given(w=st.one_of(stacked(), single()))
def test_pickling_keeps_bytes_and_formats(w):
    copy = pickle.loads(pickle.dumps(w))
    assert copy.shape == w.shape
    for mine, yours in zip(w.parts, copy.parts, strict=True):
        assert mine.format == yours.format
        np.testing.assert_array_equal(mine.data, yours.data)


def test_pickle_of_a_slice_holds_the_slice_alone():
    w = quantized((1000, COLUMNS))
    assert len(pickle.dumps(w[:2])) < w[:2].nbytes + 500


def test_data_is_viewed_unless_the_bytes_of_a_row_lie_apart():
    data = np.zeros((4, 18), np.uint8)
    assert np.shares_memory(QuantArray(data, "Q4_0").data, data)
    assert QuantArray(np.zeros((18, 4), np.uint8).T, "Q4_0").data.strides[-1] == 1
    assert data.flags.writeable


@pytest.mark.parametrize(
    ("data", "name", "error", "message"),
    [
        (np.zeros((2, 18), np.int8), "Q4_0", ValueError, r"data is int8 \(2, 18\); expected uint8"),
        (np.uint8(3), "Q4_0", ValueError, r"data is uint8 \(\); expected uint8 \(..., row_bytes\)"),
        (np.zeros((2, 17), np.uint8), "Q4_0", FormatError, "rows of 17 bytes; Q4_0 has blocks of 18"),
        (np.zeros((2, 17), np.uint8), "Q4_2", FormatError, "Q4_2"),
    ],
)
def test_data_that_is_no_rows_of_the_format_is_refused(data, name, error, message):
    with pytest.raises(error, match=message):
        QuantArray(data, name)
