"""Threads that help with kernels.

A *helper* looks out for work for a moment, then sleeps.  A thread that has work offers it, does it as far as nobody
helps, and takes the offer back where no helper has begun.  So it never waits for a helper that the system doesn't let
run: a core that another program keeps busy costs that core's help and nothing else.  Threads of OpenMP all have to come
and go for each piece of work, which takes a time slice of the system where one of them must wait for its core.

Work is `work(calls, state, me)`: C-contiguous int64 arrays (n, CALL) and (n + 1, threads + 1, LINE), and the number of
a thread, of which 0 is the one that has the work.  What helpers and it tell each other stands on a *desk*, a row of
int64 for each helper.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from qattn.cpu._jit import compiled
from qattn.cpu.atomics import exchange, pause, read, write

# What stands on a desk: how it is with the helper, the addresses and sizes of the arrays, and how it was before the
# offer, which it is again if that is withdrawn.  A helper that was idle for long sleeps until its bell rings.  To ring
# once more does no harm, and whoever was not woken is still asleep: so an interrupt of Python, which may come anywhere
# but in compiled code, leaves nothing half done.
_STATE, _CALLS, _COUNT, _SHARED, _THREADS, _BEFORE = range(6)
_IDLE, _ASLEEP, _OFFERED, _TAKEN, _LEAVING = range(5)
_ROW = 16  # int64 of a desk: no two are written in one cache line
CALL = 5  # int64 of a call: see `qattn.cpu.kernel`
LINE = 8  # int64 in a cache line, which two counters had better not share
_LOOKS = 1 << 16  # before a helper sleeps: a millisecond or two, longer than Python takes between two tokens


class Pool:
    """Helpers for one njit function; they are started when there is first something to do for them."""

    def __init__(self, work: Callable[..., None]) -> None:
        self._serve, self._lead = _compiled(work)
        self._reset()
        atexit.register(self._dismiss)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin without helpers: those of a process are not its child's."""
        self._gate = np.zeros(LINE, np.int64)
        """1 while there is work that helpers are asked for."""
        self._hiring = threading.Lock()
        self._desks = np.zeros((max(1, numba.config.NUMBA_NUM_THREADS - 1), _ROW), np.int64)
        self._bells: list[threading.Lock] = []
        self._helpers: list[threading.Thread] = []

    def run(self, calls: np.ndarray, state: np.ndarray) -> bool:
        """Do the work with as many threads as `state` has room for → False, and nothing, if another is being helped."""
        desks = self._desks[: state.shape[1] - 2]
        if len(self._helpers) < len(desks):
            with self._hiring:
                while len(self._helpers) < len(desks):
                    self._hire()
        for i, now in enumerate(desks[:, _STATE].tolist()):
            if now == _ASLEEP:
                _ring(self._bells[i])
        return bool(self._lead(self._gate, desks, calls, state))

    def _hire(self) -> None:
        number, bell = len(self._helpers), threading.Lock()
        bell.acquire()
        if number == 0:
            self._serve(np.full(_ROW, _LEAVING), 0)  # compiled here, so that no helper comes late by that
        helper = threading.Thread(target=self._help, args=(number, bell), name=f"qattn-{number + 1}", daemon=True)
        self._bells.append(bell)
        self._helpers.append(helper)
        with contextlib.suppress(RuntimeError):  # where the system allows no more threads, there is less help
            helper.start()

    def _help(self, number: int, bell: threading.Lock) -> None:
        desk, serve = self._desks[number], self._serve
        while serve(desk, number + 1):
            bell.acquire()

    def _dismiss(self) -> None:
        """Let helpers end before the process does, and with it what they run.  From then on there is no help."""
        _close(self._gate)
        for desk, bell, helper in zip(self._desks, self._bells, self._helpers, strict=False):
            if helper.is_alive():
                _leave(desk)
                _ring(bell)
                helper.join()


def _ring(bell: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # it has been rung
        bell.release()


@intrinsic
def _array_at(typing_context: Any, address: Any, shape: Any) -> Any:
    """The C-contiguous int64 array of a shape at an address; it owns nothing."""
    array_type = types.Array(types.int64, len(shape), "C")

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        lengths = cgutils.unpack_tuple(builder, args[1])
        strides = [ir.Constant(ir.IntType(64), 8)]
        for length in lengths[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        array = context.make_array(array_type)(context, builder)
        data = builder.inttoptr(args[0], array.data.type)
        populate_array(array, data=data, shape=lengths, strides=strides, itemsize=8, meminfo=None)
        return array._getvalue()

    return array_type(types.int64, shape), codegen


@compiled(_nrt=False)
def _close(gate):  # type: ignore[no-untyped-def]
    """Wait until there is no work, and let none begin."""
    while not exchange(gate, 0, 1):
        pause()


@compiled(_nrt=False)
def _leave(desk):  # type: ignore[no-untyped-def]
    """Tell a helper, which has no work, that there will be no more."""
    while not (exchange(desk, _IDLE, _LEAVING) or exchange(desk, _ASLEEP, _LEAVING)):
        pause()


def _compiled(work: Callable[..., None]) -> tuple[Any, Any]:
    """The loops of a helper, and of a thread that has work."""

    @compiled(_nrt=False)
    def serve(desk, me):  # type: ignore[no-untyped-def]
        """Do what is offered → whether to sleep, after a while without work, or to leave."""
        looks = 0
        while True:
            state = read(desk)
            if state == _OFFERED and exchange(desk, _OFFERED, _TAKEN):
                calls = _array_at(desk[_CALLS], (desk[_COUNT], CALL))
                work(calls, _array_at(desk[_SHARED], (desk[_COUNT] + 1, desk[_THREADS], LINE)), me)
                write(desk, _IDLE)
                looks = 0
            elif state == _ASLEEP:  # called for an offer that was withdrawn
                _ = exchange(desk, _ASLEEP, _IDLE)
            elif state == _LEAVING:
                return False
            elif looks >= _LOOKS and exchange(desk, _IDLE, _ASLEEP):
                return True
            pause()
            looks += 1

    @compiled(_nrt=False)
    def lead(gate, desks, calls, state):  # type: ignore[no-untyped-def]
        """Offer the work and do it, and come back when no helper is at it any more → False if the gate is closed."""
        if not exchange(gate, 0, 1):
            return False
        for i in range(desks.shape[0]):
            desk = desks[i]
            desk[_CALLS], desk[_COUNT] = calls.ctypes.data, calls.shape[0]
            desk[_SHARED], desk[_THREADS] = state.ctypes.data, state.shape[1]
            for before in (_IDLE, _ASLEEP):
                if exchange(desk, before, _OFFERED):
                    desk[_BEFORE] = before
                    break
        work(calls, state, 0)
        for i in range(desks.shape[0]):
            if not exchange(desks[i], _OFFERED, desks[i, _BEFORE]):
                while read(desks[i]) == _TAKEN:
                    pause()
        write(gate, 0)
        return True

    return serve, lead
