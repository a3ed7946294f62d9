"""Kernels for GPUs need numba-cuda to be compiled: without it, only the emulator's own tests are left."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent

if importlib.util.find_spec("numba_cuda") is None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_emulator.py"]
