"""Checks of arguments, with one wording: what came, what was needed.

They run where a caller's arrays come in, before any work; kernels assume that they passed.
"""

from __future__ import annotations

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
