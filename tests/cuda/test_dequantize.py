"""Values on the GPU: every format, as blocks and packed, bit for bit as on the CPU."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qattn import PackedMatrix, QuantArray, formats
from qattn._backend import as_host
from qattn.cpu.pack import unpack_codes
from qattn.cuda.dequantize import WEIGHTS, dequantize, dequantize_rows, unpack
from qattn.layout import Layout, Packed
from tests.strategies import BLOCK_FORMATS, normal

NAMES = formats.names()
KINDS = ("float32", "float16", "uint16")  # uint16: bfloat16
# The kernels of float16 and bfloat16 differ in one instruction, those of rows and others in where they begin to read.
FEW = ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ3_S", "MXFP4", "BF16", "F16", "F32", "F64")
ALL_IN_TWO = [(name, kind) for name in NAMES for kind in KINDS if kind != "uint16" or name in FEW]
ALL_IN_ONE = [(name, kind) for name in NAMES for kind in KINDS if kind == "float16" or name in FEW]
some = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bytes(name, rows, blocks, seed=0):
    """Rows of random bytes: scales are subnormal, infinite and NaN as well."""
    shape = (rows, formats.get(name).bytes * blocks)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def reference(name, data):
    with np.errstate(over="ignore", invalid="ignore"):
        return formats.dequantize_reference(formats.get(name), data)


def rounded(values, kind):
    """float32 to the nearest of `kind`, ties to even."""
    if kind != "uint16":
        with np.errstate(over="ignore"):
            return values.astype(kind)
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def assert_same_bits(got, want):
    """The same bits, but for NaN, where only that it is one counts."""
    got = as_host(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    a, b = ((x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x for x in (got, want))
    same = (got.view(np.uint8) == want.view(np.uint8)).reshape(*got.shape, -1).all(-1)
    differ = ~(same | np.isnan(a) & np.isnan(b))
    assert not differ.any(), f"{differ.sum()} of {differ.size} differ, the first at {np.argwhere(differ)[0]}"


@pytest.mark.parametrize(("name", "kind"), ALL_IN_TWO)
def test_every_format_gives_the_bits_of_the_cpu(cupy, name, kind):
    data = random_bytes(name, 3, 7 * max(1, 512 // formats.get(name).block))
    want = rounded(reference(name, data), kind)
    out = cupy.empty(want.shape, kind)
    dequantize(cupy.asarray(data), formats.get(name), out)
    assert_same_bits(out, want)


@some
@given(
    name=st.sampled_from(["Q4_0", "MXFP4", "Q6_K", "IQ3_S", "BF16"]),
    blocks=st.integers(1, 40) | st.integers(250, 600),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
)
def test_any_number_of_blocks(cupy, name, blocks, kind, seed):
    data = random_bytes(name, 1, blocks, seed)
    want = rounded(reference(name, data), kind)
    out = cupy.empty(want.shape, kind)
    dequantize(cupy.asarray(data), formats.get(name), out)
    assert_same_bits(out, want)


def test_every_scale_of_one_byte(cupy):
    for name, size in (("MXFP4", 17), ("NVFP4", 36)):
        data = random_bytes(name, 256, 1)
        data[:, : size // 9] = np.arange(256)[:, None]
        out = cupy.empty((256, formats.get(name).block), np.float32)
        dequantize(cupy.asarray(data), formats.get(name), out)
        assert_same_bits(out, reference(name, data))


def test_every_f16_scale(cupy):
    data = random_bytes("Q4_0", 65536, 1)
    data[:, :2] = np.arange(65536, dtype="<u2")[:, None].view(np.uint8)
    out = cupy.empty((65536, 32), np.float32)
    dequantize(cupy.asarray(data), formats.get("Q4_0"), out)
    assert_same_bits(out, reference("Q4_0", data))


@pytest.mark.parametrize("name", FEW)
def test_rows_are_looked_up(cupy, name):
    """Rows begin at any byte: an odd number of blocks, which have as few as 17 bytes."""
    data = random_bytes(name, 20, 3)
    ids = np.array([19, 0, 7, 7, 3])
    want = reference(name, data)[ids]
    for dtype in (np.int64, np.int32):
        out = cupy.empty(want.shape, np.float32)
        dequantize_rows(cupy.asarray(data), cupy.asarray(ids, dtype), formats.get(name), out)
        assert_same_bits(out, want)


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4", "F16"])
def test_long_rows_are_looked_up_by_several_thread_blocks(cupy, name):
    data = random_bytes(name, 4, (2 * WEIGHTS + 96) // formats.get(name).block)
    out = cupy.empty((2, 2 * WEIGHTS + 96), np.float32)
    dequantize_rows(cupy.asarray(data), cupy.asarray(np.array([3, 1])), formats.get(name), out)
    assert_same_bits(out, reference(name, data)[[3, 1]])


def test_ids_are_read_when_a_graph_runs(cupy):
    data, ids = random_bytes("Q8_0", 9, 2), cupy.zeros(2, np.int64)
    out, on_device = cupy.empty((2, 64), np.float32), cupy.asarray(data)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the stream doesn't wait for what was done before
    with stream:
        dequantize_rows(on_device, ids, formats.get("Q8_0"), out)  # loads the kernel
        stream.begin_capture()
        dequantize_rows(on_device, ids, formats.get("Q8_0"), out)
        graph = stream.end_capture()
        ids[...] = cupy.asarray(np.array([8, 5]))
        graph.launch(stream)
    stream.synchronize()
    assert_same_bits(out, reference("Q8_0", data)[[8, 5]])


def on_device(cupy, packed):
    arrays = (cupy.asarray(np.ascontiguousarray(array)) for array in packed[:-1])
    return Packed(*arrays, packed.rows)


def unpacked(cupy, matrix, kind):
    out = cupy.zeros(matrix.shape, kind)
    for part in matrix.parts:
        unpack(on_device(cupy, part.packed), part.layout, out)
    return out


@pytest.mark.parametrize(("name", "kind"), ALL_IN_ONE)
def test_every_packed_format_gives_the_bits_of_the_cpu(cupy, name, kind):
    columns = 768 if name in BLOCK_FORMATS else 70
    data = random_bytes(name, 21, columns // formats.get(name).block)
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = PackedMatrix(QuantArray(data, name))
        want = np.asarray(matrix)
    assert_same_bits(unpacked(cupy, matrix, kind), rounded(want, kind))


@pytest.mark.parametrize("columns", [8, 13, 520, 1031])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_floats_of_any_width(cupy, columns, kind):
    matrix = PackedMatrix(normal((17, columns)).astype(np.float16))
    assert_same_bits(unpacked(cupy, matrix, kind), rounded(np.asarray(matrix), kind))


def test_rows_of_several_formats_go_where_they_came_from(cupy):
    names = (("Q4_K", 5), ("Q6_K", 20), ("Q4_K", 17), ("F32", 3))
    arrays = [QuantArray(random_bytes(name, rows, 256 // formats.get(name).block), name) for name, rows in names]
    matrix = PackedMatrix(np.concatenate(arrays))
    with np.errstate(invalid="ignore"):
        want = np.asarray(matrix)
    assert_same_bits(unpacked(cupy, matrix, "float16"), rounded(want, "float16"))


@pytest.mark.parametrize("table", [False, True])
def test_levels_may_be_signed_bytes(cupy, table):
    """Whether they are depends on the machine that packed them."""
    rng = np.random.default_rng(0)
    layout = Layout(bits=4 if table else 8, table=table, signed=True)
    codes, levels = rng.integers(0, 256, (1, 2, 64 * layout.bits), np.uint8), rng.integers(0, 256, 16, np.uint8)
    scales, targets = normal((1, 2, 16)).astype(np.float16), np.arange(16, dtype=np.int32)[::-1]
    none16, none8 = np.empty((1, 0, 16), np.uint16), np.empty((1, 0, 16), np.int8)
    packed = Packed(codes, scales.view(np.uint16), none8, none16, none8, np.tile(levels, 4), targets, 16)
    out = cupy.empty((16, 64), np.float32)
    unpack(on_device(cupy, packed), layout, out)
    stored = unpack_codes(packed, layout)
    want = (levels[stored] if table else stored).view(np.int8) * np.repeat(scales[0].T.astype(np.float32), 32, axis=1)
    assert_same_bits(out, want[::-1])
