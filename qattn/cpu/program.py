"""Record the kernel calls of a step once, and replay them without Python in between.

While a `Program` is being recorded, each kernel runs as usual and its machine code and arguments are kept too::

    program = Program()
    with program.recording():
        step(x, out)                           # any Python code that calls kernels
    x[...] = another                           # the same arrays, other content
    program.replay()                           # one call, whatever the number of kernels

Calling a kernel from Python takes some microseconds, most of them to look at its arguments.  Here they are stored in
memory the way machine code wants them, beside the address of a *thunk*: compiled code that loads arguments of the
kernel's types and calls it.  A replay walks over pairs of addresses.  Kernels see the arrays' contents at the time of
the replay; sizes, addresses and numbers are those of the recording, and what kernels return is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.core.types.containers import BaseTuple
from numba.extending import intrinsic

from qattn.cpu import _jit
from qattn.cpu._jit import Kernel, kernel


class Program:
    """A sequence of kernel calls.  It keeps the arrays alive that they work on."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int]] = []
        self._kept: list[Any] = []
        self._table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Append the kernel calls of this thread to the program."""
        before, _jit.recorder.append_call = _jit.recorder.append_call, self._append
        try:
            yield
        finally:
            _jit.recorder.append_call = before

    def _append(self, called: Kernel, args: tuple[Any, ...]) -> None:
        signature = tuple(map(numba.typeof, args))
        address, size, store = _thunk(called, signature)
        memory = np.zeros(size, np.uint8)
        store(memory.ctypes.data, args)
        self._kept.append((memory, args))
        self._calls.append((address, memory.ctypes.data))
        self._table = None

    def replay(self) -> None:
        """Run the kernels in the order of their recording."""
        if self._table is None:
            self._table = np.array(self._calls, np.int64).reshape(-1, 2)
        _run(self._table)


@functools.cache
def _thunk(called: Kernel, signature: tuple[types.Type, ...]) -> tuple[int, int, Any]:
    """The address of a kernel's thunk, the bytes that its arguments take, and the function that stores them."""
    arguments = BaseTuple.from_types(signature)
    load, save, function = _loader(arguments), _saver(arguments), called.function
    name = f"{called.name}-{hashlib.sha256(repr(signature).encode()).hexdigest()[:12]}"

    @kernel(name)
    def thunk(address):  # type: ignore[no-untyped-def]
        function(*load(address))

    @kernel(name)
    def store(address, values):  # type: ignore[no-untyped-def]
        save(address, values)

    thunk.function.compile((types.int64,))
    compiled = thunk.function.overloads[(types.int64,)]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    context = cpu_target.target_context
    return address, context.get_abi_sizeof(context.get_value_type(arguments)), store.function


def _loader(type_: types.Type) -> Any:
    """An intrinsic that reads a value of a type from an address."""

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(context, builder, type_, args[0]))

        return type_(types.int64), codegen

    return load


def _saver(type_: types.Type) -> Any:
    """An intrinsic that writes a value of a type to an address."""

    @intrinsic
    def save(typing_context: Any, address: Any, values: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = _without_owners(context, builder, type_, args[1])
            builder.store(value, _pointer(context, builder, type_, args[0]))
            return context.get_dummy_value()

        return types.void(types.int64, type_), codegen

    return save


def _pointer(context: Any, builder: ir.IRBuilder, type_: types.Type, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, context.get_value_type(type_).as_pointer())


def _without_owners(context: Any, builder: ir.IRBuilder, type_: types.Type, value: ir.Value) -> ir.Value:
    """The value with its arrays owning nothing: the references of a call end with it."""
    if isinstance(type_, types.Array):
        array = context.make_array(type_)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(type_, BaseTuple):
        for i, item in enumerate(type_.types):
            bare = _without_owners(context, builder, item, builder.extract_value(value, i))
            value = builder.insert_value(value, bare, i)
    return value


@intrinsic
def _call(typing_context: Any, address: Any, argument: Any) -> Any:
    """Call the compiled function at an address with an address; an error in it is raised here."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        convention = context.call_conv
        function_type = convention.get_function_type(types.none, (types.int64,))
        function = builder.inttoptr(args[0], function_type.as_pointer())
        status, _ = convention.call_function(builder, function, types.none, (types.int64,), [args[1]])
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@kernel()
def _run(table):  # type: ignore[no-untyped-def]
    for i in range(table.shape[0]):
        _call(table[i, 0], table[i, 1])
