"""Memory for intermediate results that a thread uses again and again.

A new array of some megabytes is memory that the system first has to find and clear, page by page: at a prefill of 512
tokens that takes a tenth of the time.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
from numba.extending import register_jitable

from qattn.cpu.kernel import is_recording

_LIMIT = 1 << 26  # bytes that are kept for a purpose; more is given back after use


class _Kept(threading.local):
    """For each purpose memory, and its part from a cache line's first byte on."""

    def __init__(self) -> None:
        self.memory: dict[str, tuple[np.ndarray, np.ndarray]] = {}


_kept = _Kept()


@register_jitable  # type: ignore[misc]
def from_a_line_on(memory: np.ndarray) -> np.ndarray:
    """All but 63 of an array's bytes, from a cache line's first on: vectors that lie across two take twice as long."""
    first = -memory.ctypes.data % 64
    return memory[first : first + memory.size - 63]


@register_jitable  # type: ignore[misc]
def aligned(size: int) -> np.ndarray:
    """So many bytes, with any content, from a cache line's first on."""
    return from_a_line_on(np.empty(size + 63, np.uint8))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, from a cache line's first byte on."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return from_a_line_on(np.zeros(size + 63, np.uint8)).view(dtype).reshape(shape)


def scratch(purpose: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array with any content.  Its memory is used again when nothing refers to it any more.

    So a call that a signal's handler makes in the middle of another one gets its own.  While a `Program` is recorded
    it is a new one, which the program keeps.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if is_recording() or size > _LIMIT:
        return aligned(size).view(dtype).reshape(shape)
    kept = _kept.memory.get(purpose, _NOTHING)
    if kept[1].nbytes < size or _references(kept) > _UNUSED:
        kept = _kept.memory[purpose] = _made(size)
    return kept[1][:size].view(dtype).reshape(shape)


def _made(size: int) -> tuple[np.ndarray, np.ndarray]:
    memory = np.empty(size + 63, np.uint8)
    return memory, from_a_line_on(memory)


def _references(kept: tuple[np.ndarray, np.ndarray]) -> int:
    memory, _ = kept
    return sys.getrefcount(memory)


_NOTHING = _made(0)
_UNUSED = _references(_NOTHING)  # of memory that nobody has
