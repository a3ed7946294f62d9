"""Which of several ways to do the same is the fastest: measured on each GPU, for each size, once in a process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from qattn.cuda.kernel import recording

_known: dict[Hashable, str] = {}
_ROUNDS = 5


def run_fastest(key: Hashable, ways: Mapping[str, Callable[[], None]]) -> None:
    """Do what is to be done in the way that was the fastest when this key was first seen on the current GPU.

    Measuring, unlike all else, waits for what the current stream has to do.  While a stream is captured there is
    nothing to be measured, and libraries can't be called: the first way is taken.  It also is where memory is short.
    """
    import cupy

    first = next(iter(ways))
    if recording.kept is not None or cupy.cuda.get_current_stream().is_capturing():
        ways[first]()
        return
    key = cupy.__name__, cupy.cuda.Device().id, key
    if key not in _known:
        times = {name: _milliseconds(cupy, way) for name, way in ways.items()}
        _known.setdefault(key, min(times, key=times.__getitem__))  # what another thread has found first, counts
    try:
        ways[_known[key]]()
    except cupy.cuda.memory.OutOfMemoryError:
        if _known[key] == first:
            raise
        _known[key] = first
        ways[first]()


def _milliseconds(cupy: Any, way: Callable[[], None]) -> float:
    """The median time that it takes, infinite if memory is short."""
    try:
        way()  # loads kernels and libraries, and lets memory be reserved
    except cupy.cuda.memory.OutOfMemoryError:
        return math.inf
    times = []
    for _ in range(_ROUNDS):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        way()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times)
