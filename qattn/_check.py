"""Checks of arguments, with one wording: what came, what was needed.

They run where a caller's arrays come in, before any work; kernels assume that they passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def shape(name: str, array: Any, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `array` has the expected shape; a word in it stands for any length.

    >>> shape("x", np.ones((4, 575)), ("tokens", 576))
    Traceback (most recent call last):
    ValueError: x has shape (4, 575); expected (tokens, 576)
    """
    came = tuple(array.shape)
    fits = len(came) == len(expected) and all(
        isinstance(want, str) or length == want for length, want in zip(came, expected, strict=True)
    )
    if not fits:
        words = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} has shape {came}; expected ({words})")


def dtype(name: str, array: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless the dtype of `array` is one of those allowed."""
    names = [np.dtype(want).name for want in allowed]
    if array.dtype.name not in names:
        raise ValueError(f"{name} has dtype {array.dtype.name}; expected {' or '.join(names)}")


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of those allowed."""
    options = list(allowed)
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, options))}")


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless the integer `value` reaches the minimum (TypeError if it is no integer)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < minimum:
        raise ValueError(f"{name} is {value}; expected at least {minimum}")


def number(name: str, value: Any, least: float | None = None) -> None:
    """Raise ValueError unless `value` is a number that float32 has room for, and reaches `least`."""
    size: Any = abs(value) if isinstance(value, (int, float, np.integer)) else math.nan
    if isinstance(value, np.floating):
        size = abs(float(value))
    if not (size == 0 or _TINY <= size <= _HUGE) or (least is not None and value < least):
        more = "" if least is None else f", {least} or more"
        raise ValueError(f"{name} is {value!r}; expected a finite number{more}, as float32 has them")


_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


MAX_POSITION = (1 << 24) - 1  # of a token: no context is longer, and tables of angles have a row for each


def positions(name: str, array: Any) -> None:
    """Raise ValueError unless a NumPy array holds positions: integers from 0 to `MAX_POSITION`."""
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{name} have dtype {array.dtype}; expected integers")
    low, high = array.min(initial=0), array.max(initial=0)
    if low < 0 or high > MAX_POSITION:
        worst = _first(name, array, array == (low if low < 0 else high))
        raise ValueError(f"{worst}; a position is at least 0, and at most {MAX_POSITION}")


def is_real(array: Any) -> bool:
    """Whether an array holds real numbers."""
    return array.dtype.kind in "fiub"


def finite(name: str, array: Any) -> None:
    """Raise ValueError if a NumPy array of floats holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise ValueError(f"{_first(name, array, ~np.isfinite(array))}; attention needs finite numbers")


def scores(name: str, array: Any) -> None:
    """Raise ValueError if a NumPy array of what is added to scores holds NaN, or what float32 has as infinity."""
    wrong = ~(array <= np.float64(_HUGE))
    if wrong.any():
        reason = "scores need finite numbers, or -inf for keys that are not seen"
        raise ValueError(f"{_first(name, array, wrong)}; {reason}")


def _first(name: str, array: Any, wrong: Any) -> str:
    """The first element of a NumPy array that is wrong: ``x[3, 7] is nan``; ``x are -1`` for a single number."""
    where = tuple(np.argwhere(wrong)[0].tolist())
    return f"{name}[{', '.join(map(str, where))}] is {array[where]}" if where else f"{name} are {array}"
