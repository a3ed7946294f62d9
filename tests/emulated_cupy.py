"""The part of CuPy that qattn uses, over NumPy and the PTX emulator: it runs the very code that launches on a GPU.

A test takes the fixture `cupy`, which puts this module in the place of CuPy.  Arrays are a subclass of NumPy's,
so that mixing them up with host arrays can be noticed: a kernel refuses a host array, as CuPy does.
"""

from __future__ import annotations

import ctypes
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

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)


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

    def is_capturing(self) -> bool:
        return self.captured is not None

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


def _gemm_ex(
    handle: int, trans_a: int, trans_b: int, m: int, n: int, k: int, alpha: int,
    a: int, a_type: int, a_lead: int, b: int, b_type: int, b_lead: int, beta: int,
    c: int, c_type: int, c_lead: int, compute_type: int, algorithm: int,
) -> None:  # fmt: skip
    """C = alpha · op(A) @ op(B) + beta · C over matrices that lie column by column, as cuBLAS defines it."""
    if _stream.captured is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    assert (handle, a_type, b_type, c_type, compute_type) == (7, 14, 14, 0, 68)  # bfloat16, float32

    def matrix(at: int, element: Any, rows: int, columns: int, lead: int) -> np.ndarray:
        assert lead >= rows
        there = np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(element)), (columns, lead))
        return there[:, :rows].T

    def operand(at: int, transposed: int, rows: int, columns: int, lead: int) -> np.ndarray:
        stored = matrix(at, ctypes.c_uint16, *((columns, rows) if transposed else (rows, columns)), lead)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
        return values.T if transposed else values

    scale, keep = (ctypes.cast(at, ctypes.POINTER(ctypes.c_float))[0] for at in (alpha, beta))
    assert keep == 0
    matrix(c, ctypes.c_float, m, n, c_lead)[...] = scale * (
        operand(a, trans_a, m, k, a_lead) @ operand(b, trans_b, k, n, b_lead)
    )


cublas = types.SimpleNamespace(
    CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_COMPUTE_32F=68, CUBLAS_GEMM_DEFAULT=-1, gemmEx=_gemm_ex
)
runtime = types.SimpleNamespace(
    getDeviceCount=lambda: 1,
    CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
    CUDA_R_32F=0,
    CUDA_R_16BF=14,
)
cuda = types.SimpleNamespace(
    Event=Event,
    get_elapsed_time=lambda start, end: 1e3 * (end.time - start.time),
    Device=Device,
    device=types.SimpleNamespace(get_cublas_handle=lambda: 7),
    memory=types.SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {})),
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
