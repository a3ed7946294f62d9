"""The same operations on each kind of device: checked arrays in, kernels launched.

`qattn.backends.cpu` and `qattn.backends.cuda` have the same functions.  They decide how the kernels below are used:
what memory intermediate results get, and into how many parts the work is divided.
"""

from __future__ import annotations

import importlib
from typing import Any

from qattn._backend import is_cupy


def of(array: Any) -> Any:
    """The back end for an array."""
    return get("cuda" if is_cupy(array) else "cpu")


def get(kind: str) -> Any:
    """The back end for "cpu" or "cuda"; that for CUDA is imported when it is first asked for."""
    return importlib.import_module(f"qattn.backends.{kind}")
