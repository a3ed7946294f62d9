"""Kernels for GPUs need numba-cuda to be compiled: without it, only the emulator's own tests are left."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("numba_cuda") is None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_emulator.py"]


def pytest_collection_modifyitems(items):
    """Measure no coverage here: no tracer sees PTX, and compiling it under one takes 2.4 times as long."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.no_cover)
