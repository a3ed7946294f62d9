"""Every format gives the values that the gguf package gives, bit for bit; those it lacks are worked out by hand."""

import hashlib

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGML
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import QuantArray, formats
from qattn.backends import cpu
from qattn.errors import FormatError
from tests.strategies import BLOCK_FORMATS

NOT_IN_GGUF = ("Q1_0", "Q2_0", "F64")
IN_GGUF = tuple(name for name in formats.names() if name not in NOT_IN_GGUF)


def random_bytes(name, rows, blocks, seed=0):
    size = formats.get(name).bytes * blocks
    return np.random.default_rng(seed).integers(0, 256, (rows, size), np.uint8)


def assert_same_bits(got, want):
    """The same bits, but for NaN, where only that it is one counts."""
    assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
    differ = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    assert not differ.any(), f"{differ.sum()} differ, the first at {np.argwhere(differ)[0]}"


def by_gguf(data, name):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, GGML[name]).astype(np.float32)


@settings(max_examples=150)
@given(name=st.sampled_from(IN_GGUF), rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_random_bytes_dequantize_as_in_gguf(name, rows, blocks, seed):
    data = random_bytes(name, rows, blocks, seed)
    want = by_gguf(data, name)
    assert_same_bits(qattn.dequantize(QuantArray(data, name)), want)
    assert_same_bits(formats.dequantize_reference(formats.get(name), data), want)


@pytest.mark.parametrize("name", IN_GGUF)
def test_many_blocks_dequantize_as_in_gguf(name):
    """Enough for every index of a grid, for infinite scales and NaN, and for several threads."""
    data = random_bytes(name, 128, max(1, 2048 // formats.get(name).block))
    want = by_gguf(data, name)
    assert_same_bits(qattn.dequantize(QuantArray(data, name)), want)
    if formats.get(name).scale_type == "f16":
        assert np.isnan(want).any() and (formats.get(name).step or not np.isfinite(want).all())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_kernels_and_numpy_read_the_same_snippets(name):
    data = random_bytes(name, 3, 2, seed=1)
    assert_same_bits(qattn.dequantize(QuantArray(data, name)), formats.dequantize_reference(formats.get(name), data))


def test_q1_0_by_hand():
    # scale 0.5; bits of the first byte, lowest first: 1 0 1 1 0 0 0 0; the rest are 0
    block = np.array([0x00, 0x38, 0b00001101, *[0] * 15], np.uint8)
    want = np.full(128, -0.5, np.float32)
    want[[0, 2, 3]] = 0.5
    np.testing.assert_array_equal(qattn.dequantize(QuantArray(block, "Q1_0")), want)


def test_q1_0_as_in_libgguf():
    libgguf = pytest.importorskip("libgguf")
    x = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    data = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType.Q1_0).view(np.uint8)
    got = qattn.dequantize(QuantArray(data, "Q1_0"))
    assert (np.sign(got) == np.where(x < 0, -1, 1)).all()
    # one scale for 128 weights, and the one that suits them: their mean magnitude
    np.testing.assert_allclose(np.abs(got)[:, ::128], np.abs(x).reshape(4, 2, 128).mean(-1), rtol=1e-3)


def test_q2_0_by_hand():
    # scale 2; codes of the first byte, lowest bits first: 3 0 1 2, that is levels 2 -1 0 1; the rest have code 1
    block = np.array([0x00, 0x40, 0b10_01_00_11, *[0b01_01_01_01] * 15], np.uint8)
    want = np.zeros(64, np.float32)
    want[[0, 1, 3]] = 4, -2, 2
    np.testing.assert_array_equal(qattn.dequantize(QuantArray(block, "Q2_0")), want)


@settings(max_examples=60)
@given(name=st.sampled_from(formats.names()), ids=st.lists(st.integers(0, 4), max_size=6), seed=st.integers(0, 2**32))
def test_some_rows_have_the_values_that_they_have_among_all(name, ids, seed):
    weights = QuantArray(random_bytes(name, 5, 2, seed), name)
    out = np.full((len(ids), weights.shape[1]), 7, np.float32)
    with np.errstate(all="ignore"):
        cpu.take_rows(weights, np.array(ids, np.int64), out)
        assert_same_bits(out, np.asarray(weights)[np.array(ids, np.int64)])


def test_f64_is_rounded_to_float32():
    values = np.array([[1 / 3, 1e300, -0.0, np.nan]])
    got = qattn.dequantize(QuantArray(values.view(np.uint8), "F64"))
    np.testing.assert_array_equal(got, np.array([[1 / 3, np.inf, -0.0, np.nan]], np.float32))


@pytest.mark.parametrize("name", IN_GGUF)
def test_numbers_and_sizes_are_ggmls(name):
    fmt = formats.get(name)
    assert fmt.type_id == GGML[name]
    assert GGML_QUANT_SIZES[GGML[name]] == (fmt.block, fmt.bytes)
    assert formats.by_type(fmt.type_id) is fmt


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_codes_and_steps_stay_in_their_range(name):
    fmt = formats.get(name)
    b = random_bytes(name, 200, 1).astype(np.int64).T
    codes = np.stack([fmt.code(b, i) for i in range(fmt.block)])
    assert codes.min() >= 0 and codes.max() < (len(fmt.table) if fmt.table else 2**fmt.bits)
    for step in filter(None, (fmt.step, fmt.offset_step)):
        steps = np.stack([step(b, g) for g in range(fmt.block // fmt.group)])
        assert steps.min() >= -128 and steps.max() <= 127
    assert fmt.block % fmt.group == 0 and fmt.group % 16 == 0


def test_there_are_all_25_block_formats():
    assert len(BLOCK_FORMATS) == 25 and len(formats.names()) == 29


def test_dequantize_goes_into_out_and_takes_any_leading_axes():
    w = QuantArray(random_bytes("Q4_K", 6, 1).reshape(2, 3, -1), "Q4_K")
    out = np.empty((2, 3, 256), np.float32)
    assert qattn.dequantize(w, out=out) is out
    np.testing.assert_array_equal(out[1, 2], qattn.dequantize(w[1, 2]))
    assert qattn.dequantize(w[:0]).shape == (0, 3, 256)
    with pytest.raises(ValueError, match=r"out is float32 \(2, 3\); expected a C-contiguous float32 array of shape"):
        qattn.dequantize(w, out=np.empty((2, 3), np.float32))


def test_unknown_formats_are_named_beside_the_known_ones():
    with pytest.raises(FormatError, match=r"there is no format 'TQ9_0'; known: BF16, .*TQ2_0 \(qattn\.formats\.names"):
        formats.get("TQ9_0")
    with pytest.raises(FormatError, match="there is no format of type 99; known: BF16"):
        formats.by_type(99)


def test_a_name_or_number_is_given_once():
    from qattn.formats._registry import Format, register

    with pytest.raises(ValueError, match="two formats claim a name or number"):
        register(Format("Q4_0", type_id=99, block=32, bytes=18))
    assert 99 not in {formats.get(name).type_id for name in formats.names()}


ROWS = np.arange(64, dtype=np.uint8).reshape(8, 8)


def branches(b, i):
    return b[0] if i < 3 else b[1]


def reads_backwards(b, i):
    return ROWS[b[i >> 3] & 7, 7 - (i & 7)]


def reads_alone(b, i):
    return ROWS[b[i] & 7, i & 7]


def made(code):
    """A format that isn't registered, of 32 bytes and a scale.  Kernels are kept by name."""
    name = f"MADE_{hashlib.sha256(repr((code.__code__.co_code, code.__code__.co_consts)).encode()).hexdigest()[:12]}"
    return formats.Format(name, 99, 32, 34, group=32, bits=8, code=code, scale_bits=lambda b, g: b[32] | b[33] << 8)


LIST = ROWS.ravel()


def looks_up_each(b, i):
    return LIST[b[i] & 63]


def looks_up_few(b, i):
    few = (LIST[b[i >> 2] & 63] ^ b[8 + (i >> 3)]) + (2 * b[i >> 4] - b[i >> 3] & 7)
    return (few + (b[i] >> (i & 3)) - (b[i >> 3] & b[i])) & 127


@pytest.mark.parametrize("code", [looks_up_each, looks_up_few])
def test_snippets_may_mix_what_neighbours_share_with_what_they_do_not(code):
    from qattn.cpu.dequantize import dequantize

    format, blocks = made(code), np.random.default_rng(0).integers(0, 60, (5, 34), np.uint8)
    blocks[:, 32:] = 0, 0x3C  # a scale of 1
    got = np.empty((5, 32), np.float32)
    dequantize(blocks, format, got)
    assert np.array_equal(got, formats.dequantize_reference(format, blocks))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (branches, "a snippet branches between indices that are computed together"),
        (reads_backwards, "doesn't read the rows of a code book from their first element to the last"),
        (reads_alone, "doesn't read the rows of a code book from their first element to the last"),
    ],
)
def test_snippets_that_vectors_cannot_follow_are_refused(code, why):
    from qattn.cpu.dequantize import dequantize

    with pytest.raises(ValueError, match=why):
        dequantize(np.zeros((1, 34), np.uint8), made(code), np.empty(32, np.float32))
