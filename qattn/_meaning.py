"""What a mask does, in a few letters: machine code that was compiled for it is kept on disk by this name."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np


def is_ours(mask: Any) -> bool:
    """Whether a mask's class belongs to this package, whose sources all that is kept depends on."""
    return mask.__module__.startswith("qattn.masks.")


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


def _meaning(value: Any, within: tuple[Any, ...], names: tuple[str, ...] = ()) -> Any:
    """What decides how a function, or a value that it refers to, is compiled; of a module, what has these names."""
    dispatcher, value = hasattr(value, "py_func"), getattr(value, "py_func", value)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [_meaning(each, within) for each in value]
    if isinstance(value, ModuleType):
        if value in within:
            return value.__name__
        found = [getattr(value, name) for name in names if hasattr(value, name)]
        return value.__name__, [_meaning(each, (*within, value), names) for each in found]
    if not isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__name__}" if callable(value) and hasattr(value, "__name__") else repr(value)
    if value in within or (within and isinstance(within[-1], ModuleType) and not dispatcher):
        return f"{value.__module__}.{value.__qualname__}"
    within, codes = (*within, value), list(_codes(value.__code__))
    names = tuple(name for code in codes for name in code.co_names)
    held = [value.__globals__[name] for name in names if name in value.__globals__]
    held += [cell.cell_contents for cell in value.__closure__ or ()]
    held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    plain = [(code.co_code, [each for each in code.co_consts if not isinstance(each, CodeType)]) for code in codes]
    return repr(plain), names, [_meaning(each, within, names) for each in held]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those that it makes."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)
