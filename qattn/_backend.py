"""Which library owns an array: the only place that asks, and the only one that may import CuPy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from qattn import _check
from qattn.errors import DeviceError

# The device numbers of DLPack that name memory which the CPU can read: kDLCPU, kDLCUDAHost, kDLROCMHost.
_HOST_DEVICES = (1, 3, 11)
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_cupy(x: Any) -> bool:
    """Tell whether `x` is a CuPy array, without importing CuPy: whoever has such an array has imported it."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def device_of(x: Any) -> str:
    """Where an array is: "cpu", or "cuda:" and the number of a GPU."""
    return f"cuda:{x.device.id}" if is_cupy(x) else "cpu"


def check_device(name: str, x: Any, others: str, device: str) -> None:
    """Raise DeviceError unless an array is where `others` are."""
    if device_of(x) != device:
        raise DeviceError(f"{name} is on {device_of(x)}, {others} on {device}; both must be on the same")


def namespace(x: Any) -> Any:
    """The library that owns an array: NumPy or CuPy."""
    return sys.modules["cupy"] if is_cupy(x) else np


def as_array(x: Any, name: str = "x") -> Any:
    """View `x` as a NumPy array, or as a CuPy array if it is on an NVIDIA GPU, without a copy where that can be.

    Whoever has an array on a GPU may have it from any library with ``__dlpack__`` or ``__cuda_array_interface__``.

    Raises
    ------
    DeviceError
        `x` is on a GPU and CuPy is not installed, or it is on another kind of device.
    """
    if isinstance(x, np.ndarray) or is_cupy(x):
        return x
    if hasattr(x, "__cuda_array_interface__") or _dlpack_device(x) in _CUDA_DEVICES:
        try:
            import cupy
        except ImportError:
            raise DeviceError(f"{name} is on a GPU, and CuPy is not installed: pip install 'qattn[cuda]'") from None
        # DLPack says which GPU and which stream; the other protocol need not, and copies to the current GPU
        return cupy.from_dlpack(x) if _dlpack_device(x) in _CUDA_DEVICES else cupy.asarray(x)
    return as_numpy(x, name)


def is_aligned(x: Any) -> bool:
    """Whether an array starts where a GPU can load 16 bytes at once; on a CPU that doesn't matter."""
    return not is_cupy(x) or x.__cuda_array_interface__["data"][0] % 16 == 0


def as_float32(x: Any, name: str = "x") -> Any:
    """An array as C-contiguous float32, and aligned as kernels need it: copied if it isn't.

    Raises
    ------
    ValueError
        It holds complex numbers, or no numbers at all.
    """
    if not _check.is_real(x):
        raise ValueError(f"{name} has dtype {x.dtype}; expected floats")
    xp = namespace(x)
    values = xp.ascontiguousarray(x, np.float32)
    return values if is_aligned(values) else values.copy()


def as_host(x: Any, name: str = "x") -> np.ndarray[Any, Any]:
    """A NumPy array, copied if it is on a GPU: for what the host has to know, such as offsets and positions."""
    x = as_array(x, name)
    return sys.modules["cupy"].asnumpy(x) if is_cupy(x) else x


def as_numpy(x: Any, name: str = "x") -> np.ndarray[Any, Any]:
    """View `x` as a NumPy array, without a copy where its owner allows that.

    Parameters
    ----------
    x : array-like
        A NumPy array; anything with ``__array__`` or ``__dlpack__`` in memory that the CPU can read, a CPU
        torch tensor for instance; numbers, or nested sequences of them.
    name : str
        What the caller's user calls it, for messages.

    Raises
    ------
    DeviceError
        `x` is on a GPU, or another kind of device.
    """
    if isinstance(x, np.ndarray) and not is_cupy(x):
        return x
    device = _dlpack_device(x)
    if is_cupy(x) or device in _CUDA_DEVICES:
        raise DeviceError(f"{name} is on a GPU, and is needed on the CPU: cupy.asnumpy(...) copies it")
    if device is not None and device not in _HOST_DEVICES:
        raise DeviceError(f"{name} is on a device of DLPack type {device}; copy it to the CPU")
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    return np.asarray(x)


def _dlpack_device(x: Any) -> int | None:
    """Return the DLPack device type of `x`, or None for an object that doesn't say."""
    ask = getattr(x, "__dlpack_device__", None)
    return int(ask()[0]) if ask is not None else None
