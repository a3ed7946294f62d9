"""The part of CuPy that qattn uses, over NumPy and the PTX emulator: it runs the very code that launches on a GPU.

A test takes the fixture `cupy`, which puts this module in the place of CuPy.  Arrays are a subclass of NumPy's,
so that mixing them up with host arrays can be noticed: a kernel refuses a host array, as CuPy does.
"""

from __future__ import annotations

import functools
import time
import types
from typing import Any

import numpy as np

from tests.ptx_emulator import Module


class ndarray(np.ndarray):
    """An array on the emulated device."""

    def get(self) -> np.ndarray:
        return np.array(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        start = self
        while isinstance(start.base, np.ndarray):  # the emulator aligns what it is given; here only views are off
            start = start.base
        return {"data": (self.ctypes.data - start.ctypes.data, False), "shape": self.shape, "typestr": self.dtype.str}

    @property
    def device(self) -> Any:
        return Device()


def asarray(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    """Copy to the device; a device array of that type stays what it is."""
    if isinstance(x, ndarray) and (dtype is None or x.dtype == dtype):
        return x
    return np.array(x, dtype).view(ndarray)


array = asarray


def asnumpy(x: Any) -> np.ndarray:
    return np.array(x)


class Device:
    """The only device."""

    compute_capability = "80"

    def __init__(self, id: int = 0) -> None:
        if id != 0:
            raise runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.id = id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Stream:
    """A stream whose launches can be captured."""

    captured: list[Any] | None = None

    def __init__(self, **_: Any) -> None:
        self._before: Any = None

    def __enter__(self) -> Stream:
        global _stream
        self._before, _stream = _stream, self
        return self

    def __exit__(self, *_: Any) -> None:
        global _stream
        _stream = self._before

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> Graph:
        launches, self.captured = self.captured or [], None
        return Graph(launches)

    def synchronize(self) -> None:
        if self.captured is not None:
            raise runtime.CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a capture can't wait")


class Event:
    """A moment."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class Graph:
    """Captured launches."""

    def __init__(self, launches: list[Any]) -> None:
        self._launches = launches

    def launch(self, stream: Any = None) -> None:
        for run in self._launches:
            run()

    def upload(self, stream: Any = None) -> None:
        pass


_stream = Stream()


def copyto(target: ndarray, source: ndarray) -> None:
    target[...] = source


class RawModule:
    """Compiled code; here PTX, which the emulator runs."""

    def __init__(self, path: str) -> None:
        self._module = _module(path)

    def get_function(self, name: str) -> Function:
        return Function(self._module, name)


@functools.cache
def _module(path: str) -> Module:
    with open(path) as file:
        return Module(file.read())


class Function:
    """A kernel of a module."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, module: Module, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        for argument in args:
            if not isinstance(argument, (ndarray, np.generic)):
                raise TypeError(f"Unsupported type {type(argument)}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise runtime.CUDARuntimeError("cudaErrorInvalidValue: more dynamic shared memory than allowed")
        # an empty array is a pointer that nobody may follow; a number for a pointer is an address
        given = [
            (a.view(np.ndarray) if a.size else None) if isinstance(a, ndarray) else None if a.dtype == np.uint64 else a
            for a in args
        ]
        run = functools.partial(self._module.launch, self._name, grid, block, given, shared_mem)
        if _stream.captured is None:
            run()
        else:
            _stream.captured.append(run)


runtime = types.SimpleNamespace(
    getDeviceCount=lambda: 1, CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {})
)
cuda = types.SimpleNamespace(
    Event=Event,
    get_elapsed_time=lambda start, end: 1e3 * (end.time - start.time),
    Device=Device,
    Stream=Stream,
    Graph=Graph,
    runtime=runtime,
    get_current_stream=lambda: _stream,
    is_available=lambda: True,
)


def __getattr__(name: str) -> Any:
    """NumPy's functions, returning device arrays."""
    function = getattr(np, name)
    if isinstance(function, type) or not callable(function):
        return function

    @functools.wraps(function)
    def on_device(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result.view(ndarray) if isinstance(result, np.ndarray) else result

    return on_device
