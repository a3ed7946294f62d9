"""The PTX emulator: instructions as the PTX ISA defines them, compiled kernels, and every error that it promises."""

import math
import operator
import struct

import numpy as np
import pytest
from numba.core.types import CPointer, float32, int32, int64, void

from tests.ptx_emulator import Module, PTXError

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
RNG = np.random.default_rng(7)


def kernel(body, params=1, declarations="", outside=""):
    """A module with one entry: pointers %a0, %a1, …, the thread's number %t, and %o, its offset in 4-byte words."""
    names = [f".param .u64 p{i}" for i in range(params)]
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}]; cvta.to.global.u64 %a{i}, %a{i};" for i in range(params))
    return f""".version 8.0
.target sm_90
.address_size 64
{outside}
.visible .entry k({", ".join(names)}) {{
    .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %d<9>; .reg .pred %p<9>; .reg .b64 %a<6>; .reg .b32 %t; .reg .b64 %o;
    {declarations} {loads}
    mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4;
    {body}
    ret;
}}"""


def launch(body, *arrays, threads=32, grid=1, **parts):
    Module(kernel(body, len(arrays), **parts)).launch("k", grid, threads, arrays, max_steps=5000)


def evaluate(text, result, *sources):
    """One instruction for each element: $0 is the result, of an unsigned dtype, and $1, … are the sources, as bits."""
    sources = [np.ascontiguousarray(source) for source in sources]
    out = np.zeros(len(sources[0]), result)
    body = []
    for index, array in enumerate([out, *sources]):
        bits = array.itemsize * 8
        text = text.replace(f"${index}", f"%x{index}")
        body.append(f".reg .b{bits} %x{index}; mad.wide.u32 %a{index}, %t, {bits // 8}, %a{index};")
        body.append(f"ld.global.b{bits} %x{index}, [%a{index}];" if index else "")
    body.append(f"{text} st.global.b{out.itemsize * 8} [%a0], %x0;")
    launch("\n".join(body), out, *sources, threads=len(out))
    return out


def signed(value, bits):
    return (value & (1 << bits) - 1) - (1 << bits if value >> bits - 1 & 1 else 0)


WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF, 0xFFFFFFFE, 0xFFFFFFFF]
PAIRS = [(a, b) for a in WORDS for b in WORDS]
U32 = np.array(PAIRS, np.uint32).T
S = [(signed(a, 32), signed(b, 32)) for a, b in PAIRS]


ONE = np.array(WORDS, np.uint32)
ARITHMETIC = {
    "add.s32": [a + b for a, b in PAIRS], "sub.u32": [a - b for a, b in PAIRS], "mul.lo.s32": [a * b for a, b in PAIRS],
    "mul.hi.u32": [a * b >> 32 for a, b in PAIRS], "mul.hi.s32": [a * b >> 32 for a, b in S],
    "min.s32": [min(pair) for pair in S], "max.u32": [max(pair) for pair in PAIRS],
    "and.b32": [a & b for a, b in PAIRS], "xor.b32": [a ^ b for a, b in PAIRS],
    "shl.b32": [a << min(b, 32) for a, b in PAIRS], "shr.u32": [a >> min(b, 32) for a, b in PAIRS],
    "shr.s32": [signed(a, 32) >> min(b, 32) for a, b in PAIRS],
    "popc.b32": [bin(a).count("1") for a in WORDS], "clz.b32": [32 - a.bit_length() for a in WORDS],
    "brev.b32": [int(f"{a:032b}"[::-1], 2) for a in WORDS], "bfind.u32": [a.bit_length() - 1 for a in WORDS],
    "bfind.s32": [(signed(a, 32) ^ signed(a, 32) >> 31).bit_length() - 1 for a in WORDS],
    "bfind.shiftamt.u32": [32 - a.bit_length() if a else -1 for a in WORDS],
    "not.b32": [~a for a in WORDS], "neg.s32": [-a for a in WORDS], "abs.s32": [abs(signed(a, 32)) for a in WORDS],
}  # fmt: skip


