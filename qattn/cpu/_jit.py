"""How CPU kernels are compiled and where the compiled code is kept.

Numba's own on-disk cache looks at the source file of one function.  Our kernels are generated: their code depends
on the intrinsics, on the generator and on the parameters given to it.  So the cache here is a directory named by a
hash over every kernel source and the CPU's features, and a file in it is named by the kernel and its parameters.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.misc.appdirs import AppDirs

from qattn.cpu.target import TARGET

_PACKAGE = Path(__file__).parent.parent
_KERNEL_SOURCES = ("cpu/*.py", "formats/*.py", "masks/*.py")


@functools.cache
def cache_directory() -> str | None:
    """Where compiled kernels are kept: the first of three places that this user alone can write, or None.

    ``NUMBA_CACHE_DIR``, then the user's cache directory, then a private folder among the temporary files.
    """
    digest = hashlib.sha256(repr((numba.__version__, version("llvmlite"), TARGET)).encode())
    for pattern in _KERNEL_SOURCES:
        for source in sorted(_PACKAGE.glob(pattern)):
            digest.update(source.read_bytes())
    user = os.getuid() if hasattr(os, "getuid") else "user"
    roots = [
        numba.config.CACHE_DIR,
        AppDirs(appname="qattn", appauthor=False).user_cache_dir,
        os.path.join(tempfile.gettempdir(), f"qattn-{user}"),
    ]
    for root in filter(None, roots):
        path = os.path.join(root, "kernels-" + digest.hexdigest()[:16])
        if _private(root) and _private(path):
            return path
    return None


def _private(path: str) -> bool:
    """Make a directory, and tell whether we can write it and nobody else owns it (its files are unpickled)."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return not hasattr(os, "getuid") or os.stat(path).st_uid == os.getuid()
    except OSError:
        return False


class Kernel:
    """A compiled function, kept on disk.  Called like the function; `function` is what other compiled code calls."""

    def __init__(self, function: Any, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, *args: Any) -> Any:
        if recorder.append_call is not None:
            recorder.append_call(self, args)
        return self.function(*args)

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"


class _Recorder(threading.local):
    """What the kernel calls of a thread are told to: see `qattn.cpu.program`."""

    append_call: Callable[[Kernel, tuple[Any, ...]], None] | None = None


recorder = _Recorder()


def kernel(key: str = "", **options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Compile a function with Numba, without the GIL, and keep the machine code on disk.

    Parameters
    ----------
    key : str
        What the function was generated for; with its module and name it identifies the code.  Letters, digits, ``-_``.
    options
        Further options of `numba.njit`, ``parallel=True`` for instance.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        dispatcher = numba.njit(nogil=True, **options)(function)
        name = "-".join(filter(None, (function.__module__.split(".")[-1], function.__name__, key)))
        directory = cache_directory()
        if directory is not None:
            dispatcher._cache = _KernelCache(function, directory, name)
        return Kernel(dispatcher, name)

    return decorate


class _Locator:
    """Tells Numba's cache to use our directory and our name."""

    def __init__(self, directory: str, name: str, source: str) -> None:
        self._directory, self._name, self._py_file = directory, name, source

    def ensure_cache_path(self) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    def get_cache_path(self) -> str:
        return self._directory

    def get_source_stamp(self) -> str:
        return os.path.basename(self._directory)

    def get_disambiguator(self) -> str:
        return self._name


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's function cache, with the kernel's name and parameters as identity instead of its bytecode."""

    def __init__(self, function: Callable[..., Any], directory: str, name: str) -> None:
        locator = _Locator(directory, name, function.__code__.co_filename)

        class Impl(CompileResultCacheImpl):  # type: ignore[misc]
            def __init__(self, py_func: Callable[..., Any]) -> None:
                self._lineno = py_func.__code__.co_firstlineno
                self._locator = locator
                self._filename_base = name

        self._impl_class = Impl
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple()
