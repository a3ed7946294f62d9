"""Products with packed weights on a GPU: every format and path against float64, and against the CPU."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qattn
from qattn import ops
from qattn.cpu import activations as cpu_activations
from qattn.cpu.target import TARGET
from qattn.layout import CELL, Packed
from tests.cuda.machine_code import assemble, tool
from tests.reference import nmse
from tests.strategies import BLOCK_FORMATS, FLOAT_FORMATS, normal, random_weights, weights

pytest.importorskip("numba_cuda", reason="kernels for GPUs are compiled by numba-cuda")

INT8_NMSE = 5e-4  # what llama.cpp's own backend tests allow a product with int8 activations
EXACT_NMSE = 1e-11  # float32 sums of a few thousand products
AGREEMENT = 1e-12  # the same integers, and float32 sums in another order
COMMON = ("Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "NVFP4", "Q8_0")


def on_device(cupy, packed):
    return Packed(*(cupy.asarray(field) if isinstance(field, np.ndarray) else field for field in packed))


def multiply(cupy, x, w, exact=False, path=None):
    """x @ w.T by the kernels for GPUs, part by part; `path` is that of quantized weights, instead of the usual one."""
    from qattn.cuda import matmul
    from qattn.cuda.activations import Activations, quantize

    matrix, x = qattn.PackedMatrix(w), cupy.asarray(x)
    out = cupy.asarray(np.full((len(x), len(w)), 7, np.float32))
    for part in matrix.parts:
        layout, given = part.layout, x
        if not exact and layout.bits < 16:
            given = Activations.room(len(x), x.shape[1], layout.group)
            quantize(layout.zero, layout.group)(x, given)
        if path is None or given is x:
            matmul.product(layout, exact)(on_device(cupy, part.packed), given, out)
        else:
            getattr(matmul, path)(layout, on_device(cupy, part.packed), given, out)
    return cupy.asnumpy(out)


def reference(x, w):
    return x.astype(np.float64) @ np.asarray(w, np.float64).T


def same_bits(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_format_multiplies(cupy, name):
    """One token, few and many; rows that fill no tile, and more than one block of threads; both paths."""
    w, x = random_weights(name, 150 if name in COMMON else 37, 512), normal((17, 512))
    want, cpu = reference(x, w), qattn.matmul(x, w, precision="int8")
    few = [(3, "decode")] if name in COMMON else []
    for tokens, path in ((1, "decode"), *few, (17, "decode"), (17, "prefill")):
        got = multiply(cupy, x[:tokens], w, path=path)
        assert nmse(got, want[:tokens]) < INT8_NMSE
        assert nmse(got, cpu[:tokens]) < AGREEMENT


@pytest.mark.parametrize("name", COMMON)
def test_many_tokens(cupy, name):
    w, x = random_weights(name, 131, 256), normal((70, 256))
    for tokens in (40, 70):
        got = multiply(cupy, x[:tokens], w)
        assert nmse(got, reference(x[:tokens], w)) < INT8_NMSE
        assert nmse(got, qattn.matmul(x[:tokens], w, precision="int8")) < AGREEMENT


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_exact_products_round_nothing(cupy, name):
    w, x = random_weights(name, 21, 256), normal((3, 256))
    assert nmse(multiply(cupy, x, w, exact=True), reference(x, w)) < EXACT_NMSE


@pytest.mark.parametrize("name", FLOAT_FORMATS)
@pytest.mark.parametrize("shape", [(1, 37, 70), (17, 70, 129)])
def test_float_weights_multiply_in_float32(cupy, name, shape):
    tokens, rows, columns = shape
    w, x = random_weights(name, rows, columns), normal((tokens, columns))
    assert nmse(multiply(cupy, x, w), reference(x, w)) < EXACT_NMSE


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(w=weights(("Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "F32")), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_products_agree_with_float64_at_any_shape(cupy, w, tokens, seed):
    x = normal((tokens, w.shape[1]), seed)
    want = reference(x, w)
    scale = np.abs(x).astype(np.float64) @ np.abs(np.asarray(w, np.float64)).T
    assert (np.abs(multiply(cupy, x, w) - want) <= 0.02 * scale + 1e-30).all()
    assert (np.abs(multiply(cupy, x, w, exact=True) - want) <= 1e-6 * scale + 1e-30).all()


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_stacked_formats_go_where_their_rows_belong(cupy, tokens):
    arrays = [random_weights(name, rows, 256) for name, rows in (("Q4_K", 5), ("Q6_K", 20), ("Q4_K", 17), ("F32", 3))]
    x = normal((tokens, 256))
    want = np.concatenate([multiply(cupy, x, a) for a in arrays], axis=1)
    assert same_bits(multiply(cupy, x, np.concatenate(arrays)), want)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize(("tokens", "path"), [(1, "decode"), (13, "decode"), (20, "decode"), (20, "prefill")])
def test_outliers_do_not_coarsen_what_lies_beside_them(cupy, name, tokens, path):
    x, w = normal((tokens, 512)), random_weights(name, 37, 512)
    x[:, 40] = 0
    want = multiply(cupy, x, w, exact=True)
    x[::2, 40] = 300
    got = multiply(cupy, x, w, path=path)
    assert nmse(got, qattn.matmul(x, w, precision="int8")) < AGREEMENT
    assert nmse(got - x[:, 40:41] * np.asarray(w)[:, 40], want) < INT8_NMSE


@pytest.mark.parametrize(("tokens", "path"), [(3, "decode"), (20, "decode"), (20, "prefill")])
def test_a_row_with_nan_or_infinity_gives_nan_and_spoils_no_other(cupy, tokens, path):
    w, x = random_weights("Q4_0", 20, 128), normal((tokens, 128))
    want = multiply(cupy, x, w, path=path)
    x[0, 5], x[2, 100] = np.nan, np.inf
    for exact in (False, True):
        got = multiply(cupy, x, w, exact, path=path)
        assert np.isnan(got[0]).all() and not np.isfinite(got[2]).any()
    got = multiply(cupy, x, w, path=path)
    assert np.isnan(got[2]).all()
    assert same_bits(got[[1, *range(3, tokens)]], want[[1, *range(3, tokens)]])


@pytest.mark.parametrize(
    ("name", "tokens", "precision"),
    [("Q8_0", 1, "int8"), ("Q6_K", 19, "int8"), ("Q4_K", 70, "fast"), ("Q8_0", 5, "exact"), ("F16", 3, "int8")],
)
def test_matrices_of_heads_are_multiplied_at_once(cupy, name, tokens, precision):
    """In two launches at most, with the bits of one product for each head; activations have outliers."""
    from qattn.cuda.kernel import Kernel

    heads, rows, columns = 3, 48, 256
    w, x = random_weights(name, heads * rows, columns), normal((tokens, heads, columns))
    x[0, 1, 7] *= 40
    x[-1, 2, 9] *= 40
    there = qattn.PackedMatrix(w).to("cuda:0")
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as launches:
        got = cupy.asnumpy(ops.affine_each(cupy.asarray(x), there, precision=precision))
    assert launches.call_count <= 2
    for head in range(heads):
        part = w[head * rows : (head + 1) * rows]
        alone = qattn.matmul(cupy.asarray(x[:, head]), part.to("cuda:0"), precision=precision)
        assert same_bits(got[:, head], cupy.asnumpy(alone))
        assert nmse(got[:, head], reference(x[:, head], part)) < INT8_NMSE


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q3_K"])
@pytest.mark.parametrize("cut", [(0, 1), (0, 7), (5, 16), (20, 37), (3, 40)])
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_a_token_does_not_depend_on_its_neighbours(cupy, name, cut, path):
    """Within a path.  Outliers of one make no difference to others."""
    w, x = random_weights(name, 40, 768), normal((40, 768))
    x[::3, 40] *= 200
    x[7, 300] = 500
    first, end = cut
    if path == "prefill" and end - first <= 16:
        return  # there is no room for whole tiles
    whole = multiply(cupy, x, w, path=path)
    assert same_bits(multiply(cupy, x[first:end], w, path=path), whole[first:end])


@pytest.mark.parametrize(("name", "columns"), [("Q4_0", 3232), ("Q4_K", 4096), ("Q6_K", 2048)])
def test_few_rows_of_many_columns_are_shared_by_blocks(cupy, name, columns):
    """With the same bits for any number of tokens."""
    from qattn.cuda.kernel import Kernel
    from qattn.cuda.matmul import decode_parts, decode_warps

    w, x = random_weights(name, 70, columns), normal((18, columns))
    x[1::4, 40] *= 300
    layout = qattn.PackedMatrix(w).layouts[0]
    assert decode_parts(columns // CELL, 3, decode_warps(layout, 3)) == 2
    whole = multiply(cupy, x, w, path="decode")
    assert nmse(whole, qattn.matmul(x, w, precision="int8")) < AGREEMENT
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as launches:
        assert same_bits(multiply(cupy, x[4:5], w), whole[4:5])
    assert launches.call_args_list[-1].args[0].name == "matmul_add_parts"
    assert same_bits(multiply(cupy, x[3:9], w), whole[3:9])


def test_blocks_share_the_cells_of_each_head(cupy):
    heads, rows, columns = 2, 32, 3232
    w, x = random_weights("Q4_0", heads * rows, columns), normal((5, heads, columns))
    got = ops.affine_each(cupy.asarray(x), qattn.PackedMatrix(w).to("cuda:0"), precision="int8")
    for head in range(heads):
        want = qattn.matmul(x[:, head], w[head * rows : (head + 1) * rows], precision="int8")
        assert nmse(cupy.asnumpy(got)[:, head], want) < AGREEMENT


def test_blocks_share_cells_where_there_are_few_rows_and_enough_cells():
    from qattn.cuda.matmul import decode_parts

    assert decode_parts(128, 192, 12) == 1  # a GPU is busy
    assert decode_parts(18, 18, 12) == 1  # as fast as a launch
    assert decode_parts(224, 18, 12) == 4  # DeepSeek 3's compressed keys: 576 rows of 7168
    assert decode_parts(4096, 1, 8) == 128


@pytest.mark.parametrize("zero", [0, 8])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("shape", [(1, 32), (13, 96), (18, 4128)])
def test_rounding_is_that_of_the_cpu(cupy, zero, group, shape):
    from qattn.cuda.activations import Activations, quantize

    x = normal(shape)
    x[0, 1], x[-1, -3] = 300, -900
    got, want = Activations.room(*shape, group), cpu_activations.Activations.room(*shape, group)
    quantize(zero, group)(cupy.asarray(x), got)
    cpu_activations.quantize(zero, group)(x, want, parts=1)
    levels, scales, starts, sums, seconds = map(cupy.asnumpy, got)
    if group == 16:
        levels = levels.reshape(*levels.shape[:-1], 8, 4)[..., [0, 2, 4, 6, 1, 3, 5, 7], :].reshape(levels.shape)
    for token, cell, second, theirs in cells_of_cpu(want, *shape, group):
        there = second, token // 8, cell
        assert scales[there][token % 8] == theirs["scale"]
        assert np.array_equal(starts[there][:, token % 8], theirs["starts"])
        assert np.array_equal(sums[there][:, token % 8], theirs["sums"])
        if theirs["scale"]:
            assert np.array_equal(levels[there][token % 8], theirs["levels"])
        assert seconds[token // 8, cell, token % 8] or not (second and theirs["scale"])


def cells_of_cpu(a, rows, columns, group):
    """Each slot of the CPU's activations: token, cell, whether it is a remainder, and what it holds."""
    parts = CELL // group
    for block in range(-(-rows // TARGET.rows)):
        top = block * TARGET.rows
        height, seen = cpu_activations.block_size(rows - top), set()
        for slot in range(a.slots[block]):
            at, cell = 2 * columns // CELL * top + slot * height, a.cells[block, slot]
            levels = a.levels[at * CELL : (at + height) * CELL].reshape(8, height, 4)
            starts, sums = (b[at * parts : (at + height) * parts].reshape(parts, height) for b in (a.starts, a.sums))
            for m in range(min(height, rows - top)):
                yield top + m, cell, int(cell in seen), {
                    "scale": a.scales[at + m], "starts": starts[:, m], "sums": sums[:, m],
                    "levels": levels[:, m].reshape(CELL),
                }  # fmt: skip
            seen.add(cell)


@pytest.mark.skipif(tool("ptxas") is None, reason="there is no assembler for GPUs")
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_processor_has_registers_for_all_threads(cupy, name):
    from qattn.cuda.matmul import DECODE_SIZES, decode_kernel, decode_warps

    layout = qattn.PackedMatrix(random_weights(name, 1, 256)).layouts[0]
    report = assemble(decode_kernel(layout, DECODE_SIZES[-1]).ptx_file, "sm_90")
    assert -(-report.registers // 8) * 8 * 32 * decode_warps(layout, 1) <= 65536
    assert report.stack == 0
