"""How CPU kernels are compiled and where the compiled code is kept.

Numba's own on-disk cache looks at the source file of one function.  Our kernels are generated: their code depends
on the intrinsics, on the generator and on the parameters given to it.  So the cache here is a directory named by a
hash over every kernel's source and the CPU's features, and a file in it is named by the kernel and its parameters.

Kernels are made of *parts*, functions that only other functions of kernels call.  Numba would optimize each on its own,
make machine code of it, and do all of that again in what calls it.  Parts are optimized there alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.metadata import version
from types import FunctionType
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock

from qattn import _cache
from qattn.cpu.target import TARGET

compiling = global_compiler_lock
"""Held while something is compiled."""
if hasattr(os, "register_at_fork"):  # a child has no use for a lock that another thread held
    os.register_at_fork(before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release)


@functools.cache
def cache_directory() -> str | None:
    """Where machine code is kept, or None."""
    return _cache.directory("cpu", numba.__version__, version("llvmlite"), TARGET)


def compiled(key: str = "", kept: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function with Numba, without the GIL, and keep the machine code on disk.

    Parameters
    ----------
    key : str
        What the function was generated for; with its module and name it identifies the code.  Letters, digits, ``-_``.
    kept : bool
        Whether on disk.
    options
        Further options of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, **options)(_named(function, key))
        name = "-".join(filter(None, (function.__module__.split(".")[-1], function.__name__, key)))
        directory = cache_directory() if kept else None
        if directory is not None:
            dispatcher._cache = _KernelCache(function, directory, name)
        return dispatcher

    return decorate


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of a part, as Numba writes it: nothing of it is at an address until it is in a kernel.

    Numba asks for the address nevertheless, and a library's code generator to put the function's environment there,
    the Python objects that it uses.  `tell_environments` does so for the kernel.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> _PartLibrary:
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Nothing: there is no machine code to tell."""


class _PartCompiler(Compiler):  # type: ignore[misc]
    """Numba's usual steps, with such a library to put the code into."""

    def define_pipelines(self) -> Any:
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


helper = functools.partial(numba.njit, pipeline_class=_PartCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a part.  Python can't call it."""


def tell_environments(made: Any) -> None:
    """Tell compiled code where the Python objects are that its parts use, to print or to raise an exception."""
    for environment in made._find_referenced_environments():
        made.library.codegen.set_env(environment.env_name, environment)


def generated(key: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a part that was made inside a function; `key` is what it was generated for.

    Its code stands where it is called: a call with arrays costs as much as a kernel's work for hundreds of columns.
    """
    return lambda function: helper(forceinline=True, **options)(_named(function, key))


def _named(function: Any, key: str) -> FunctionType:
    """The function, named after what it was generated for.

    Machine code is found by the function's name and the types of its arguments, across all that a process loads from
    the disk.  So functions that differ in what they enclose must differ in name.
    """
    named = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    named.__qualname__ = f"{function.__qualname__}[{key}]"
    named.__doc__, named.__module__ = function.__doc__, function.__module__
    return named


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
