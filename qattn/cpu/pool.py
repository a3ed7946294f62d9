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

# What stands on a desk: how it is with the helper, whether there is one, the addresses and sizes of the arrays, and how
# it was before the offer.  A helper that was idle for long sleeps until it is called and its bell rings; then it looks
# out for longer.  An offer that is withdrawn leaves one that was asleep asleep, for all that is known: if it is awake,
# it is idle.  To ring once more does no harm, nor to hire for a desk that is taken, and whoever was not woken is still
# asleep or called: so an interrupt of Python, which may come anywhere but in compiled code, leaves nothing half done.
_STATE, _OWNED, _CALLS, _COUNT, _SHARED, _THREADS, _BEFORE = range(7)
_IDLE, _ASLEEP, _CALLED, _OFFERED, _TAKEN, _LEAVING = range(6)
_ROW = 16  # int64 of a desk: no two are written in one cache line
CALL = 5  # int64 of a call: see `qattn.cpu.kernel`
LINE = 8  # int64 in a cache line, which two counters had better not share
_LOOKS = 1 << 16  # before a helper sleeps: a millisecond or two, longer than Python takes between two tokens
_PATIENCE = 1 << 22  # before one that was called does: who has called it may have to wait for a core


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
        count = max(1, numba.config.NUMBA_NUM_THREADS - 1)
        self._desks = np.zeros((count, _ROW), np.int64)
        self._bells = [threading.Lock() for _ in range(count)]
        for bell in self._bells:
            bell.acquire()
        self._helpers: dict[int, threading.Thread] = {}

    def run(self, calls: np.ndarray, state: np.ndarray) -> bool:
        """Do the work with as many threads as `state` has room for → False, and nothing, if another is being helped."""
        desks = self._desks[: state.shape[1] - 2]
        for i, (now, owned) in enumerate(desks[:, : _OWNED + 1].tolist()):
            if not owned:
                self._hire(i)
            elif now in (_ASLEEP, _CALLED):
                _call(desks[i])
                _ring(self._bells[i])
        return bool(self._lead(self._gate, desks, calls, state, 0))

    def _hire(self, number: int) -> None:
        desk, bell, helpers, serve = self._desks[number], self._bells[number], self._helpers, self._serve
        if not helpers:
            self._prepare()

        def help_out() -> None:
            if _own(desk):
                helpers[number] = threading.current_thread()
                while serve(desk, number + 1):
                    bell.acquire()

        with contextlib.suppress(RuntimeError):  # where the system allows no more threads, there is less help
            threading.Thread(target=help_out, name=f"qattn-{number + 1}", daemon=True).start()

    def _prepare(self) -> None:
        """Compile what helpers run, so that none comes late, and what calls them, so that none sleeps by then."""
        nobodys, closed = np.full(_ROW, _LEAVING), np.ones(LINE, np.int64)
        if not _own(nobodys) and not _call(nobodys):
            self._serve(nobodys, 0)
        self._lead(closed, self._desks[:0], np.empty((0, CALL), np.int64), np.zeros((1, 2, LINE), np.int64), 0)

    def _dismiss(self) -> None:
        """Let helpers end before the process does, and with it what they run.  From then on there is no help."""
        if self._helpers:
            _close(self._gate)
        for number, helper in list(self._helpers.items()):  # one may just be coming
            _leave(self._desks[number])
            _ring(self._bells[number])
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
def _own(desk):
    """Make a desk one's own → whether it was nobody's."""
    return exchange(desk[_OWNED:], 0, 1)


@compiled(_nrt=False)
def _call(desk):
    """Tell a helper that sleeps that there will be an offer → whether it did."""
    return exchange(desk, _ASLEEP, _CALLED)


@compiled(_nrt=False)
def _close(gate):
    """Wait until there is no work, and let none begin."""
    while not exchange(gate, 0, 1):
        pause()


@compiled(_nrt=False)
def _leave(desk):
    """Tell a helper, which has no work, that there will be no more."""
    while not (
        exchange(desk, _IDLE, _LEAVING) or exchange(desk, _ASLEEP, _LEAVING) or exchange(desk, _CALLED, _LEAVING)
    ):
        pause()


def _compiled(work: Callable[..., None]) -> tuple[Any, Any]:
    """The loops of a helper, and of a thread that has work."""

    @compiled(_nrt=False)
    def serve(desk, me):
        """Do what is offered → whether to sleep, after a while without work, or to leave."""
        looks = 0
        while True:
            state = read(desk)
            if state == _OFFERED and exchange(desk, _OFFERED, _TAKEN):
                calls = _array_at(desk[_CALLS], (desk[_COUNT], CALL))
                work(calls, _array_at(desk[_SHARED], (desk[_COUNT] + 1, desk[_THREADS], LINE)), me)
                write(desk, _IDLE)
                looks = 0
            elif state == _ASLEEP:  # the offer was withdrawn
                if exchange(desk, _ASLEEP, _IDLE):
                    looks = 0
            elif state == _LEAVING:
                return False
            elif (looks >= _LOOKS and exchange(desk, _IDLE, _ASLEEP)) or (
                looks >= _PATIENCE and exchange(desk, _CALLED, _ASLEEP)
            ):
                return True
            pause()
            looks += 1

    @compiled(_nrt=False)
    def lead(gate, desks, calls, state, me):
        """Offer the work and do it, and come back when no helper is at it any more → False if the gate is closed.

        `me` is 0; the literal would have a type of its own, and all the work be compiled for it once more.
        """
        if not exchange(gate, 0, 1):
            return False
        for i in range(desks.shape[0]):
            desk = desks[i]
            desk[_CALLS], desk[_COUNT] = calls.ctypes.data, calls.shape[0]
            desk[_SHARED], desk[_THREADS] = state.ctypes.data, state.shape[1]
            desk[_BEFORE] = _ASLEEP
            if exchange(desk, _CALLED, _OFFERED) or exchange(desk, _ASLEEP, _OFFERED):
                continue
            desk[_BEFORE] = _IDLE
            _ = exchange(desk, _IDLE, _OFFERED)
        work(calls, state, me)
        for i in range(desks.shape[0]):
            if not exchange(desks[i], _OFFERED, desks[i, _BEFORE]):
                while read(desks[i]) == _TAKEN:
                    pause()
        write(gate, 0)
        return True

    return serve, lead
