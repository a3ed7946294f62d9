"""Kernels: functions whose work threads share, called one by one or recorded and replayed.

A kernel is a function with two last arguments, ``part`` and ``parts``: called for each part, in any order and by any
thread, it does all of the work, and a result never depends on who did what.  ::

    @kernel()
    def add(x, y, part, parts):
        for row in share(x.shape[0], part, parts):
            x[row] += y[row]

    add(x, y, parts=2)

Each thread has a share of the parts and takes them one after the other, then helps the others, and a kernel is over
when all its parts are.  So a thread that the system starts late, or interrupts for a while, holds up no more than the
part that it has taken.  Threads that wait ask memory for what the next kernel streams.

Calling a kernel from Python takes microseconds, and waking threads for it as many.  Where the same kernels follow each
other on the same arrays again and again, as for each token that a model writes, they are recorded once::

    program = Program()
    with program.recording():
        step(x, out)                           # any Python code that calls kernels, which run as usual
    x[...] = another                           # the same arrays, other content
    program.replay()                           # one call, whatever the number of kernels

A call is the address of a *thunk*, the kernel's code for arguments of certain types, which it loads from memory, and
the address of these, as machine code wants them.  Thunks are all that is compiled of a kernel and kept on disk, beside
small functions that write arguments of certain types and know the thunk for them.  A replay sees the arrays' contents
of its time; addresses, sizes and numbers are those of the recording.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from qattn.cpu._jit import compiled, compiling, generated, tell_environments
from qattn.cpu.atomics import add_one, pause, read
from qattn.cpu.pool import CALL, LINE, Pool
from qattn.cpu.threads import get_num_threads

_ROOM = 2048  # bytes for the arguments of a call


class Kernel:
    """A compiled function of ``(…, part, parts)``."""

    def __init__(self, function: Callable[..., None], key: str, kept: bool, stable: bool) -> None:
        self.name = "-".join(filter(None, (function.__module__.split(".")[-1], function.__name__, key)))
        self.thunks: dict[types.Type, Any] = {}
        """The compiled code for each tuple of arguments' types that there were."""
        self._body, self._kept = generated(key)(function), kept
        self._bind = compiled(self.name, kept and stable)(_bind)

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"

    def __call__(self, *args: Any, parts: int = 1, streams: np.ndarray | None = None) -> None:
        """Run.  `streams` is the array that the kernel reads from memory, if that is what takes its time."""
        program, room = _current.program, _current.room
        if program is not None or room is None:
            room = _new_room()
        else:
            _current.room = None  # a signal's handler may call kernels before this one has run
        there = room.address
        thunk = self._bind(there, 0, *args) or self._bind(there, self._compile(args), *args)
        if program is None and parts == 1:
            _run_part(thunk, there, 0, 1)
        else:
            begin, size = (0, 0) if streams is None else (streams.ctypes.data, streams.nbytes)
            call = np.array([[thunk, there, parts, begin, size]], np.int64)
            _run(call, min(parts, get_num_threads()))
        if program is not None:
            program.append(self, call, (room, args))
        else:
            _current.room = room

    def _compile(self, args: tuple[Any, ...]) -> int:
        """The address of the thunk for arguments of these types."""
        given = numba.typeof(args)
        with compiling:
            if given not in self.thunks:
                kept = f"{self.name}-{hashlib.sha256(str(given).encode()).hexdigest()[:12]}"
                thunk = compiled(kept, self._kept, no_cpython_wrapper=True)(_thunk(self._body, given))
                thunk.compile(_THUNK)
                tell_environments(thunk.overloads[_THUNK])
                self.thunks[given] = thunk
            made = self.thunks[given].overloads[_THUNK]
            return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


