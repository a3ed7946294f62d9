"""Arithmetic, comparisons and conversions.

Rounding is exact where PTX says so, with these exceptions: fma in float32 is computed in float64 and rounded once more
(the product is exact, the sum nearly always), and likewise fma in float64 in NumPy's longdouble.  The .approx functions
are computed in float64 and rounded, so they are better here than on a GPU.
"""

from __future__ import annotations

import numpy as np

from tests.ptx_emulator.parser import TYPES, Instruction, PTXError, Type
from tests.ptx_emulator.values import PRED, U32, UNSIGNED, Array, Function, pure

TINY = np.finfo(np.float32).tiny
ROUNDINGS = ("rn", "rz", "rm", "rp")
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOAT: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal,
    "ex2": np.exp2, "lg2": np.log2, "neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax,
    "fma": lambda a, b, c, dtype: np.multiply(a, b, dtype=dtype) + c,
    "rsqrt": lambda a, dtype: 1 / np.sqrt(a, dtype=dtype),
}  # fmt: skip
EXACT = {"add", "sub", "mul", "div", "sqrt", "neg", "abs"}  # NumPy rounds them as .rn does
COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def widened(a: Array) -> Array:
    """The numbers in twice as many bits."""
    return a.astype(f"{a.dtype.kind}{a.itemsize * 2}")


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product, by way of Python's integers."""
    return (a.astype(object) * b.astype(object) >> a.itemsize * 8).astype(a.dtype)


def shift_left(a: Array, amount: Array) -> Array:
    """Shift by an unsigned 32-bit amount; amounts past the width count as the width."""
    return np.left_shift(a, np.minimum(amount, np.uint32(a.itemsize * 8)).astype(a.dtype))


def shift_right(a: Array, amount: Array) -> Array:
    return np.right_shift(a, np.minimum(amount, np.uint32(a.itemsize * 8)).astype(a.dtype))


def split(a: Array, dtype: str) -> Array:
    """Numbers as rows of smaller ones, the lowest first."""
    return np.ascontiguousarray(a).view(dtype).reshape(len(a), -1)


def bits_of(a: Array) -> Array:
    """Numbers as rows of bits, the lowest first."""
    return np.unpackbits(split(a, "u1"), axis=1, bitorder="little")


