"""Floating-point instructions, comparisons and conversions.

Rounding is exact where PTX says so, with these exceptions: fma in float32 is computed in float64 and rounded once more
(the product is exact, the sum nearly always), and likewise fma in float64 in NumPy's longdouble; bfloat16 is computed
in float64 and rounded by way of float32.  The .approx functions are computed in float64 and rounded, so they are
better here than on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx_emulator.parser import Instruction, PTXError, Vec
from tests.ptx_emulator.values import PRED, TYPES, Array, Machine, Type, pure, reader, writer

Function = Callable[..., Array]
EXACT: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt}
WIDE: dict[str, Function] = {
    "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c, "rcp": np.reciprocal,
    "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2,
}  # fmt: skip
ROUNDINGS = ("rn", "rz", "rm", "rp")
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def narrow(exact: Array, dtype: np.dtype, mode: str) -> Array:
    """Round to dtype: "rn" to nearest even, "rz" to zero, "rm" down, "rp" up."""
    near = exact.astype(dtype)
    if mode in ("rm", "rz"):
        near = np.where((near > exact) & ((exact > 0) | (mode == "rm")), np.nextafter(near, dtype.type(-np.inf)), near)
    if mode in ("rp", "rz"):
        near = np.where((near < exact) & ((exact < 0) | (mode == "rp")), np.nextafter(near, dtype.type(np.inf)), near)
    return near


def finished(made: Instruction, function: Function) -> Function:
    """A function with .ftz, .sat and .relu around it."""
    ftz, sat, relu = (mod in made.mods for mod in ("ftz", "sat", "relu"))

    def flush(value: Array) -> Array:
        small = np.abs(value) < np.finfo(np.float32).tiny
        return np.where(small, np.copysign(np.float32(0), value), value) if value.dtype == np.float32 else value

    def run(*values: Array) -> Array:
        value = flush(function(*(flush(value) for value in values))) if ftz else function(*values)
        if sat:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        return np.where(value < 0, 0, value).astype(value.dtype) if relu else value

    return run if ftz or sat or relu else function


def extreme(made: Instruction) -> Function:
    """min and max: a NaN loses unless .NaN is given, and -0 is less than +0."""
    smaller = made.op == "min"
    functions = (np.minimum, np.fmin) if smaller else (np.maximum, np.fmax)
    function = functions["NaN" not in made.mods]
    return lambda a, b: np.where((a == b) & (np.signbit(a) == smaller), a, np.where(a == b, b, function(a, b)))


def rounded(made: Instruction, type_: Type) -> Function:
    """The function of an arithmetic instruction, with its rounding mode."""
    mode = next((mod for mod in made.mods if mod in ROUNDINGS), "rn")
    if made.op in ("min", "max"):
        return extreme(made)
    if made.op in ("neg", "abs"):
        return np.negative if made.op == "neg" else np.abs
    if made.op in EXACT and mode == "rn" and type_.kind == "float":
        return EXACT[made.op]
    function = EXACT.get(made.op) or WIDE[made.op]
    wide = np.longdouble if type_.dtype == np.float64 else np.float64
    return lambda *values: narrow(function(*(value.astype(wide) for value in values)), type_.dtype, mode)


def compare(made: Instruction, type_: Type) -> Function:
    """The comparison of setp."""
    name = next(mod for mod in made.mods if mod in COMPARE)
    if type_.lanes > 1:
        raise PTXError("comparisons of packed numbers are not supported")
    function = COMPARE[name]
    if "ftz" not in made.mods:
        return function
    flush = finished(made, lambda a: a)
    return lambda a, b: function(flush(a), flush(b))


def set_predicate(made: Instruction) -> None:
    """setp p|q, a, b, c: p = (a cmp b) op c, q = not (a cmp b) op c."""
    type_, result = TYPES[made.types[-1]], made.operands[0]
    test = compare(made, type_)
    put = [writer(item, PRED) for item in (result.items if isinstance(result, Vec) else [result])]
    a, b = (reader(operand, type_) for operand in made.operands[1:3])
    join = next((JOIN[mod] for mod in made.mods if mod in JOIN), None)
    third = reader(made.operands[3], PRED) if join else None

    def run(machine: Machine) -> None:
        holds = test(a(machine), b(machine))
        results = [holds, ~holds]
        if join and third:
            other = third(machine)  # read before the results are written, which may go to its register
            results = [join(one, other) for one in results]
        for one, values in zip(put, results, strict=False):
            one(machine, values)

    made.run = run


def to_integer(values: Array, type_: Type, function: Function) -> Array:
    """Round floats to an integer type; what is out of range becomes its limit, NaN becomes 0."""
    limits, whole = np.iinfo(type_.dtype), function(values.astype(np.float64))
    high, low = whole >= float(limits.max), whole < float(limits.min)
    result = np.where(high | low | np.isnan(whole), 0.0, whole).astype(type_.dtype)
    result[high], result[low] = limits.max, limits.min
    return result


def converter(made: Instruction, result: Type, source: Type) -> Function:
    """The function of cvt between two types."""
    mode = next((mod for mod in made.mods if mod in ROUNDINGS), "rn")
    integral = next((TO_INTEGER[mod] for mod in made.mods if mod in TO_INTEGER), None)
    if result.kind == "bf16" and mode != "rn":
        raise PTXError(f"cvt.{mode} to bfloat16 is not supported")
    if result.kind == "int" and source.kind == "int":
        limits = np.iinfo(result.dtype)
        own = np.iinfo(source.dtype)
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return lambda a: (np.clip(a, low, high) if "sat" in made.mods else a).astype(result.dtype)
    if result.kind == "int":
        return lambda a: to_integer(a, result, integral or np.trunc)
    if source.kind == "int":
        wide = np.float64 if source.bits < 64 else np.longdouble
        return lambda a: narrow(a.astype(wide), result.dtype, mode)
    return finished(made, lambda a: integral(a).astype(result.dtype) if integral else narrow(a, result.dtype, mode))


def convert(made: Instruction) -> None:
    """cvt: between any two types; to a packed pair from two numbers, the first of which becomes the upper half."""
    if len(made.types) != 2 or "satfinite" in made.mods:
        raise PTXError("this form of cvt is not supported")
    result, source = (TYPES[name] for name in made.types)
    one = converter(made, result, source)
    if result.lanes == 1:
        pure(made, result, [source], one)
    else:
        pure(made, result, [source, source], lambda a, b: np.stack(np.broadcast_arrays(one(b), one(a)), axis=-1))


def decode(made: Instruction) -> bool:
    """Decode a floating-point instruction, a comparison or a conversion; False if it is none."""
    makers = {"setp": set_predicate, "cvt": convert}
    if made.op in makers:
        makers[made.op](made)
        return True
    type_ = TYPES[made.types[-1]] if made.types else PRED
    if type_.kind not in ("float", "bf16"):
        return False
    if made.op in EXACT or made.op in WIDE or made.op in ("min", "max", "neg", "abs"):
        pure(made, type_, [type_] * (len(made.operands) - 1), finished(made, rounded(made, type_)))
    else:
        return False
    return True
