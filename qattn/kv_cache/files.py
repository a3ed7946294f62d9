"""Saved sequences: a file is a header, the sequences as they lie in memory, and a digest of all that.

::

    8 bytes   "qattn-kv"
    uint32    version, then the length of the description
    JSON      the description: what the cache stores, how, and the length of each sequence
    bytes     for each sequence its positions (int64), and the entries of each array from the first token still there
    16 bytes  BLAKE2b of what comes before

All numbers are little-endian.  Reading such a file runs nothing, and whatever it says is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qattn import _check
from qattn.errors import CacheError
from qattn.kv_cache import layouts
from qattn.kv_cache.layouts import Layout

Array = np.ndarray[Any, Any]
_MAGIC, _VERSION, _DIGEST = b"qattn-kv", 1, 16
_HEAD = len(_MAGIC) + 8
_PIECE = 1 << 24  # bytes that are hashed, read or written at once


class Sequence(NamedTuple):
    """A sequence as it lies in memory."""

    start: int
    """The first token that is there."""
    positions: Array
    """(tokens,) int64, also of those that aren't."""
    arrays: list[Array]
    """(kv_heads, entries, …) each: keys and values from `start` on."""


class Saved(NamedTuple):
    """A file that has been read."""

    description: dict[str, Any]
    sequences: list[Sequence]

    def layout(self, params: Any, path: str | os.PathLike[str]) -> Layout:
        """How sequences lie in the file, of a cache with these parameters; CacheError if it was saved by another."""
        for layout in layouts.ALL:
            want = describe(params, layout)
            if all(self.description.get(name) == want[name] for name in want):
                return layout
        theirs, mine = self.description.get("params"), want["params"]
        if theirs != mine and isinstance(theirs, dict):
            differ = [f"{name} {theirs.get(name)!r} (the cache has {mine[name]!r})" for name in mine
                      if theirs.get(name) != mine[name]]  # fmt: skip
            raise CacheError(f"{os.fspath(path)} was saved with {', '.join(differ) or 'other parameters'}")
        says = ", ".join(f"{name} {self.description.get(name)}" for name in want)
        raise CacheError(f"{os.fspath(path)} is no saved cache: no cache has {says}")


def describe(params: Any, layout: Layout) -> dict[str, Any]:
    """What a file says of a cache, beside its sequences; params : KVCacheParams"""
    says = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    says.pop("max_length", None)
    says["value_dim"] = params.values
    return {
        "params": json.loads(json.dumps(says)), "layout": type(layout).__name__, "step": layout.step,
        "entries": [[element, params.n_kv_heads, size] for element, size in layout.entries(params)],
    }  # fmt: skip


def save(
    path: str | os.PathLike[str], description: dict[str, Any], sequences: list[Sequence], *, overwrite: bool
) -> None:
    """Write a file under another name, and give it its own when it is complete.

    Raises
    ------
    FileExistsError
        If there is such a file, unless it may be overwritten; what is no regular file may not.
    """
    path = os.path.realpath(os.fsdecode(path))  # a link stays one
    if os.path.exists(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists; say overwrite=True to replace it")
        if not os.path.isfile(path):
            raise FileExistsError(f"{path} is no regular file, and is not replaced")
    lengths = [{"start": each.start, "length": len(each.positions)} for each in sequences]
    text = json.dumps(description | {"sequences": lengths}).encode()
    head = _MAGIC + np.array([_VERSION, len(text)], "<u4").tobytes() + text
    blobs = (a for each in sequences for a in (each.positions, *each.arrays))
    directory, name = os.path.split(path)
    if not os.path.isdir(directory or "."):
        raise FileNotFoundError(f"{directory} is not a directory, so {name} can't be written there")
    with open(os.path.join(directory, f".qattn-{secrets.token_hex(8)}"), "xb") as file:
        try:
            if os.path.exists(path):
                os.chmod(file.name, stat.S_IMODE(os.stat(path).st_mode))
            digest = hashlib.blake2b(digest_size=_DIGEST)
            for piece in (head, *map(_bytes, blobs)):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if overwrite:
                os.replace(file.name, path)
            else:
                _rename(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def _bytes(array: Array) -> Any:
    """An array's content as a buffer."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _rename(name: str, path: str) -> None:
    """Give a file another name, which no other file may have got meanwhile."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists; say overwrite=True to replace it") from None
    except OSError:  # a file system without links
        os.replace(name, path)
    else:
        os.unlink(name)


def load(path: str | os.PathLike[str]) -> Saved:
    """Read a file, without copying what may be large.

    Raises
    ------
    CacheError
        If it is damaged, or is no saved cache.
    """
    path = os.fsdecode(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise CacheError(f"{path} is no regular file")
    with open(path, "rb") as file:
        head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
    if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not head:
        raise CacheError(f"{path} is no saved cache: it begins with {head[:8]!r}, not {_MAGIC!r}")
    if len(head) < _HEAD or size < _HEAD + _DIGEST:
        raise CacheError(f"{path} is damaged: it has {size} bytes, less than a header")
    version, length = np.frombuffer(head[len(_MAGIC) :], "<u4").tolist()
    if version != _VERSION:
        raise CacheError(f"{path} has version {version}; this qattn reads version {_VERSION}")
    data = np.memmap(path, np.uint8, "r")
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for first in range(0, len(data) - _DIGEST, _PIECE):
        digest.update(data[first : min(first + _PIECE, len(data) - _DIGEST)].data)
    if digest.digest() != data[-_DIGEST:].tobytes():
        raise CacheError(f"{path} is damaged: its checksum is wrong (it was changed, or cut off)")
    try:
        description = json.loads(data[_HEAD : _HEAD + length].tobytes())
        sequences = list(_sequences(description, data[_HEAD + length : -_DIGEST]))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:  # the digest is right: someone made it so
        raise CacheError(f"{path} is no saved cache: {error or type(error).__name__}") from None
    return Saved(description, sequences)


def _sequences(description: dict[str, Any], data: Array) -> Iterator[Sequence]:
    """The sequences that are described, checked."""
    step, at = _integer(description["step"], 1), 0

    def take(dtype: str, *shape: int) -> Array:
        nonlocal at
        size = np.dtype(dtype).itemsize
        for length in shape:
            size *= length
        if size > len(data) - at:
            raise ValueError("its sequences are longer than the file")
        at += size
        return data[at - size : at].view(dtype).reshape(shape)

    entries = [(_element(dtype), _integer(heads, 1), _integer(n, 1)) for dtype, heads, n in description["entries"]]
    for each in description["sequences"]:
        start, length = _integer(each["start"], 0), _integer(each["length"], 0)
        if start % step or start > length:
            raise ValueError(f"a sequence of {length} tokens begins at {start}")
        positions, count = take("<i8", length), -(-length // step) - start // step
        _check.positions("positions", positions)
        arrays = [take(dtype, heads, count, n) for dtype, heads, n in entries]
        yield Sequence(start, positions.astype(np.int64), arrays)
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over")


def _integer(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no number of at least {least}")
    return value


def _element(dtype: Any) -> str:
    if dtype not in ("<f4", "<f2", "<u4", "<u2", "|u1", "|i1"):
        raise ValueError(f"{dtype!r} is no type of elements")
    return str(dtype)