def reverse_bits(a: Array) -> Array:
    return np.packbits(bits_of(a)[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)


def leading_zeros(a: Array) -> Array:
    return np.where(a == 0, a.itemsize * 8, np.argmax(bits_of(a)[:, ::-1], axis=1)).astype(np.uint32)


def find_shift(a: Array) -> Array:
    """bfind.shiftamt: how far the highest bit that differs from the sign is from the top, all ones if there is none."""
    zeros = leading_zeros(np.where(a < 0, ~a, a))
    return np.where(zeros == a.itemsize * 8, np.uint32(0xFFFFFFFF), zeros)


def find_highest(a: Array) -> Array:
    """bfind: the position of that bit."""
    return np.uint32(a.itemsize * 8 - 1) - leading_zeros(np.where(a < 0, ~a, a))


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: b with length bits of it, from start on, replaced by the low bits of a."""
    start, length = start & np.uint32(255), length & np.uint32(255)
    field = shift_left(~shift_left(np.full_like(a, np.iinfo(a.dtype).max), length), start)
    return b & ~field | shift_left(a, start) & field


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of (b, a), or its sign spread over it."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(1, np.uint32)
    for index in range(4):
        nibble = selector >> np.uint32(4 * index)
        byte = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * index)
    return result


# The types of the result and the operands of integer instructions, and the function: t is the instruction's own type,
# w one of twice the width, u .u32.  Division by zero, which PTX leaves open, gives 0.
INTEGER: dict[str, tuple[str, Function]] = {
    "add": ("ttt", np.add), "sub": ("ttt", np.subtract), "min": ("ttt", np.minimum), "max": ("ttt", np.maximum),
    "mul.lo": ("ttt", np.multiply), "mul.hi": ("ttt", multiply_high), "mad.lo": ("tttt", lambda a, b, c: a * b + c),
    "mul.wide": ("wtt", lambda a, b: widened(a) * widened(b)),
    "mad.wide": ("wttw", lambda a, b, c: widened(a) * widened(b) + c),
    "div": ("ttt", lambda a, b: (a - np.fmod(a, b)) // b), "rem": ("ttt", np.fmod), "neg": ("tt", np.negative),
    "abs": ("tt", np.abs), "and": ("ttt", np.bitwise_and), "or": ("ttt", np.bitwise_or), "xor": ("ttt", np.bitwise_xor),
    "not": ("tt", np.invert), "shl": ("ttu", shift_left), "shr": ("ttu", shift_right), "brev": ("tt", reverse_bits),
    "popc": ("ut", lambda a: bits_of(a).sum(1)), "clz": ("ut", leading_zeros), "bfind": ("ut", find_highest),
    "bfind.shiftamt": ("ut", find_shift), "bfi": ("tttuu", insert_field), "prmt": ("tttu", permute),
}  # fmt: skip


def narrow(exact: Array, dtype: np.dtype, mode: str) -> Array:
    """Round to dtype: "rn" to nearest even, "rz" to zero, "rm" down, "rp" up."""
    near = exact.astype(dtype)
    if mode in ("rm", "rz"):
        near = np.where((near > exact) & ((exact > 0) | (mode == "rm")), np.nextafter(near, dtype.type(-np.inf)), near)
    if mode in ("rp", "rz"):
        near = np.where((near < exact) & ((exact < 0) | (mode == "rp")), np.nextafter(near, dtype.type(np.inf)), near)
    return near


def flush(value: Array) -> Array:
    """.ftz: zeros with the same sign for subnormal numbers in four bytes."""
    return value * (np.abs(value) >= TINY) if value.itemsize == 4 else value


def finished(made: Instruction, function: Function) -> Function:
    """A function with .ftz and .sat around it."""
    ftz, sat = (mod in made.mods for mod in ("ftz", "sat"))

    def run(*values: Array) -> Array:
        value = flush(function(*map(flush, values))) if ftz else function(*values)
        return np.clip(np.nan_to_num(value), 0, 1) if sat else value

    return run if ftz or sat else function


def extreme(made: Instruction) -> Function:
    """min and max: a NaN loses unless .NaN is given, and -0 is less than +0."""
    propagates, join = {"min": (np.minimum, np.bitwise_or), "max": (np.maximum, np.bitwise_and)}[made.op]
    function = propagates if "NaN" in made.mods else FLOAT[made.op]

    def run(a: Array, b: Array) -> Array:
        bits = [value.view(UNSIGNED[value.itemsize * 8]) for value in (a, b)]
        return np.where(a == b, join(*bits).view(a.dtype), function(a, b))  # equal ones differ in the sign of zero only

    return run


def float_function(made: Instruction, type_: Type) -> Function:
    """The function of a floating-point instruction, with its rounding mode."""
    mode, function = rounding(made), FLOAT[made.op]
    if made.op in ("min", "max"):
        return extreme(made)
    if made.op in EXACT and mode == "rn":
        return function
    wide = np.longdouble if type_.bits == 64 else np.float64
    return lambda *values: narrow(function(*values, dtype=wide), type_.dtype, mode)


def rounding(made: Instruction) -> str:
    return next((mod for mod in made.mods if mod in ROUNDINGS or mod in TO_INTEGER), "rn")


def compute(made: Instruction) -> None:
    """An instruction that computes a number from others."""
    type_ = made.types[-1]
    if type_.kind == "float" and made.op in FLOAT:
        pure(made, type_, [type_] * (len(made.operands) - 1), finished(made, float_function(made, type_)))
        return
    name = ".".join([made.op, *(mod for mod in made.mods if mod not in TYPES)])
    if name not in INTEGER or type_.kind not in ("int", "pred"):
        raise PTXError(f"there is no {name} of .{type_.name}")
    letters, function = INTEGER[name]
    kinds = {"t": type_, "u": U32, "w": TYPES.get(f"{type_.name[0]}{type_.bits * 2}", type_)}
    result, *sources = (kinds[letter] for letter in letters)
    pure(made, result, sources, function)


def dot_product(made: Instruction) -> None:
    """dp4a: c plus the dot product of four bytes."""
    first, second = (f"{type_.dtype.kind}1" for type_ in made.types)
    result = TYPES["s32" if "i1" in (first, second) else "u32"]

    def run(a: Array, b: Array, c: Array) -> Array:
        return c + (split(a, first).astype(np.int64) * split(b, second)).sum(1)

    pure(made, result, [U32, U32, result], run)


def compare(made: Instruction) -> None:
    """setp."""
    type_, function = made.types[-1], COMPARE[made.mods[0]]
    if type_.lanes > 1:
        raise PTXError("comparisons of packed numbers are not supported")
    flushed = "ftz" in made.mods
    pure(made, PRED, [type_, type_], (lambda a, b: function(flush(a), flush(b))) if flushed else function)


def converter(made: Instruction, result: Type, source: Type) -> Function:
    """The function of cvt between two types.  Integers that are out of range become the limit, NaN becomes 0."""
    mode = rounding(made)
    if result.kind == "bf16" and mode != "rn":
        raise PTXError(f"cvt.{mode} to bfloat16 is not supported")
    wide = np.longdouble if 64 in (result.bits, source.bits) else np.float64
    if result.kind == "int":
        limits = [np.iinfo(type_.dtype) for type_ in (result, source) if type_.kind == "int"]
        low, high = max(limit.min for limit in limits), min(limit.max for limit in limits)
        if source.kind == "int":
            return lambda a: (np.clip(a, low, high) if "sat" in made.mods else a).astype(result.dtype)
        whole, bounds = TO_INTEGER[mode], (wide(low), wide(high))
        return lambda a: np.clip(np.nan_to_num(whole(a.astype(wide))), *bounds).astype(result.dtype)
    if source.kind == "int":
        return lambda a: narrow(a.astype(wide), result.dtype, mode)
    return finished(made, lambda a: narrow(TO_INTEGER[mode](a) if mode in TO_INTEGER else a, result.dtype, mode))


def convert(made: Instruction) -> None:
    """cvt: between any two types; to a packed pair from two numbers, the first of which becomes the upper half."""
    result, source = made.types
    one = converter(made, result, source)
    if result.lanes == 1:
        pure(made, result, [source], one)
    else:
        pure(made, result, [source, source], lambda a, b: np.stack(np.broadcast_arrays(one(b), one(a)), axis=-1))


MAKERS = dict.fromkeys(
    {*FLOAT, *(name.split(".")[0] for name in INTEGER)},
    (compute, "rn rz rm rp ftz sat approx full NaN lo hi wide shiftamt"),
) | {
    "dp4a": (dot_product, ""),
    "setp": (compare, f"ftz {' '.join(COMPARE)}"),
    "cvt": (convert, f"ftz sat {' '.join([*ROUNDINGS, *TO_INTEGER])}"),
}
