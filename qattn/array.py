"""QuantArray: quantized rows that behave like a read-only NumPy array of float32.

What concerns whole rows (selecting them, stacking them, multiplying by them) is done on the quantized bytes;
anything else that NumPy offers works on the values, which are dequantized for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from qattn import _check, devices, formats
from qattn._backend import as_array, as_numpy, device_of, namespace
from qattn._index import as_slice, check_bounds, row_keys
from qattn.errors import DeviceError, FormatError

Array = np.ndarray[Any, Any]


class Engine(NamedTuple):
    """How values and products are computed.  Imports point down, so `qattn.ops` puts its kernels here."""

    dequantize: Callable[[QuantArray], Array]
    """w of any shape, of one part or several → float32 of the same shape."""
    matmul: Callable[[Array, QuantArray], Array]
    """x (..., columns), w (rows, columns) → x @ w.T, (..., rows) float32."""


class QuantArray(NDArrayOperatorsMixin):
    """Quantized weights, read like a NumPy array of float32.

    Rows (the last axis) are quantized along their length, so the axes before it are indexed without
    dequantizing, and without copying where NumPy wouldn't copy: ``w[5]``, ``w[10:20]``, ``w[mask]``,
    ``w[[3, 1]]``.  ``np.concatenate([q, k, v])`` stacks rows of any formats without copying them.
    ``x @ w.T`` multiplies by the quantized rows.  ``np.asarray(w)`` gives the values, and comparisons,
    arithmetic and other NumPy functions work on these, element by element.

    Parameters
    ----------
    data : array of uint8, (..., row_bytes)
        The blocks of each row, as in a GGUF file.  Viewed, not copied, if the bytes of a row lie together.
    format : str
        The name of the format, one of `qattn.formats.names`.

    Raises
    ------
    FormatError
        The format is unknown, or its blocks don't fill the rows.
    ValueError
        `data` is not an array of bytes.
    """

    def __init__(self, data: Any, format: str) -> None:
        fmt = formats.get(format)
        data = as_array(data, "data")
        if data.dtype != np.uint8 or data.ndim < 1:
            raise ValueError(f"data is {data.dtype.name} {data.shape}; expected uint8 (..., row_bytes)")
        row_bytes = data.shape[-1]
        if row_bytes % fmt.bytes:
            raise FormatError(f"data has rows of {row_bytes} bytes; {format} has blocks of {fmt.bytes}")
        if data.strides[-1] != 1 and row_bytes > 1:
            data = namespace(data).ascontiguousarray(data)
        self._format = fmt
        self.cached: Any = None  # the packed form, which the engine makes when it is first needed
        self._data: Array = data.view()
        if isinstance(data, np.ndarray):  # CuPy's arrays can't be protected
            self._data.flags.writeable = False
        self._parts: tuple[QuantArray, ...] = ()  # of a stacked array; itself here would be a cycle
        self.shape: tuple[int, ...] = (*data.shape[:-1], row_bytes // fmt.bytes * fmt.block)

    @classmethod
    def stack(cls, arrays: Sequence[QuantArray]) -> QuantArray:
        """Join arrays along the first axis, whatever their formats, without copying: `np.concatenate`."""
        columns = arrays[0].shape[1:]
        if any(array.ndim < 2 or array.shape[1:] != columns for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(f"can't stack rows of shapes {shapes}; only the first axis may differ")
        places = sorted({array.device for array in arrays})
        if len(places) > 1:
            raise DeviceError(f"can't stack rows that are on {' and '.join(places)}")
        parts = tuple(part for array in arrays for part in array.parts if len(part))
        if len(parts) < 2:
            return parts[0] if parts else arrays[0]
        self = cls.__new__(cls)
        self.cached = None
        self._parts = parts
        self.shape = (sum(map(len, parts)), *columns)
        return self

    # What it is

    @property
    def parts(self) -> tuple[QuantArray, ...]:
        """The arrays of one format each that this one is stacked of, in the order of rows, or itself."""
        return self._parts or (self,)

    @property
    def data(self) -> Array:
        """The bytes, (..., row_bytes) uint8, read-only.  ValueError if there are several parts."""
        if self._parts:
            raise ValueError(f"stacked of {len(self._parts)} parts, so there is no single data; see parts")
        return self._data

    @property
    def format(self) -> str:
        """The name of the format, or "mixed"."""
        names = self._format_names()
        return names[0] if len(names) == 1 else "mixed"

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32, the type of the values."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that the quantized weights take."""
        return sum(int(part._data.nbytes) for part in self.parts)

    @property
    def device(self) -> str:
        """Where the bytes are: "cpu", "cuda:0", …"""
        return device_of(self.parts[0]._data)

    def to(self, device: str) -> QuantArray:
        """The same weights on another device; itself if they are there.

        Raises
        ------
        DeviceError
            If the device can't be used.
        """
        device = devices.resolve(device)
        if device == self.device:
            return self
        with devices.current(device):
            copies = [QuantArray(devices.copied(part._data, device), part._format.name) for part in self.parts]
        return QuantArray.stack(copies) if self._parts else copies[0]

    @property
    def bits_per_weight(self) -> float:
        """The bits that one weight takes, scales included."""
        if self.size:
            return 8 * self.nbytes / self.size
        fmt = self.parts[0]._format
        return float(8 * fmt.bytes / fmt.block)

    @property
    def T(self) -> Transposed | QuantArray:
        """The transpose, for ``x @ w.T``.  ValueError for more than two axes."""
        if self.ndim > 2:
            raise ValueError(f"no transpose of shape {self.shape}; index the first axis before: w[0].T")
        return Transposed(self) if self.ndim == 2 else self

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise ValueError("the truth value of weights is ambiguous; ask w.size, or np.any(w)")

    def __repr__(self) -> str:
        names = self._format_names()
        form = repr(names[0]) if len(names) == 1 else f"'mixed' ({', '.join(names)})"
        bits, size = f"{self.bits_per_weight:.2f} bits/weight", in_bytes(self.nbytes)
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"QuantArray(shape={self.shape}, format={form}, {bits}, {size}{where})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._parts:
            return QuantArray.stack, (self._parts,)
        return QuantArray, (self._data, self._format.name)

    def _format_names(self) -> list[str]:
        return list(dict.fromkeys(part._format.name for part in self.parts))

    # Rows

    def __getitem__(self, key: Any) -> QuantArray:
        keys = row_keys(key, self.shape)
        if not keys:
            return self
        if not self._parts:
            if self.device != "cpu":
                check_bounds(keys, self.shape)
            return QuantArray(self._data[keys], self._format.name)
        if len(keys) > 1:
            raise IndexError("a stacked array takes one index at a time: w[i][j] instead of w[i, j]")
        return self._stacked_rows(keys[0])

    def __iter__(self) -> Iterator[QuantArray]:
        if self.ndim == 1:
            raise IndexError("a quantized row has no single weights; dequantize first: np.asarray(w)")
        return (self[index] for index in range(len(self)))

    def _stacked_rows(self, key: Any) -> QuantArray:
        """Select rows of several parts, one run of rows in the same part after the other."""
        chosen = np.arange(len(self))[key]
        ends = np.cumsum([len(part) for part in self._parts])
        owners = np.searchsorted(ends, chosen, side="right")
        if chosen.ndim > 1:
            raise IndexError(f"a stacked array takes a 1-D index; got one of shape {chosen.shape}")
        if not chosen.size:
            return self._parts[0][:0]
        if chosen.ndim == 0:
            return self._parts[int(owners)][int(chosen - ends[owners])]
        selected = []
        for run in np.split(np.arange(len(chosen)), np.flatnonzero(np.diff(owners)) + 1):
            part, end = self._parts[owners[run[0]]], ends[owners[run[0]]]
            rows = chosen[run] - (end - len(part))
            selected.append(part[as_slice(rows) if isinstance(key, slice) else rows])
        return QuantArray.stack(selected)

    # Values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Dequantize to a new array; format F32 gives a read-only view, where its place in memory allows."""
        if self.device != "cpu":
            raise TypeError(f"the weights are on {self.device}, and NumPy can't read them there; use .to('cpu')")
        values = self._float32_view()
        wanted = np.dtype(np.float32 if dtype is None else dtype)
        if copy is False and (values is None or wanted != values.dtype):
            raise ValueError(f"{self.format} to {wanted.name} needs a copy; ask for it: np.asarray(w)")
        if values is None:
            values = _engine.dequantize(self) if self.size else np.zeros(self.shape, np.float32)
        elif copy:
            values = values.copy()
        return values.astype(wanted, copy=False)

    def _float32_view(self) -> Array | None:
        if self._parts or self._format.name != "F32":
            return None
        values = self._data.view("<f4")
        return values if values.flags.aligned and values.dtype.isnative else None

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc is np.matmul and method == "__call__" and not kwargs.keys() - {"out"}:
            product = _product(*inputs, *kwargs.get("out", ()))
            if product is not NotImplemented:
                return product
        keywords = {name: _values(value) for name, value in kwargs.items()}
        return getattr(ufunc, method)(*map(_values, inputs), **keywords)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in _FUNCTIONS:
            result = _FUNCTIONS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*map(_values, args), **{name: _values(value) for name, value in kwargs.items()})