@pytest.mark.parametrize("op", ARITHMETIC)
def test_integer_arithmetic(op):
    unary = len(ARITHMETIC[op]) == len(WORDS)
    result = evaluate(f"{op} $0, $1;", np.uint32, ONE) if unary else evaluate(f"{op} $0, $1, $2;", np.uint32, *U32)
    assert result.tolist() == [value & M32 for value in ARITHMETIC[op]]


@pytest.mark.parametrize("sign", "us")
def test_division_truncates_and_products_have_64_and_128_bits(sign):
    narrow, wide = (lambda a: signed(a, 32), lambda a: signed(a, 64)) if sign == "s" else (int, int)
    pairs = [(narrow(a), narrow(b)) for a, b in PAIRS if b not in (0, M32)]
    bits = np.array(pairs, np.int64).astype(np.uint32).T
    quotients = [abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in pairs]
    remainders = [a - q * b & M32 for q, (a, b) in zip(quotients, pairs, strict=True)]
    assert evaluate(f"div.{sign}32 $0, $1, $2;", np.uint32, *bits).tolist() == [q & M32 for q in quotients]
    assert evaluate(f"rem.{sign}32 $0, $1, $2;", np.uint32, *bits).tolist() == remainders
    assert evaluate(f"mul.wide.{sign}32 $0, $1, $2;", np.uint64, *bits).tolist() == [a * b & M64 for a, b in pairs]
    values = [0, 1, 3, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEF12345678]
    pairs = [(a, b) for a in values for b in values]
    expected = [wide(a) * wide(b) >> 64 & M64 for a, b in pairs]
    assert evaluate(f"mul.hi.{sign}64 $0, $1, $2;", np.uint64, *np.array(pairs, np.uint64).T).tolist() == expected


def test_fields_and_permutations():
    a, b = RNG.integers(0, 2**32, (2, 256), dtype=np.uint32)
    start, length = RNG.integers(0, 40, (2, 256), dtype=np.uint32)
    rows = list(zip(*(array.tolist() for array in (a, b, start, length)), strict=True))

    def check(text, expected):
        assert evaluate(text, np.uint32, a, b, start, length).tolist() == [value & M32 for value in expected]

    check("bfi.b32 $0, $1, $2, $3, $4;", [y & ~(2**n - 1 << s) | (x & 2**n - 1) << s for x, y, s, n in rows])
    signs = [0xFF000000 if x & 0x80 else 0 for x, *_ in rows]
    picked = [x & 255 | (y & 255) << 8 | y >> 24 << 16 for x, y, *_ in rows]
    check("prmt.b32 $0, $1, $2, 0x8740;", [x | sign for x, sign in zip(picked, signs, strict=True)])


def test_dot_products_of_bytes():
    a, b, c = RNG.integers(0, 2**32, (3, 64), dtype=np.uint32)
    for first, second in ("ss", "us", "su", "uu"):
        expected = []
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
            xs, ys = (struct.unpack("<4b" if sign == "s" else "<4B", word) for sign, word in
                      ((first, struct.pack("<I", x)), (second, struct.pack("<I", y))))  # fmt: skip
            expected.append(z + sum(map(operator.mul, xs, ys)) & M32)
        assert evaluate(f"dp4a.{first}32.{second}32 $0, $1, $2, $3;", np.uint32, a, b, c).tolist() == expected


FLOATS = np.array([0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 1e-40, 3e38, -np.inf, np.inf, np.nan, 0.1, 2**31, -7e9], np.float32)
X, Y = (array.reshape(-1) for array in np.meshgrid(FLOATS, FLOATS))


def floats(text, *sources):
    return evaluate(text, np.uint32, *[source.view(np.uint32) for source in sources]).view(np.float32)


