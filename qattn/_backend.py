"""Which library owns an array: the only place that asks, and the only one that may import CuPy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from qattn.errors import DeviceError

# The device numbers of DLPack that name memory which the CPU can read: kDLCPU, kDLCUDAHost, kDLROCMHost.
_HOST_DEVICES = (1, 3, 11)
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_cupy(x: Any) -> bool:
    """Tell whether `x` is a CuPy array, without importing CuPy: whoever has such an array has imported it."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


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
    NotImplementedError
        `x` is on an NVIDIA GPU.
    DeviceError
        `x` is on another kind of device.
    """
    if isinstance(x, np.ndarray):
        return x
    device = _dlpack_device(x)
    if is_cupy(x) or device in _CUDA_DEVICES:
        raise NotImplementedError(f"{name} is on a GPU, and there is no CUDA backend yet; copy it to the CPU")
    if device is not None and device not in _HOST_DEVICES:
        raise DeviceError(f"{name} is on a device of DLPack type {device}; copy it to the CPU")
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    return np.asarray(x)


def _dlpack_device(x: Any) -> int | None:
    """Return the DLPack device type of `x`, or None for an object that doesn't say."""
    ask = getattr(x, "__dlpack_device__", None)
    return int(ask()[0]) if ask is not None else None