class Transposed(NDArrayOperatorsMixin):
    """The transpose of a matrix of quantized rows: the right factor of ``x @ w.T``.

    Its values are those of ``np.asarray(w).T``; for anything but products by it, index `T`, the matrix.
    """

    def __init__(self, array: QuantArray) -> None:
        self.T = array
        self.shape = array.shape[::-1]
        self.ndim = 2
        self.dtype = array.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.T.__array__(dtype, copy).T

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{self.T!r}.T"

    __array_ufunc__ = QuantArray.__array_ufunc__
    __array_function__ = QuantArray.__array_function__


# Products


def _product(x: Any, w: Any, out: Any = None) -> Any:
    """Multiply matrices where the sums run along quantized rows; NotImplemented where they don't."""
    if isinstance(w, Transposed):
        x = _operand(x, "x")
        if x.ndim == 0:
            return NotImplemented
        values = _engine.matmul(x, w.T)
    elif isinstance(x, QuantArray) and x.ndim == 2:
        right = _operand(w, "the right factor")
        if right.ndim not in (1, 2):
            return NotImplemented
        values = _engine.matmul(right.T, x).T  # (w @ y).T is y.T @ w.T
    else:
        return NotImplemented
    if out is None:
        return values
    if out.shape != values.shape:
        raise ValueError(f"out has shape {out.shape}; expected {values.shape}")
    np.copyto(out, values, casting="same_kind")
    return out


