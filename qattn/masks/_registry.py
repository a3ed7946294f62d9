"""The registry of masks, and the names that Modular MAX gives to their variants."""

from __future__ import annotations

import enum
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Mask(Protocol):
    """A named tuple of integers with one method, which NumPy code, Numba and the kernels run alike."""

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        """The first key that the query at index `query` sees, and the end: one past the last.

        `query` counts from the start of the sequence, in which there are `keys` keys; the end may exceed `keys`.
        """


class MHAMaskVariant(enum.Enum):
    """The mask of a multi-head attention, by the names of Modular MAX."""

    CAUSAL_MASK = "causal"
    NULL_MASK = "null"
    CHUNKED_CAUSAL_MASK = "chunked_causal"
    SLIDING_WINDOW_CAUSAL_MASK = "sliding_window_causal"
    SLIDING_WINDOW_NONCAUSAL_MASK = "sliding_window_noncausal"


_masks: dict[str, type[Any]] = {}
_Class = TypeVar("_Class", bound=type)


def register(name: str) -> Callable[[_Class], _Class]:
    """Give a mask class its name."""

    def add(cls: _Class) -> _Class:
        if name in _masks:
            raise ValueError(f"there are two masks named {name!r}: {_masks[name]} and {cls}")
        _masks[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    package = importlib.import_module("qattn.masks")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"qattn.masks.{module.name}")


def names() -> tuple[str, ...]:
    """All names that `get` takes."""
    _discover()
    return tuple(sorted(_masks))


def get(mask: str | MHAMaskVariant | Mask) -> Mask:
    """The mask of that name or variant; a mask is returned as it is.

    Raises
    ------
    NotImplementedError
        For a variant that has no kernel.
    ValueError
        For a name that is no mask's.
    """
    if not isinstance(mask, (str, MHAMaskVariant)):
        return mask
    known = ", ".join(names())
    if isinstance(mask, MHAMaskVariant):
        if mask.value not in _masks:
            raise NotImplementedError(f"{mask.name} is not implemented; there are: {known}")
        return _masks[mask.value]()  # type: ignore[no-any-return]
    if mask not in _masks:
        raise ValueError(f"there is no mask named {mask!r}; there are: {known}")
    return _masks[mask]()  # type: ignore[no-any-return]