@pytest.mark.parametrize("op", ["add", "subtract", "multiply", "divide"])
def test_float_arithmetic_rounds_to_nearest(op):
    with np.errstate(all="ignore"):
        expected = getattr(np, op)(X.astype(np.float64), Y.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(floats(f"{op[:3]}.rn.f32 $0, $1, $2;", X, Y), expected)


def test_fma_rounds_once_and_in_four_directions():
    a, b, c = (np.full(1, value, np.float32) for value in (1 + 2**-12, 1 + 2**-12, -1 - 2**-11))
    assert floats("fma.rn.f32 $0, $1, $2, $3;", a, b, c) == 2.0**-24
    one, tiny = np.ones(1, np.float32), np.full(1, 2.0**-30, np.float32)
    above, below = np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))
    expected = {("rp", 1): above, ("rm", 1): one, ("rz", 1): one, ("rp", -1): one, ("rm", -1): below, ("rz", -1): below}
    for (mode, sign), value in expected.items():
        assert floats(f"fma.{mode}.f32 $0, $1, $1, $2;", one, np.float32(sign) * tiny) == value


def test_float_limits_flush_and_saturate():
    less, pairs = floats("min.f32 $0, $1, $2;", X, Y), zip(X.tolist(), Y.tolist(), strict=True)
    order = [
        sorted([(x, math.copysign(1, x)), (y, math.copysign(1, y))]) if x == x and y == y else (x, y) for x, y in pairs
    ]
    expected = [
        first[0] if isinstance(first, tuple) else second if first != first else first for first, second in order
    ]
    np.testing.assert_array_equal(less, expected)
    np.testing.assert_array_equal(np.signbit(less)[less == 0], np.signbit(expected)[less == 0])
    assert np.isnan(floats("max.NaN.f32 $0, $1, $2;", X, Y)[np.isnan(X) | np.isnan(Y)]).all()
    small = np.array([1e-40, -1e-40, 1e-30], np.float32)
    assert floats("add.f32 $0, $1, $1;", small)[0] == 2 * small[0] and floats("add.ftz.f32 $0, $1, $1;", small)[0] == 0
    limited = floats("add.sat.f32 $0, $1, 0f00000000;", FLOATS)
    assert limited.tolist() == [min(max(x, 0.0), 1.0) if x == x else 0.0 for x in FLOATS.tolist()]


def test_approximations():
    x = np.array([0.25, 1.0, 3.0, 10.0], np.float32)
    names = {
        "ex2": "exp2",
        "lg2": "log2",
        "sqrt": "sqrt",
        "rcp": "reciprocal",
    }
    for op, name in names.items():
        np.testing.assert_allclose(floats(f"{op}.approx.f32 $0, $1;", x), getattr(np, name)(x.astype(float)), rtol=1e-7)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons_of_floats(name):
    text = f"setp.{name}.f32 %p0, $1, $2; selp.u32 $0, 1, 0, %p0; @!%p0 add.u32 $0, $0, 2;"
    result = evaluate(text, np.uint32, X.view(np.uint32), Y.view(np.uint32))
    for x, y, got in zip(X.tolist(), Y.tolist(), result.tolist(), strict=True):
        holds = getattr(operator, name[:2])(x, y) if x == x and y == y else name.endswith("u")
        assert got == (1 if holds else 2), (x, y)


