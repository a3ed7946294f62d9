"""The registry of masks, and the names that Modular MAX gives to their variants."""

from __future__ import annotations

import enum
import operator
from collections import namedtuple
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, Protocol, TypeVar

import numpy as np

from qattn import _check
from qattn._meaning import digest
from qattn._modules import import_all


class Mask(Protocol):
    """A named tuple of integers with one or two methods, which NumPy code, Numba and the kernels run alike.

    Queries and keys are given by their positions, which are their indices in the sequence unless it was edited, or
    tokens came with others.
    """

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        """The first key that the query at position `query` sees, and the end: one past the last.

        Positions are below `keys`; the end may exceed it.  Keys outside are never read.  A mask may also have a method
        ``sees(query, key)``, which tells for the keys within the bounds whether they are seen.  Both may be static
        methods.  A property ``span`` may say that no key further back than ``query - span + 1`` is ever seen, so that
        a cache need not keep it.
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


def names() -> tuple[str, ...]:
    """All names that `get` takes."""
    import_all("qattn.masks")
    return tuple(sorted(_masks))


def has_window(name: str) -> bool:
    """Whether the mask of that name has a window, a chunk or a prefix."""
    names()
    return bool(_masks[name]._fields)


def get(mask: str | MHAMaskVariant | Mask, window: int | None = None) -> Mask:
    """The mask of that name or variant; a mask is returned as it is.

    Parameters
    ----------
    mask : str, MHAMaskVariant or mask
    window : int, optional
        Keys in a window, a chunk or a prefix, for the masks that have one.

    Raises
    ------
    ValueError
        For a name that is no mask's, or a window that is missing, needless or not positive.
    """
    if not isinstance(mask, (str, MHAMaskVariant)):
        if isinstance(mask, type) or not hasattr(mask, "bounds"):
            came = f"a {type(mask).__name__}" if isinstance(mask, (list, tuple)) else repr(mask)
            raise ValueError(f"mask is {came}; expected a name ({', '.join(names())}), a variant, a mask or an array")
        if window is not None:
            raise ValueError(f"window is {window}; the mask {mask} has its own already")
        return mask
    name = mask if isinstance(mask, str) else mask.value
    if name not in names():
        raise ValueError(f"there is no mask named {name!r}; there are: {', '.join(names())}")
    if has_window(name) != (window is not None):
        wanted = "needs one: say window=…" if window is None else "has no window"
        raise ValueError(f"window is {window}; the mask {name!r} {wanted}")
    if window is None:
        return _masks[name]()
    _check.at_least("window", window, 1)
    return _masks[name](min(operator.index(window), _check.MAX_POSITION + 1))


def from_function(
    sees: Callable[[int, int], bool], bounds: Callable[[int, int], tuple[int, int]] | None = None
) -> Mask:
    """A mask of a Python function, which is compiled into the kernels.

    Parameters
    ----------
    sees : function of (query, key)
        Whether the query at that position of a sequence sees the key at that one; plain arithmetic that Numba compiles.
    bounds : function of (query, keys), optional
        The range of keys that may be seen, see `Mask`; others are never read.  By default, all.

    Raises
    ------
    TypeError
        If they are no functions, or, asked about key 0 of one, answer anything but a truth value and two integers.

    Notes
    -----
    What a function refers to, beside its arguments, is what it is now, whatever becomes of it.  On a CPU, an index
    outside an array is an IndexError; on a GPU nobody looks.

    Examples
    --------
    >>> strided = qattn.masks.from_function(lambda query, key: key <= query and (query - key) % 4 == 0)
    >>> qattn.attention(q, k, v, mask=strided)
    """
    for function in (sees, bounds):
        if function is not None and not isinstance(getattr(function, "py_func", function), FunctionType):
            raise TypeError(f"{function!r} is no function that can be compiled; wrap it in a lambda")
    name = f"{sees.__qualname__}.{digest(sees, bounds)}"  # for kernels are told apart by names
    known = _made.get((sees.__module__, name))
    if known is not None:
        return known
    answer, limits = sees(0, 0), (bounds or _all_keys)(0, 1)
    if not isinstance(answer, (bool, int, np.bool_, np.integer)):
        raise TypeError(f"sees(0, 0) is {answer!r}; expected a truth value")
    if not isinstance(limits, tuple) or [isinstance(each, (int, np.integer)) for each in limits] != [True, True]:
        raise TypeError(f"bounds(0, 1) is {limits!r}; expected two integers: the first key, and the end")
    seen, limited = _frozen(sees), _frozen(bounds or _all_keys)
    members = {
        "__doc__": f"The mask of {sees.__qualname__}.",
        "__module__": sees.__module__ or "__main__",  # code that was run by exec has none
        "__qualname__": name,
        "sees": staticmethod(seen),
        "bounds": staticmethod(limited),
    }
    made: Mask = type("FunctionMask", (namedtuple("FunctionMask", ()),), members)()  # type: ignore[misc]
    _made[sees.__module__, name] = made
    return made


def _frozen(function: Any) -> Any:
    """The function over copies of the arrays that it refers to, and what its globals are now."""
    if not isinstance(function, FunctionType):  # a compiled one
        return function

    def now(value: Any) -> Any:
        return value.copy() if isinstance(value, np.ndarray) else value

    scope = {name: now(value) for name, value in function.__globals__.items()}
    cells = tuple(CellType(now(cell.cell_contents)) for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__qualname__, made.__module__ = (
        function.__kwdefaults__, function.__qualname__, function.__module__,
    )  # fmt: skip
    return made


def visible(mask: Mask, queries: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which keys at these positions the queries at those see, (queries, keys) bool.

    Examples
    --------
    >>> masks.visible(masks.SlidingWindow(2), np.arange(3), np.arange(3)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """
    count = int(max(keys.max(initial=-1), queries.max(initial=-1))) + 1
    bounds = np.array([mask.bounds(int(query), count) for query in queries], np.int64).reshape(-1, 2)
    seen: np.ndarray[Any, Any] = (bounds[:, :1] <= keys) & (keys < bounds[:, 1:])
    sees = getattr(mask, "sees", None)
    if sees is not None and seen.any():
        query, key = np.nonzero(seen)  # beyond its bounds, nobody has asked what a mask says
        seen[query, key] = np.frompyfunc(sees, 2, 1)(queries[query], keys[key]).astype(bool)
    return seen


_made: dict[tuple[str | None, str], Mask] = {}  # so that what does the same is compiled once


def _all_keys(query: int, keys: int) -> tuple[int, int]:
    return 0, keys