def kernel(key: str = "", *, kept: bool = True, stable: bool = True) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of a function.

    Parameters
    ----------
    key, kept
        What it was generated for, and whether it is kept on disk: see `compiled`.
    stable : bool
        Whether the classes of its arguments are the same in all processes.
    """
    return lambda function: Kernel(function, key, kept, stable)


@numba.njit
def share(count: int, part: int, parts: int) -> range:
    """The indices below `count` that a part has to do: as many as any other part, in one piece."""
    return range(count * part // parts, count * (part + 1) // parts)


class Program:
    """A sequence of kernel calls.  It keeps the arrays alive that they work on."""

    def __init__(self) -> None:
        self._calls = np.empty((0, CALL), np.int64)
        self._kept: list[Any] = []
        self.kernels: list[Kernel] = []

    def __len__(self) -> int:
        return len(self._calls)

    def only(self, kernel: Kernel) -> Program:
        """The calls of one kernel, to see what it takes."""
        chosen, part = [i for i, called in enumerate(self.kernels) if called is kernel], Program()
        part._calls, part._kept, part.kernels = self._calls[chosen], self._kept, [kernel] * len(chosen)
        return part

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Append the kernel calls of this thread to the program."""
        before, _current.program = _current.program, self
        try:
            yield
        finally:
            _current.program = before

    def append(self, called: Kernel, call: np.ndarray, kept: Any) -> None:
        """Add a bound call, (1, CALL) int64 of thunk, arguments, parts and what streams; `kept` must stay alive."""
        self._calls = np.concatenate([self._calls, call])
        self._kept.append(kept)
        self.kernels.append(called)

    def replay(self) -> None:
        """Run the kernels in the order of their recording."""
        _run(self._calls, get_num_threads())


def is_recording() -> bool:
    """Whether the kernel calls of this thread are being recorded."""
    return _current.program is not None


class _Room(NamedTuple):
    """Memory for the arguments of a call."""

    memory: np.ndarray
    address: int


def _new_room() -> _Room:
    memory = np.empty(_ROOM, np.uint8)
    return _Room(memory, memory.ctypes.data)


class _Current(threading.local):
    """What a thread records, and room for its next call."""

    program: Program | None = None
    room: _Room | None = None


_current = _Current()


# ------------------------------------------------------------------------------------------------------- threads


def _run(calls: np.ndarray, threads: int) -> None:
    state = np.zeros((1 + len(calls), 1 + threads, LINE), np.int64)
    if threads == 1 or not _pool.run(calls, state):
        _work(calls, state, 0)
    failed, i, part, _ = state[0, 0, :4].tolist()
    if failed:
        thunk, arguments, parts, *_ = calls[i].tolist()
        _run_part(thunk, arguments, part, parts)  # tells what is wrong, if a function that kernels were given raises it
        raise MemoryError("a kernel found no memory for its intermediate results")


@compiled(_nrt=False)
def _run_part(thunk, arguments, part, parts):
    """Do one part of a call in this thread, and raise what it raises."""
    _call_or_raise(thunk, arguments, part, parts)


@compiled(_nrt=False)
def _work(calls, state, me):
    """Take parts of one call after the other, until all are done.  What fails is noted in state[0].

    A thread begins with its own share of the parts, which follow each other, since memory is faster in long pieces;
    then it helps the others.
    """
    threads = state.shape[1] - 1
    for i in range(calls.shape[0]):
        done, parts = state[1 + i, threads], calls[i, 2]
        for other in range(threads):
            owner = (me + other) % threads
            theirs, taken = share(parts, owner, threads), state[1 + i, owner]
            while read(taken) < len(theirs):
                turn = add_one(taken)
                if turn >= len(theirs):
                    break
                if _call(calls[i, 0], calls[i, 1], theirs.start + turn, parts):
                    state[0, 0, 1], state[0, 0, 2], state[0, 0, 0] = i, theirs.start + turn, 1
                add_one(done)
        _wait(done, parts, calls[i + 1 :], me, threads)


