"""How many threads the kernels use."""

from __future__ import annotations

import operator
import os

import numba


def _allowed() -> int:
    """Threads that this process may run at once: by affinity, its control group's quota, and ``NUMBA_NUM_THREADS``."""
    count: int = numba.config.NUMBA_NUM_THREADS
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()[:2]
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group, or one of another version
    return max(1, count)


def _initial() -> int:
    text = os.environ.get("QATTN_NUM_THREADS", "")
    if not text:
        return _allowed()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"QATTN_NUM_THREADS is {text!r}; expected a positive integer")
    return min(int(text), numba.config.NUMBA_NUM_THREADS)


_threads = 0


def get_num_threads() -> int:
    """Return the number of threads that kernels use.

    At first ``QATTN_NUM_THREADS``, else what the affinity mask and the control group allow.
    """
    global _threads
    if not _threads:
        _threads = _initial()
    return _threads


def set_num_threads(count: int) -> None:
    """Let kernels use this many threads, from 1 to ``NUMBA_NUM_THREADS``, which is the number of cores.

    Raises
    ------
    ValueError
        For any other number.
    """
    global _threads
    count = operator.index(count)
    if not 1 <= count <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(f"count is {count}; expected 1 to {numba.config.NUMBA_NUM_THREADS}")
    _threads = count
