"""Kernels: functions that Numba compiles to PTX, and CuPy loads and launches.

A kernel is written for one thread, with a signature of element types, a star for a pointer::

    @kernel("f32* f32* i32")
    def double(x, out, n):
        i = cuda.grid(1)
        if i < n:
            out[i] = x[i] + x[i]

    double(x, out, len(x), grid=4, block=256)

Arguments are CuPy arrays, numbers, and None for a null pointer.  Those that travel together are a named tuple, whose
class and element types a name in the signature stands for::

    @kernel("pair i32", pair=(Pair, "f32* f32*"))
    def swap(pair, n): ...

A launch goes to CuPy's current device and stream and waits for nothing.  PTX is made for compute capability 8.0, which
newer GPUs run too, so it needs no GPU to be made and is kept on disk.

What Numba makes of a kernel is good if loop counters are int32 and run in a ``while``, or in a ``range`` of constants,
which is unrolled; if indices of shared and local arrays are uint32 or constants; and if constants are float32.
Functions that kernels call are made by `device`, and become part of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda, types
from numba.cuda import dispatcher

from qattn import _cache
from qattn.devices import CAPABILITY

_TYPES = {
    "u8": types.uint8,
    "i8": types.int8,
    "u16": types.uint16,  # float16 and bfloat16 as well
    "i32": types.int32,
    "u32": types.uint32,
    "i64": types.int64,
    "f32": types.float32,
    "f64": types.float64,
}
_FREE_SHARED = 32 << 10  # bytes of dynamic shared memory that need no asking for, whatever a kernel has besides

Group = tuple[type, str]
"""The class of a named tuple, and its elements' types."""

device = functools.partial(cuda.jit, device=True, forceinline=True, fastmath=True)


class Kernel:
    """A function for one thread, compiled when it is first needed."""

    def __init__(self, function: Callable[..., None], signature: str, key: str, groups: Mapping[str, Group]) -> None:
        self.name = "_".join(filter(None, (function.__module__.split(".")[-1], function.__name__, key)))
        self._function, self._groups, self._arguments = function, groups, signature.split()
        self._lock = threading.Lock()
        self._loaded: dict[tuple[str, int], Any] = {}
        self._shared: dict[tuple[str, int], int] = {}
        flat = (groups[name][1].split() if name in groups else [name] for name in self._arguments)
        self._makers = [_maker(name) for name in itertools.chain(*flat)]

    def __repr__(self) -> str:
        return f"<CUDA kernel {self.name}>"

    @functools.cached_property
    def ptx_file(self) -> Path:
        """Where the PTX lies."""
        path = Path(_ptx_directory(), f"{self.name}.ptx")
        if not path.exists():
            _cache.write(path, _tidied(self._compile(), self.name))
        return path

    @property
    def ptx(self) -> str:
        """The PTX, with the kernel's own name as its only entry."""
        return self.ptx_file.read_text()

    def _compile(self) -> str:
        arguments = [_type(name, self._groups) for name in self._arguments]
        options = {"device": False, "abi": "numba", "output": "ptx", "fastmath": True}
        with _no_gpu_asked():
            ptx, _ = cuda.compile(self._function, types.void(*arguments), cc=CAPABILITY, **options)
        return str(ptx)

    def __call__(self, *args: Any, grid: int | Sequence[int], block: int | Sequence[int], shared: int = 0) -> None:
        """Launch `grid` blocks of `block` threads, up to three axes each, with bytes of dynamic shared memory."""
        flat = [value for arg in args for value in (arg if isinstance(arg, tuple) else (arg,))]
        if len(flat) != len(self._makers):
            raise TypeError(f"{self!r} takes {len(self._makers)} arguments; got {len(flat)}")
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        block = (block,) if isinstance(block, int) else tuple(block)
        if 0 in grid:
            return
        given = tuple(make(value) for make, value in zip(self._makers, flat, strict=True))
        self._function_for(shared)(grid, block, given, shared_mem=shared)
        if recording.kept is not None:
            recording.kept.append(flat)

    def _function_for(self, shared: int) -> Any:
        """The loaded kernel on the current device."""
        import cupy

        place = (cupy.__name__, cupy.cuda.Device().id)
        if place not in self._loaded or shared > self._shared[place]:
            with self._lock:
                function = cupy.RawModule(path=str(self.ptx_file)).get_function(self.name)
                most = max(shared, self._shared.get(place, _FREE_SHARED))
                if most > _FREE_SHARED:  # of a function, however often it was asked for: it may only grow
                    function.max_dynamic_shared_size_bytes = most
                self._loaded[place], self._shared[place] = function, most
        return self._loaded[place]


class Recording(threading.local):
    """What a thread records, see `qattn.cuda.program`."""

    kept: list[Any] | None = None
    """The arguments of launches so far; None while nothing is recorded."""


recording = Recording()


def kernel(signature: str, key: str = "", **groups: Group) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of a function; `key` is what it was generated for: letters, digits and underscores."""
    return lambda function: Kernel(function, signature, key, groups)


def _type(name: str, groups: Mapping[str, Group]) -> Any:
    """Numba's type of an argument."""
    if name in groups:
        made, elements = groups[name]
        return types.BaseTuple.from_types([_type(element, {}) for element in elements.split()], made)
    return types.CPointer(_TYPES[name[:-1]]) if name[-1] == "*" else _TYPES[name]


def _maker(type_: str) -> Callable[[Any], Any]:
    """What turns an argument into what CuPy launches with."""
    if type_[-1] != "*":
        return np.dtype(str(_TYPES[type_])).type
    size = _TYPES[type_[:-1]].bitwidth // 8

    def pointer(value: Any) -> Any:
        if value is None:
            return np.uint64(0)
        if value.dtype.itemsize != size or not value.flags.c_contiguous:
            raise TypeError(f"a kernel wants a C-contiguous array of {type_[:-1]}; got {value.dtype}{value.shape}")
        return value

    return pointer


@contextlib.contextmanager
def _no_gpu_asked() -> Iterator[None]:
    """Let Numba compile `device` functions for `CAPABILITY`, too, where it would ask the current GPU for its own."""
    with _compiling:
        asked = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)
        try:
            yield
        finally:
            dispatcher.get_current_device = asked


_compiling = threading.RLock()


def _tidied(ptx: str, name: str) -> str:
    """PTX that depends on the kernel alone: its entry has a readable name, and nothing is numbered by a process."""
    found = re.search(r"\.visible \.entry (\w+)\(", ptx)
    if found is None:
        raise RuntimeError(f"Numba made no kernel of {name}")
    ptx = re.sub(r"^\.common .*NumbaEnv.*\n", "", ptx.replace(found[1], name), flags=re.MULTILINE)  # which nobody reads
    arrays: dict[str, str] = {}
    ptx = re.sub(r"_cudapy_smem_\d+", lambda array: arrays.setdefault(array[0], f"shared_{len(arrays)}"), ptx)
    # Nothing in it is newer than 7.1, and drivers refuse versions that are newer than they.
    return re.sub(r"^\.version .*", ".version 7.1", ptx, flags=re.MULTILINE)


@functools.cache
def _ptx_directory() -> str:
    """Where PTX is kept."""
    made_by = version("numba-cuda"), version("nvidia-nvvm"), CAPABILITY
    return _cache.directory("cuda", *made_by) or _cache.temporary()