@compiled(_nrt=False)
def _wait(done, parts, following, me, threads):
    """Wait until so many parts are done, and meanwhile ask memory for what this thread streams next."""
    asked, end = 0, 0
    for i in range(following.shape[0]):
        if following[i, 4]:
            asked = following[i, 3] + following[i, 4] // threads * me
            end = asked + min(following[i, 4] // threads, _EARLY)
            break
    while read(done) < parts:
        if asked < end:
            for line in range(0, 1024, 64):
                _prefetch(asked + line)
            asked += 1024
        else:
            pause()


_EARLY = 1 << 19  # bytes to ask for: they wait in a core's second-level cache


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        builder.call(function, [builder.inttoptr(args[0], pointer), *(ir.Constant(i32, i) for i in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_pool = Pool(_work)


# -------------------------------------------------------------------------------------------------------- thunks


def _thunk(body: Any, given: Any) -> Callable[..., None]:
    """A function of `_THUNK` that loads arguments of these types from an address, and is the body of a kernel."""
    load = _loader(given)

    def thunk(address, part, parts):
        body(*load(address), part, parts)

    return thunk


def _bind(address, thunk, *values):
    """Write arguments to an address → the address of the thunk for their types, once it was told; till then 0."""
    _save(address, values)
    return _told(thunk, values)


@intrinsic
def _told(typing_context: Any, thunk: Any, values: Any) -> Any:
    """What this was told last, 0 counting for nothing: a variable of the code that it is compiled into."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        variable = ir.GlobalVariable(builder.module, ir.IntType(64), builder.module.get_unique_name("thunk"))
        variable.linkage, variable.initializer = "internal", ir.Constant(ir.IntType(64), 0)
        told = builder.icmp_signed("!=", args[0], ir.Constant(ir.IntType(64), 0))
        with builder.if_then(told):
            builder.store(args[0], variable)
        return builder.load(variable)

    return types.int64(types.int64, values), codegen


_THUNK = (types.int64, types.int64, types.int64)


def _loader(type_: types.Type) -> Any:
    """An intrinsic that reads a value of a type from an address."""

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(context, builder, type_, args[0]))

        return type_(types.int64), codegen

    return load


@intrinsic
def _save(typing_context: Any, address: Any, values: Any) -> Any:
    """Write a tuple to an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if context.get_abi_sizeof(context.get_value_type(values)) > _ROOM:
            raise NotImplementedError(f"the arguments of a kernel take more than {_ROOM} bytes: {values}")
        bare = _without_owners(context, builder, values, args[1])
        builder.store(bare, _pointer(context, builder, values, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, values), codegen


def _pointer(context: Any, builder: ir.IRBuilder, type_: types.Type, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, context.get_value_type(type_).as_pointer())


def _without_owners(context: Any, builder: ir.IRBuilder, type_: types.Type, value: ir.Value) -> ir.Value:
    """The value with its arrays owning nothing: the references of a call end with it."""
    if isinstance(type_, types.Array):
        array = context.make_array(type_)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    for i, item in enumerate(getattr(type_, "types", ())):  # of a tuple
        bare = _without_owners(context, builder, item, builder.extract_value(value, i))
        value = builder.insert_value(value, bare, i)
    return value


def _called(context: Any, builder: ir.IRBuilder, args: Any) -> Any:
    """How a call of the thunk at an address ended."""
    function_type = context.call_conv.get_function_type(types.none, _THUNK)
    function = builder.inttoptr(args[0], function_type.as_pointer())
    status, _ = context.call_conv.call_function(builder, function, types.none, _THUNK, args[1:])
    return status


@intrinsic
def _call(typing_context: Any, address: Any, memory: Any, part: Any, parts: Any) -> Any:
    """Call the thunk at an address → whether it failed."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _called(context, builder, args).is_error

    return types.boolean(types.int64, *_THUNK), codegen


@intrinsic
def _call_or_raise(typing_context: Any, address: Any, memory: Any, part: Any, parts: Any) -> Any:
    """Call the thunk at an address, and raise what it raises."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        status = _called(context, builder, args)
        with builder.if_then(status.is_error, likely=False):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.int64, *_THUNK), codegen
