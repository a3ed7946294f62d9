"""Open GGUF files: a read-only mapping from tensor names to arrays that stay in the file."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import Keys

from qattn import devices, formats
from qattn.array import QuantArray
from qattn.errors import FormatError, GGUFError
from qattn.gguf_header import Header, TensorInfo, read_header


def open(path: str | os.PathLike[str], *, device: str = "cpu") -> GGUFFile:
    """Open a GGUF file as a read-only mapping ``{tensor name: QuantArray}``.

    The file is mapped into memory: no tensor is read or copied before it is used, so the time depends on the
    header alone.  Of a model that is split into several files, name the first; the others, which must lie
    beside it, are mapped too.

    Parameters
    ----------
    path : str or path-like
        A file of GGUF version 2 or 3, little-endian.  It must not change while it is in use.
    device : str
        Where tensors are copied to when they are taken, and where what is made of the file computes: "cpu" (they stay
        in the file), "cuda:0", …, or "auto", a GPU if there is one that can be used.

    Raises
    ------
    DeviceError
        The device can't be used; the message says what is missing.
    OSError
        The file, or a part of a split model, doesn't exist or can't be read.
    GGUFError
        The content of the file is damaged or breaks the rules; the message says where.

    Examples
    --------
    >>> model = qattn.open("model.gguf")
    >>> model.metadata["general.architecture"]
    'llama'
    >>> model["blk.0.attn_q.weight"]
    QuantArray(shape=(576, 576), format='Q4_1', 5.00 bits/weight, 207.4 kB)
    """
    device = devices.resolve(device)
    first = _map(Path(path))
    count = _split_number(first, Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    return GGUFFile([first] if count <= 1 else [first, *_other_parts(first, count)], device)


def opened(model: GGUFFile | str | os.PathLike[str]) -> contextlib.AbstractContextManager[GGUFFile]:
    """An open file, which stays open, or the file at a path, which is closed behind the block."""
    return contextlib.nullcontext(model) if isinstance(model, GGUFFile) else open(model)


class _Part(NamedTuple):
    path: Path
    data: np.ndarray[Any, Any]
    """The mapped file, (bytes,) u1; it and every view of it keep the mapping alive."""
    header: Header


class GGUFFile(Mapping[str, QuantArray]):
    """The tensors of a GGUF file by name.  Made by `open`.

    A tensor of a format that qattn doesn't know is listed in `tensors`; taking it raises `FormatError`.

    Attributes
    ----------
    path : Path
        The file; of a split model, the first.
    metadata : dict
        Keys as in the file.  Values are Python numbers and strings, read-only NumPy arrays, and sequences of
        strings that are decoded on access.
    tensors : dict of str to TensorInfo
        Name, type, shape and place of every tensor, in the file's order.
    device : str
        Where tensors are copied to when they are taken.
    """

    def __init__(self, parts: list[_Part], device: str = "cpu") -> None:
        self.device = device
        self.path = parts[0].path
        self.metadata = parts[0].header.metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._data: dict[str, np.ndarray[Any, Any]] | None = {}
        for part in parts:
            for name, tensor in part.header.tensors.items():
                if name in self.tensors:
                    raise GGUFError(f"{part.path}: tensor {name!r} is in an earlier part too")
                self.tensors[name] = tensor
                self._data[name] = part.data

    def __getitem__(self, name: str) -> QuantArray:
        return self.mapped(name).to(self.device)

    def mapped(self, name: str) -> QuantArray:
        """The tensor in the file, wherever `device` is."""
        if self._data is None:
            raise ValueError(f"{self.path} was closed; open it again, or take its arrays before closing it")
        tensor = self.tensors.get(name)
        if tensor is None:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        try:
            fmt = formats.by_type(tensor.type_id)
        except FormatError:
            known = f"known: {', '.join(formats.names())} (qattn.formats.names())"
            raise FormatError(f"{name} is {tensor.type_name}; {known}") from None
        row_bytes = tensor.shape[-1] // fmt.block * fmt.bytes
        data = self._data[name][tensor.start : tensor.start + (tensor.nbytes or 0)]
        return QuantArray(data.reshape(*tensor.shape[:-1], row_bytes), fmt.name)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    # Two opened files are equal if they are the same object: comparing contents would dequantize them.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        architecture = self.metadata.get(Keys.General.ARCHITECTURE, "unknown")
        size = sum(tensor.nbytes or 0 for tensor in self.tensors.values())
        form = f"architecture={architecture!r}, {len(self)} tensors, {size / 1e6:.1f} MB"
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"GGUFFile({str(self.path)!r}, {form}{where})"

    def close(self) -> None:
        """Let go of the mapping.  Arrays and metadata taken before keep it alive and stay valid."""
        self._data = None
        self.metadata = {}

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map(path: Path) -> _Part:
    """Map one file and read its header."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would wait for a writer
        raise GGUFError(f"{path}: not a regular file, and only such can be mapped")
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise GGUFError(f"{path}: the file is empty")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Part(path, np.frombuffer(mapping, "u1"), read_header(memoryview(mapping), str(path)))


def _split_number(part: _Part, key: str, default: int) -> int:
    """Return one of the numbers that say how a model is split."""
    value = part.header.metadata.get(key, default)
    if not isinstance(value, int):
        raise GGUFError(f"{part.path}: {key} is {value!r}; it must be an integer")
    return value


def _other_parts(first: _Part, count: int) -> Iterator[_Part]:
    """Map the second to the last file of a split model."""
    number = _split_number(first, Keys.Split.LLM_KV_SPLIT_NO, 0)
    ending = f"-{number + 1:05}-of-{count:05}.gguf"
    if not first.path.name.endswith(ending):
        problem = f"part {number + 1} of {count} of a split model, so its name must end in {ending}"
        raise GGUFError(f"{first.path}: {problem}, and the other parts must lie beside it")
    stem = first.path.name.removesuffix(ending)
    if number:
        raise GGUFError(f"{first.path}: a later part of a split model; open {stem}-00001-of-{count:05}.gguf")
    for index in range(1, count):
        part = _map(first.path.with_name(f"{stem}-{index + 1:05}-of-{count:05}.gguf"))
        number = _split_number(part, Keys.Split.LLM_KV_SPLIT_NO, 0)
        if number != index:
            raise GGUFError(f"{part.path}: its header says part {number + 1}, its name part {index + 1}")
        yield part