def test_conversions():
    def cast(text, source, result=np.uint32):
        return evaluate(f"cvt.{text} $0, $1;", result, source)

    bits = FLOATS.view(np.uint32)
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    limited = [0 if x != x else max(-3e9, min(3e9, x)) for x in FLOATS.tolist()]
    for mode, function in whole.items():
        expected = [max(-(2**31), min(2**31 - 1, function(x))) for x in limited]
        assert cast(f"{mode}.s32.f32", bits).view(np.int32).tolist() == expected
    rows = [
        ("rzi.u8.f32", np.array([300.7, -5, 7.9], np.float32).view(np.uint32), [255, 0, 7]),
        ("u32.u16", ONE, [a & 0xFFFF for a in WORDS]),
        ("s32.s8", np.array([127, 128, 511], np.uint32), [127, M32 - 127, M32]),
        ("sat.u8.s32", np.array([5, 300, M32], np.uint32), [5, 255, 0]),
        ("rn.f32.u64", np.array([2**63 + 2**40], np.uint64), [0x5F000001]), ("rz.f32.s32", ONE[8:9], [0xCEFFFFFF]),
        ("f32.f16", np.array([0x3C00, 0xFBFF, 1, 0x7C00], np.uint16), [0x3F800000, 0xC77FE000, 0x33800000, 0x7F800000]),
    ]  # fmt: skip
    for text, source, expected in rows:
        assert cast(text, source).tolist() == expected, text
    assert cast("s64.s32", ONE, np.uint64).tolist() == [signed(a, 32) & M64 for a in WORDS]
    packed = evaluate("cvt.rn.f16x2.f32 $0, $1, $2;", np.uint32, bits, bits[::-1].copy())
    with np.errstate(over="ignore"):
        expected = np.stack([FLOATS[::-1], FLOATS], -1).astype(np.float16)
    np.testing.assert_array_equal(packed.view(np.float16).reshape(-1, 2), expected)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32)
    assert cast("rn.bf16.f32", ties, np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81]
    assert evaluate("cvt.rn.bf16x2.f32 $0, $1, $2;", np.uint32, ties, ties[::-1].copy())[0] == 0x3F803F81


def test_half_arithmetic():
    a, b, c = RNG.standard_normal((3, 64)).astype(np.float16)
    result = evaluate("fma.rn.f16x2 $0, $1, $2, $3;", np.uint32, *(x.view(np.uint32) for x in (a, b, c)))
    np.testing.assert_array_equal(result.view(np.float16), (a.astype(float) * b + c).astype(np.float16))
    result = evaluate("mul.f16 $0, $1, $2; neg.f16 $0, $0;", np.uint16, a.view(np.uint16), b.view(np.uint16))
    np.testing.assert_array_equal(result.view(np.float16), -(a * b))


SHUFFLES = [("idx", 5, 31), ("up", 3, 0), ("down", 7, 31), ("bfly", 9, 31), ("idx", 2, 0x181F), ("up", 1, 0x1800)]


