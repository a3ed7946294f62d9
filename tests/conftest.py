"""Fixtures that several files use."""

import functools
import gc
import os
import sys
from pathlib import Path

import hypothesis
import numba.core.compiler
import pytest

from qattn.models.fetch import GEMMA3, SMOLLM2, FetchError, fetch

hypothesis.settings.register_profile("qattn", deadline=None)  # the first example compiles kernels
hypothesis.settings.load_profile("qattn")


def pytest_runtest_setup():
    """What compilers have left, and something still refers to, the garbage collector need not look through again."""
    gc.collect()
    gc.freeze()


def untraced(compile_function):
    """A compiler that no tracer follows: there is nothing to measure in it, and it would take twice as long."""

    @functools.wraps(compile_function)
    def run(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return compile_function(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return run


numba.core.compiler.compile_extra = untraced(numba.core.compiler.compile_extra)
HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def fetched(source):
    """The path of a model, which is fetched if it isn't in the cache.

    Without a network the tests that need it are skipped, but not where CI is set: there they must run.
    """
    try:
        return fetch(source)
    except FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{source.name} isn't in the cache and can't be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2():
    """The path of the default model."""
    return fetched(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3():
    """The path of Gemma 3 270M."""
    return fetched(GEMMA3)


@pytest.fixture(scope="session")
def golden():
    """The folder of recorded values."""
    return GOLDEN


def provide_cupy(modules=sys.modules):
    """CuPy on a host with a GPU, elsewhere the emulator in its place."""
    try:
        import cupy

        if cupy.is_available():
            return cupy
    except ImportError:
        pass
    from tests import emulated_cupy

    modules["cupy"] = emulated_cupy
    return emulated_cupy


@pytest.fixture
def cupy(monkeypatch):
    """CuPy, or what takes its place."""
    pytest.importorskip("numba_cuda", reason="kernels for GPUs are compiled by numba-cuda")
    from qattn.cuda.kernel import Kernel
    from tests.ptx_emulator import Module

    for class_, name in ((Kernel, "_compile"), (Module, "launch")):
        monkeypatch.setattr(class_, name, untraced(getattr(class_, name)))
    changed = {}
    found = provide_cupy(changed)
    for name, module in changed.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found
