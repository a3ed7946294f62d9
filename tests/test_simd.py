"""The little language of micro-kernels: its functions against NumPy, with the bounds that they promise."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qattn.cpu.dots import Dots
from qattn.cpu.simd import LANES, MAX_CODE, micro_kernel


def vector_function(body):
    """A micro-kernel over 16 float32 → a function of arrays."""

    @micro_kernel
    def run(e, x, out):
        out.store(body(e, x.load(e.F32)))

    @numba.njit
    def call(x, out):
        run((x, out))

    def apply(x, dtype=np.float32):
        out = np.zeros(LANES, dtype)
        call(np.ascontiguousarray(x, np.float32), out)
        return out

    return apply


exp2 = {degree: vector_function(lambda e, x, degree=degree: e.exp2(x, degree)) for degree in (4, 5)}
to_f16 = vector_function(lambda e, x: e.to_f16(x))
to_bf16 = vector_function(lambda e, x: e.to_bf16(x))
finite = st.lists(st.floats(-150, 0, width=32), min_size=LANES, max_size=LANES).map(lambda x: np.array(x, np.float32))


@pytest.mark.parametrize(("degree", "bound"), [(5, 3e-7), (4, 3e-6)])
def test_exp2_keeps_its_bound(degree, bound):
    for x in np.linspace(-125, 0, 16 * 4000, dtype=np.float32).reshape(-1, LANES):
        want = np.exp2(x.astype(np.float64))
        assert (np.abs(exp2[degree](x) - want) <= bound * want).all()


@given(x=finite)
def test_exp2_of_small_numbers_goes_to_zero(x):
    for degree in exp2:
        np.testing.assert_allclose(exp2[degree](x), np.exp2(x.astype(np.float64)), rtol=1e-5, atol=2e-38)


def test_exp2_of_hidden_scores_is_zero():
    x = np.array([-np.inf, -1e30, -1e4, -151, *[0] * 12], np.float32)
    for degree in exp2:
        assert exp2[degree](x).tolist()[:4] == [0, 0, 0, 0] and np.allclose(exp2[degree](x)[4:], 1, rtol=3e-6)


@given(x=st.lists(st.floats(width=32, allow_nan=False), min_size=LANES, max_size=LANES))
def test_halves_are_rounded_to_the_nearest_even(x):
    x = np.array(x, np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_f16(x, np.uint16), x.astype(np.float16).view(np.uint16))


@given(x=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=LANES, max_size=LANES))
def test_bfloat16_is_rounded_to_the_nearest_even(x):
    x = np.array(x, np.float32)
    x[np.abs(x) < 2e-38] = 0  # the instruction takes denormals for 0
    word = x.view(np.uint32).astype(np.uint64)
    want = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(to_bf16(x, np.uint16), want)


@pytest.mark.parametrize(
    ("largest", "signed", "x"),
    [(1, False, 127), (15, False, 127), (31, False, 127), (63, False, 127), (MAX_CODE, False, 128), (128, True, 127),
     (MAX_CODE, False, 8)],
)  # fmt: skip
def test_sums_of_the_largest_bytes_are_exact(largest, signed, x):
    """However a machine adds products up, also where they are all alike; rows may have different numbers of them."""

    @micro_kernel
    def run(e, codes, levels, out):
        dots = Dots(e, [e.constant(start, e.I32V) for start in (1000, -7)], 17, largest, signed, x)
        for quad in range(17):
            for row in range(2 if quad < 5 else 1):
                dots.add(row, codes.load(e.U8), levels.at(64 * row).load(e.U8))
        for row in range(2):
            out.at(64 * row).store(dots.total(row))

    @numba.njit
    def call(codes, levels, out):
        run((codes, levels, out))

    codes, out = np.full(64, -largest if signed else largest).astype(np.uint8), np.zeros((2, LANES), np.int32)
    levels = np.repeat(np.array([[x if x < 128 else -x], [-x]], np.int64), 64, axis=1).astype(np.int8)
    call(codes, levels, out)
    code = -largest if signed else largest
    assert (out[0] == 1000 + 17 * 4 * code * int(levels[0, 0])).all()
    assert (out[1] == -7 + 5 * 4 * code * -x).all()