def test_shuffles():
    for mode, b, c in SHUFFLES:
        out = np.zeros((2, 32), np.uint32)
        launch(f"""add.u32 %r0, %t, 100; shfl.sync.{mode}.b32 %r1|%p1, %r0, {b}, {c}, -1; selp.u32 %r2, 1, 0, %p1;
            add.u64 %a0, %a0, %o; st.global.u32 [%a0], %r1; st.global.u32 [%a0+128], %r2;""", out)  # fmt: skip
        for lane in range(32):
            segment, clamp = c >> 8 & 31, c & 31
            top, bottom = (lane & segment) | (clamp & ~segment & 31), lane & segment
            source = {"idx": bottom | (b & ~segment), "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
            inside = source >= top if mode == "up" else source <= top
            assert out[:, lane].tolist() == [100 + (source if inside else lane), int(inside)], (mode, lane)


def test_votes_in_a_part_of_a_warp_and_of_a_split_warp():
    out = np.zeros((4, 48), np.uint32)
    launch("""mul.wide.u32 %o, %t, 4; add.u64 %a0, %a0, %o; setp.gt.u32 %p0, %t, 3; setp.lt.u32 %p1, %t, 32;
        mov.u32 %r9, 0xFFFF; @%p1 mov.u32 %r9, 0xFFFFFFFF;
        vote.sync.ballot.b32 %r0, %p0, %r9; vote.sync.any.pred %p2, !%p0, %r9; vote.sync.all.pred %p3, %p0, %r9;
        selp.u32 %r1, 1, 0, %p2; selp.u32 %r2, 1, 0, %p3;
        and.b32 %r3, %t, 1; setp.eq.u32 %p4, %r3, 1; mov.u32 %r4, 0; @%p4 bra ODD; activemask.b32 %r4;
        ODD: bar.warp.sync %r9;
        st.global.u32 [%a0], %r0; st.global.u32 [%a0+192], %r1; st.global.u32 [%a0+384], %r2;
        st.global.u32 [%a0+576], %r4;
        """, out, threads=48)  # fmt: skip
    assert out[0].tolist() == [0xFFFFFFF0] * 32 + [0xFFFF] * 16
    assert out[1].tolist() == [1] * 32 + [0] * 16 and out[2].tolist() == [0] * 32 + [1] * 16
    assert out[3].tolist() == [(0x55555555, 0)[i % 2] for i in range(32)] + [(0x5555, 0)[i % 2] for i in range(16)]


def fragments(a, b, c, each):
    """The registers of mma.m16n8kK's A, B and C for each lane, written out from the tables of the ISA."""
    depth = len(b)
    in_a, in_b, in_c = (
        np.zeros((32, depth // 2), a.dtype),
        np.zeros((32, depth // 4), b.dtype),
        np.zeros((32, 4), c.dtype),
    )
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(depth // 2):
            row, column = group + (0 if i // each in (0, 2) else 8), member * each + i % each
            in_a[lane, i] = a[row, column + (4 * each if i >= 2 * each else 0)]
            if i < depth // 4:
                in_b[lane, i] = b[column + (4 * each if i >= each else 0), group]
        for i in range(4):
            in_c[lane, i] = c[group if i < 2 else group + 8, member * 2 + (i & 1)]
    return [array.view(np.uint32) for array in (in_a, in_b, in_c)]


MMA = [
    ("m16n8k16.row.col.f32.f16.f16.f32", "f2", "f4"), ("m16n8k8.row.col.f32.f16.f16.f32", "f2", "f4"),
    ("m16n8k32.row.col.s32.s8.s8.s32", "i1", "i4"), ("m16n8k16.row.col.s32.u8.u8.s32", "u1", "i4"),
]  # fmt: skip


@pytest.mark.parametrize("shape, dtype, number", MMA, ids=[shape for shape, *_ in MMA])
def test_matrix_products(shape, dtype, number):
    depth, low = int(shape[6:].split(".")[0]), 0 if dtype == "u1" else -9
    a, b = (RNG.integers(low, 9, size).astype(dtype) for size in ((16, depth), (depth, 8)))
    c = RNG.integers(-99, 99, (16, 8)).astype(number)
    arrays = fragments(a, b, c, 4 // a.itemsize)
    body, operands = [], []
    for pointer, array in enumerate(arrays):
        count = array.shape[1]
        registers = [f"%r{10 * pointer + i}" for i in range(count)]
        body.append(f"mul.wide.u32 %o, %t, {4 * count}; add.u64 %a{pointer}, %a{pointer}, %o;")
        body += [f"ld.global.u32 {register}, [%a{pointer}+{4 * i}];" for i, register in enumerate(registers)]
        operands.append(f"{{{', '.join(registers)}}}")
    body.append(f"mma.sync.aligned.{shape} {operands[2]}, {', '.join(operands)};")
    body += [f"st.global.u32 [%a2+{4 * i}], {register};" for i, register in enumerate(registers)]
    launch("\n".join(body), *arrays)
    expected = (a.astype(float) @ b.astype(float) + c).astype(number)
    assert (arrays[2] == fragments(a, b, expected, 4 // a.itemsize)[2]).all()


SHARED = ".shared .align 16 .b8 s[256];"
OTHER = "xor.b32 %r9, %t, 1; shl.b32 %r9, %r9, 2;"  # the place of the neighbour
STORE = "mov.u64 %d0, s; add.u64 %d1, %d0, %o; st.shared.u32 [%d1], %t;"  # s[t] = t


def test_ldmatrix_and_transposed_rows():
    for suffix, transposed in (("", False), (".trans", True)):
        out = np.zeros((32, 4), np.uint32)
        launch(f"""mul.wide.u32 %d0, %t, 16; cvt.u32.u64 %r9, %d0; mul.lo.u32 %r0, %t, 0x80008; mov.b32 %r8, 0x10000;
            add.u32 %r0, %r0, %r8; add.u32 %r1, %r0, 0x20002; add.u32 %r2, %r0, 0x40004; add.u32 %r3, %r0, 0x60006;
            st.shared.v4.u32 [%r9], {{%r0, %r1, %r2, %r3}}; bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%r9];
            add.u64 %a0, %a0, %d0; st.global.v4.u32 [%a0], {{%r0, %r1, %r2, %r3}};""", out,
            declarations=".shared .align 16 .b8 s[512];")  # fmt: skip
        got = out.view(np.uint16).reshape(32, 4, 2)
        matrix = np.arange(256).reshape(4, 8, 8)
        for lane in range(32):
            for j in range(2):
                row, column = lane // 4, lane % 4 * 2 + j
                assert (got[lane, :, j] == (matrix[:, column, row] if transposed else matrix[:, row, column])).all()


COPY = """cvt.u32.u64 %r9, %o; mul.lo.u32 %r8, %t, 4; add.u64 %a0, %a0, %o; sub.u32 %r7, 31, %t;
    cp.async.ca.shared.global [%r8], [%a0], 4; cp.async.commit_group; {wait} {barrier}
    shl.b32 %r7, {reads}, 2; ld.shared.u32 %r0, [%r7]; st.global.u32 [%a0], %r0;"""


def test_asynchronous_copies():
    data = RNG.integers(0, 2**32, 32, dtype=np.uint32)
    expected = data[::-1].copy()
    launch(COPY.format(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", reads="%r7"), data, declarations=SHARED)
    assert (data == expected).all()


def test_atomics_take_turns_and_return_the_old_value():
    counter, old = np.array([5, 0, 7, 0], np.uint32), np.zeros(64, np.uint32)
    launch("""atom.global.add.u32 %r0, [%a0], 2; add.u64 %a1, %a1, %o; st.global.u32 [%a1], %r0;
        red.global.max.u32 [%a0+4], %t; atom.global.cas.b32 %r1, [%a0+8], 7, %t; cvt.rn.f32.u32 %f0, %t;
        red.global.add.f32 [%a0+12], %f0;""", counter, old, threads=64)  # fmt: skip
    assert counter[:3].tolist() == [133, 63, 0] and counter[3:].view(np.float32) == 2016
    assert sorted(old.tolist()) == list(range(5, 133, 2))


def test_divergence_and_tables():
    table = ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 0, 1, 0, 0};"
    out = np.zeros((2, 32), np.uint32)
    launch(f"""{STORE} ld.shared.u32 %r0, [%d1]; mov.u32 %r1, 0; mov.u32 %r2, %ctaid.x;
        LOOP: add.u32 %r1, %r1, %r0; sub.u32 %r0, %r0, 1; setp.gt.s32 %p0, %r0, 0; @%p0 bra LOOP;
        mad.wide.u32 %d2, %r2, 128, %a0; add.u64 %d2, %d2, %o; mul.wide.u32 %d4, %r2, 4; mov.u64 %d5, table;
        add.u64 %d5, %d5, %d4; ld.global.u32 %r3, [%d5]; add.u32 %r1, %r1, %r3; st.global.u32 [%d2], %r1;
        """, out, grid=2, declarations=SHARED, outside=table)  # fmt: skip
    sums = [sum(range(t + 1)) for t in range(32)]
    assert out[0].tolist() == [s + 1 for s in sums] and (out[1] == out[0] + 255).all()


def test_each_thread_has_local_memory_of_its_own():
    out, local = np.zeros((2, 32), np.uint32), ".local .align 16 .b8 l[20];"
    launch("""mov.u64 %d0, l; cvta.local.u64 %d1, %d0; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r0, %r2, 100, %t;
        st.local.u32 [%d0+4], %r0; bar.sync 0; ld.local.u32 %r1, [%d1+4]; mad.wide.u32 %d2, %r2, 128, %a0;
        add.u64 %d2, %d2, %o; st.global.u32 [%d2], %r1;""", out, grid=2, declarations=local)  # fmt: skip
    assert np.array_equal(out, np.add.outer([0, 100], np.arange(32)))


def test_overlapping_arrays_are_the_same_memory():
    data = np.arange(8, dtype=np.uint32)
    swap = "ld.global.u32 %r0, [%a1]; st.global.u32 [%a0+8], %r0; ld.global.u32 %r1, [%a1+4]; st.global.u32 [%a0], %r1;"
    launch(swap, data, data[1:], threads=1)
    assert data[:3].tolist() == [1, 1, 1]


ERRORS = {
    r"thread \(31, 0, 0\) .* 4 bytes at byte 124 of argument 0": "add.u64 %a0, %a0, %o; ld.global.u32 %r0, [%a0];",
    "byte -4 of argument 0": "st.global.u32 [%a0-4], %t;",
    "where no array is": "mov.u64 %d0, 0; ld.global.u32 %r0, [%d0];",
    "4 bytes at byte 2 of .*: misaligned": "ld.global.u32 %r0, [%a0+2];",
    "16 bytes at byte 8 of .*: misaligned": "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0+8];",
    "of shared memory: outside, it has 256": f"{STORE} ld.shared.u32 %r0, [%d0+256];",
    "of local memory: outside, it has 16": "mov.u64 %d0, l; st.local.u32 [%d0+16], %t;",
    "of constants: outside, it has 8": "mov.u64 %d0, constants; ld.const.u32 %r0, [%d0+8];",
    "store to read-only constants": "mov.u64 %d0, constants; st.global.u32 [%d0], %t;",
    "uninitialized": f"{STORE} bar.sync 0; ld.shared.u32 %r0, [%d1+128];",
    "reads byte 4 .*; thread 1 writes it": f"{STORE} {OTHER} ld.shared.u32 %r0, [%r9];",
    "writes byte 4.*thread 1 reads": f"{STORE} bar.sync 0; ld.shared.u32 %r0, [%d1]; {OTHER} st.shared.u32 [%r9], %t;",
    "in the same instruction": "mov.u64 %d0, s; st.shared.u32 [%d0], %t;",
    "atomics update it": f"{STORE} bar.sync 0; red.shared.add.u32 [s], 1; ld.shared.u32 %r0, [s];",
    "deadlock: .*31 at line .*bar.sync 1; 1 at line .*bar.sync 0": """setp.eq.u32 %p0, %t, 0; @%p0 bra A; bar.sync 1;
        bra B; A: bar.sync 0; B: mov.u32 %r0, 0;""",
    "deadlock: .* 1 at line .*shfl": """setp.eq.u32 %p0, %t, 0; @%p0 bra A; bar.sync 0; bra B;
        A: shfl.sync.idx.b32 %r0, %t, 0, 31, -1; B: mov.u32 %r0, 0;""",
    "lanes that don't exist or ended": "setp.eq.u32 %p0, %t, 9; @%p0 ret; vote.sync.any.pred %p0, %p0, -1;",
    "not in its own member mask": "bar.warp.sync 1;",
    "bra L: more than max_steps = 5000": "L: bra L;",
    "never written": "add.u32 %r0, %r1, 1;",
    "executed trap": "trap;",
    "wasn't waited for": COPY.format(wait="", barrier="bar.sync 0;", reads="%t"),
    "thread 31 writes it": COPY.format(wait="cp.async.wait_all;", barrier="", reads="%r7"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_line_and_the_reason(message):
    data = np.zeros(128 if "cp.async" in ERRORS[message] else 31, np.uint32)
    constants, local = ".const .align 4 .b8 constants[8] = {1, 2};", ".local .align 16 .b8 l[16];"
    with pytest.raises(PTXError, match=r"line \d+: .*") as raised:
        launch(ERRORS[message], data, declarations=SHARED + local, outside=constants)
    raised.match(message)


def test_errors_before_and_at_the_launch():
    unknown = ["frobnicate.u32 %r0;", "add.u32 %r0, %r99, 1;", "bra NOWHERE;", "call.uni missing;", "mma.sync.x %r0;"]
    unknown += ["st.u32 [%a0], %t;", "add.sat.s32 %r0, %r1, %r2;", "mov.u64 %d0, p0;", "mov.u32 %r0, %clock;"]
    for text in unknown:
        with pytest.raises(PTXError, match=rf"line \d+: {text.split('.')[0].split()[0]}"):
            Module(kernel(text))
    frozen = np.zeros(4, np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(PTXError, match="store to read-only argument 0"):
        launch("st.global.u32 [%a0], 1;", frozen, threads=1)
    with pytest.raises(ValueError, match="takes 1 arguments, 0 given"):
        Module(kernel("")).launch("k", 1, 1, [])


def test_warps_are_ordered_by_their_own_synchronization():
    body = """{STORE} bar.warp.sync -1; xor.b32 %r9, %t, {other}; shl.b32 %r9, %r9, 2; ld.shared.u32 %r0, [%r9];
        shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; st.shared.u32 [%r9], %t;"""
    launch(body.format(STORE=STORE, other=1), threads=64, declarations=SHARED)
    with pytest.raises(PTXError, match="no barrier lies between"):
        launch(body.format(STORE=STORE, other=32), threads=64, declarations=SHARED)
    # Another lane reads before the warp synchronizes, the writing one behind that; then the other way round.
    other, sync, own = f"{OTHER} ld.shared.u32 %r0, [%r9];", "bar.warp.sync -1;", "ld.shared.u32 %r1, [%d1];"
    launch(f"{STORE} {sync} {other} {sync} {own} st.shared.u32 [%d1], %t;", declarations=SHARED)
    with pytest.raises(PTXError, match="no barrier lies between"):
        launch(f"{STORE} {sync} {own} {sync} {other} st.shared.u32 [%d1], %t;", declarations=SHARED)
    far = "xor.b32 %r9, %t, 32; shl.b32 %r9, %r9, 2; ld.shared.u32 %r0, [%r9];"
    with pytest.raises(PTXError, match="no barrier lies between"):  # of the other warp's read
        launch(f"{STORE} bar.sync 0; {far} {sync} {own} st.shared.u32 [%d1], %t;", threads=64, declarations=SHARED)


@pytest.mark.parametrize("fastmath", [False, True])
def test_compiled_softmax_with_static_and_dynamic_shared_memory(fastmath):
    pytest.importorskip("numba_cuda")
    cuda = pytest.importorskip("numba.cuda")

    def softmax(x, y, n):
        tile, partial = cuda.shared.array((2, 64), float32), cuda.shared.array(0, float32)
        t, row = cuda.threadIdx.x, int64(cuda.blockIdx.x) * n
        total = float32(0)
        for i in range(t, n, 64):
            tile[i // 64, t] = math.exp(x[row + i])
            total += tile[i // 64, t]
        for step in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        if t % 32 == 0:
            partial[t // 32] = total
        cuda.syncthreads()
        for i in range(t, n, 64):
            y[row + i] = tile[i // 64, t] / (partial[0] + partial[1])

    types = void(CPointer(float32), CPointer(float32), int32)
    ptx, _ = cuda.compile(softmax, types, cc=(9, 0), device=False, abi="numba", output="ptx", fastmath=fastmath)
    module = Module(ptx)
    x = RNG.standard_normal((5, 100)).astype(np.float32)
    y = np.zeros_like(x)
    module.launch(module.entries[0], 5, 64, [x, y, 100], shared=8)
    expected = np.exp(x.astype(float))
    np.testing.assert_allclose(y, expected / expected.sum(1, keepdims=True), rtol=1e-6)
