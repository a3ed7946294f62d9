"""Names of devices: "cpu", "cuda" (the first GPU), "cuda:1", or "auto", a GPU if one can be used and else the CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterable
from typing import Any

from qattn.errors import DeviceError

CAPABILITY = (8, 0)  # the oldest that has the instructions of `qattn.cuda.ptx`: Ampere


def resolve(device: str) -> str:
    """The device that a name stands for: "cpu", or "cuda:" and a number.

    Raises
    ------
    DeviceError
        For a name that is none, or a GPU that can't be used, with what is missing.
    """
    name = str(device)
    if name == "cpu":
        return name
    if name == "auto":
        return "cpu" if missing(0) else "cuda:0"
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise DeviceError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:0', 'cuda:1', … or 'auto'")
    index = int(found[1] or 0)
    reason = missing(index)
    if reason:
        raise DeviceError(f"device {name!r} can't be used: {reason}")
    return f"cuda:{index}"


def missing(index: int) -> str:
    """What stands against using a GPU, or nothing: a package, a driver, the GPU itself, or its compute capability."""
    for module, package in (("numba_cuda", "numba-cuda"), ("cupy", "CuPy")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed; get it with: pip install 'qattn[cuda]'"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no driver or no GPU answers ({error})"
    if index >= count:
        return f"there are {count} GPUs, numbered from 0"
    capability = str(cupy.cuda.Device(index).compute_capability)
    if (int(capability[:-1]), int(capability[-1])) < CAPABILITY:
        return f"its compute capability is {capability[:-1]}.{capability[-1]}, and the kernels need {CAPABILITY[0]}.0"
    return ""


def only(names: str | Iterable[str] | None) -> str:
    """The one device that is meant; "cpu" for none.

    Raises
    ------
    NotImplementedError
        There are several.
    """
    resolved = [resolve(name) for name in ([names] if isinstance(names, str) else names or ["cpu"])]
    if len(set(resolved)) > 1:
        raise NotImplementedError(f"devices are {', '.join(resolved)}; a layer on several devices is not implemented")
    return resolved[0]


def namespace(device: str) -> Any:
    """The module that makes arrays there: NumPy or CuPy."""
    if device == "cpu":
        import numpy

        return numpy
    import cupy

    return cupy


def current(device: str) -> contextlib.AbstractContextManager[Any]:
    """Let new arrays and launches go to a device: ``with current(device): …``."""
    if device == "cpu":
        return contextlib.nullcontext()
    import cupy

    return cupy.cuda.Device(int(device.split(":")[1]))


def asarray(array: Any, device: str) -> Any:
    """A NumPy array on a device, copied if that is a GPU."""
    with current(device):
        return namespace(device).asarray(array)


def copied(array: Any, device: str) -> Any:
    """Copy an array to a device, which is the current one if it is a GPU."""
    import cupy

    return cupy.asnumpy(array) if device == "cpu" else cupy.asarray(array)
