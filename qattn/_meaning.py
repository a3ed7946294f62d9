"""What a mask does, in a few letters: machine code that was compiled for it is kept on disk by this name."""

from __future__ import annotations

import functools
import hashlib
import re
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np


def is_ours(mask: Any) -> bool:
    """Whether a mask's class belongs to this package, whose sources all that is kept depends on."""
    return mask.__module__.startswith("qattn.masks.")  # type: ignore[no-any-return]


@functools.cache
def mask_key(mask: Any) -> str:
    """A name for the kernels of a mask's class.  One that is not ours may change: its name tells what it does, too."""
    name = re.sub(r"\W+", "_", f"{mask.__module__}.{mask.__qualname__}")
    if is_ours(mask):
        return name.rsplit("_", 1)[-1]
    methods = [getattr(mask, method) for method in ("bounds", "sees") if hasattr(mask, method)]
    return f"{name[-80:]}_{digest(mask._fields, *methods)}"


def digest(*values: Any) -> str:
    """Twelve letters that differ where functions, or what they refer to, differ."""
    return hashlib.sha256(repr([_meaning(value, ()) for value in values]).encode()).hexdigest()[:12]


def _meaning(value: Any, within: tuple[Any, ...]) -> Any:
    """What decides how a function, or a value that it refers to, is compiled."""
    value = getattr(value, "py_func", value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, CodeType):
        return value.co_code, [_meaning(each, within) for each in value.co_consts], value.co_names
    if not isinstance(value, FunctionType) or value in within:
        return value.__name__ if isinstance(value, (FunctionType, ModuleType)) else repr(value)
    code, within = value.__code__, (*within, value)
    named = [value.__globals__[name] for name in code.co_names if name in value.__globals__]
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    return _meaning(code, within), [_meaning(each, within) for each in (*named, *cells)]
