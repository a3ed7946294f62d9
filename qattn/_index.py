"""Indices of the axes before the last one: the part of NumPy's indexing that needs no dequantized values."""

from __future__ import annotations

from typing import Any

import numpy as np

_REMEDY = "dequantize first: np.asarray(w)[...]"


def row_keys(key: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return an index as a tuple, with its ellipsis written out and without full slices at its end.

    Raises
    ------
    IndexError
        The index reaches into the last axis, where weights share scales, or would add an axis.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    keys = [np.asarray(k, None if k else np.intp) if isinstance(k, (list, tuple)) else k for k in keys]
    if any(k is None or isinstance(k, (bool, np.bool_)) for k in keys):
        raise IndexError(f"index {key!r} would add an axis to quantized rows; {_REMEDY}")
    axes = [_axes(k) for k in keys]
    for place, k in enumerate(keys):
        if k is Ellipsis:
            free = max(len(shape) - sum(axes), 0)
            keys[place : place + 1] = [slice(None)] * free
            axes[place : place + 1] = [1] * free
            break
    while keys and isinstance(keys[-1], slice) and keys[-1] == slice(None):
        keys.pop()
        axes.pop()
    if sum(axes) >= len(shape):
        raise IndexError(f"index {key!r} reaches into the quantized last axis of shape {shape}; {_REMEDY}")
    return tuple(keys)


def check_bounds(keys: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    """Raise the IndexError that CuPy doesn't: it takes rows that are out of range modulo their number."""
    axis = 0
    for key in keys:
        if isinstance(key, np.ndarray) and key.dtype.kind in "iu" and key.size:
            for index in (int(key.min()), int(key.max())):
                if not -shape[axis] <= index < shape[axis]:
                    raise IndexError(f"index {index} is out of bounds for axis {axis} with size {shape[axis]}")
        axis += _axes(key)


def _axes(key: Any) -> int:
    """Return how many axes one piece of an index uses up."""
    if key is Ellipsis:
        return 0
    if isinstance(key, np.ndarray) and key.dtype == np.bool_:
        return key.ndim
    return 1


def as_slice(rows: np.ndarray[Any, Any]) -> slice:
    """Write evenly spaced rows, one at least, as a slice: it views where an array of rows copies."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    stop = int(rows[-1]) + step
    return slice(int(rows[0]), stop if stop >= 0 else None, step)