def _operand(x: Any, name: str) -> Array:
    """Return a factor as a NumPy array of floats."""
    values = _dequantized(x) if isinstance(x, (QuantArray, Transposed)) else as_array(x, name)
    if not _check.is_real(values):
        raise TypeError(f"{name} has dtype {values.dtype}; quantized weights are multiplied by floats")
    return values.astype(np.float32) if values.dtype.kind in "biu" else values


_engine: Engine


def install_engine(engine: Engine) -> None:
    """Let arrays dequantize and multiply with these functions."""
    global _engine
    _engine = engine


# NumPy's functions


def _concatenate(arrays: Any, axis: int | None = 0, **kwargs: Any) -> Any:
    """Stack rows; a float array among them becomes one of the formats F16, F32 and F64."""
    arrays = [_quantized(array) for array in arrays]
    if kwargs or axis not in (0, -arrays[0].ndim) or arrays[0].ndim < 2:
        return NotImplemented
    return QuantArray.stack(arrays)


def _vstack(arrays: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    arrays = [_quantized(array) for array in arrays]
    return QuantArray.stack([QuantArray(a.data[None], a.format) if a.ndim == 1 else a for a in arrays])


def _transpose(array: Any, axes: Any = None) -> Any:
    return array.T if axes is None and array.ndim <= 2 else NotImplemented


# The functions that need no values, or not all of them.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.concatenate: _concatenate,
    np.vstack: _vstack,
    np.transpose: _transpose,
    np.dot: _product,
    np.shape: lambda array: array.shape,
    np.ndim: lambda array: array.ndim,
}


def _quantized(x: Any) -> QuantArray:
    """Return a float array as a QuantArray of the format that holds it exactly."""
    if isinstance(x, QuantArray):
        return x
    values = np.atleast_1d(as_numpy(x))
    if not _check.is_real(values):
        raise TypeError(f"an array of {values.dtype} can't stand beside quantized rows; expected floats")
    name = {"float16": "F16", "float64": "F64"}.get(values.dtype.name, "F32")
    dtype = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[name]
    return QuantArray(np.ascontiguousarray(values, dtype).view(np.uint8), name)


def _dequantized(x: QuantArray | Transposed) -> Any:
    """The values, where the weights are."""
    array = x.T if isinstance(x, Transposed) else x
    if array.device == "cpu":
        return np.asarray(x)
    values = _engine.dequantize(array)
    return values.T if array is not x else values


def _values(x: Any) -> Any:
    """Dequantize an argument, or what of a list or tuple is quantized."""
    if isinstance(x, (QuantArray, Transposed)):
        values = _dequantized(x)
        if isinstance(values, np.ndarray):
            values.flags.writeable = False  # so that writing into a QuantArray fails rather than gets lost
        return values
    if type(x) in (list, tuple):
        return type(x)(map(_values, x))
    return x


def in_bytes(count: int) -> str:
    """Write a number of bytes for people, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
