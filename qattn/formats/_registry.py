"""What a format is, and the registry of all of them.

A format is described by *snippets*: small functions of a block's bytes that give one code, one scale and so on.  They
are plain arithmetic, so that the same function serves three readers: Numba compiles it, for GPUs and for scales; CPU
kernels run it for codes, on vectors (`qattn.cpu.codes`); and NumPy runs it for many blocks at once (``b[j]`` is the
j-th byte of each, as int64).  A snippet may branch on an index, but neither among the 16 that begin with a multiple of
16, nor on the content of a block.  A code book is a global array, whose rows neighbours read whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from qattn._modules import import_all
from qattn.errors import FormatError

Array = np.ndarray[Any, Any]
Snippet = Callable[[Any, int], Any]
"""(bytes of a block, index of a weight or of a group) → integer."""


class Planes(NamedTuple):
    """n blocks taken apart: ``weight = scale · level + offset``, group by group, in float32."""

    levels: Array
    """(n, block) int16."""
    scale: Array
    """(n, block / group) float32."""
    offset: Array | None
    """(n, block / group) float32, or None where the format has no offsets."""


@dataclass(frozen=True, eq=False)  # there is one of each: compared, and hashed for caches, by identity
class Format:
    """How one of GGUF's formats writes weights down.

    A level is ``table[code]``, or ``code - zero`` for formats without a table.  A scale is the value of `scale_bits`
    times `scale_unit` times `step`; an offset likewise.
    """

    name: str
    type_id: int
    """ggml's number of the format."""
    block: int
    """Weights that are written down together."""
    bytes: int
    """Bytes of a block."""
    group: int = 1
    """Weights that share a scale."""
    bits: int = 0
    """Bits of a code."""
    code: Snippet | None = None
    """The code of weight i, 0 … 2**bits - 1."""
    shared: Snippet | None = None
    """The uppermost bits of the codes of group g, one for each eight weights, if these share it: steps are 0 … 15 then,
    and both halves of the table go up by the same power of two."""
    zero: int = 0
    """The code of level 0."""
    table: tuple[int, ...] | None = None
    """The levels that codes stand for, if they are no consecutive integers."""
    scale_bits: Snippet | None = None
    """The bits of the scale of group g, of the whole block if there are steps."""
    scale_type: Literal["f16", "e8m0", "ue4m3"] = "f16"
    """What number these bits are: see `scale_values`."""
    scale_unit: float = 1.0
    """A power of two, perhaps negative."""
    step: Snippet | None = None
    """An int8 factor of the scale of group g."""
    offset_bits: Snippet | None = None
    """As `scale_bits`, for formats with offsets."""
    offset_unit: float = 1.0
    offset_step: Snippet | None = None
    paired: bool = False
    """Steps of scales and of offsets are 0 … 15, so that a byte holds both."""
    dtype: np.dtype[Any] | None = None
    """What a float format's weights are, bfloat16 as uint16; None for block formats."""

    @property
    def is_float(self) -> bool:
        """Whether weights are plain floating-point numbers."""
        return self.dtype is not None

    @functools.cached_property
    def scales(self) -> Array:
        """The float32 value of each pattern of a scale's bits, times its unit."""
        return self.values(self.scale_unit)

    @functools.cached_property
    def offsets(self) -> Array:
        """The same for an offset's bits."""
        return self.values(self.offset_unit)

    def values(self, unit: float) -> Array:
        """The float32 value of each pattern of bits, times a unit."""
        bits = np.arange(65536 if self.scale_type == "f16" else 256)
        with np.errstate(invalid="ignore"):  # NaN and infinite scales are legal
            return scale_values(self.scale_type, bits) * np.float32(unit)

    def split(self, blocks: Array) -> Planes:
        """Take (n, bytes) uint8 blocks apart.  Exact, and slow: kernels compile the snippets instead."""
        b = blocks.astype(np.int64).T
        codes = np.stack([self.code(b, i) for i in range(self.block)], axis=-1, dtype=np.int64)  # type: ignore[misc]
        levels = np.array(self.table)[codes] if self.table else codes - self.zero
        scale = self._groups(b, self.scale_bits, self.scales, self.step)
        offset = self._groups(b, self.offset_bits, self.offsets, self.offset_step) if self.offset_bits else None
        return Planes(levels.astype(np.int16), scale, offset)

    def _groups(self, b: Array, bits: Any, values: Array, step: Snippet | None) -> Array:
        """A scale or an offset for each group, (n, block / group) float32."""
        groups = range(self.block // self.group)
        base = values[np.stack([bits(b, g) for g in groups], axis=-1)]
        with np.errstate(invalid="ignore"):
            return base if step is None else base * np.stack([step(b, g) for g in groups], axis=-1, dtype=np.float32)


def scale_values(scale_type: str, bits: Array) -> Array:
    """The float32 values of a scale's bits.

    "f16" is IEEE binary16.  "e8m0" is a power of two, 2**(bits - 128).  "ue4m3" has 4 bits of exponent, biased by 7,
    and 3 of mantissa, and is halved; 127 means 0.  The last two go with levels that are twice the e2m1 values which the
    OCP Microscaling specification, and NVIDIA's format, scale.
    """
    bits = np.asarray(bits)
    if scale_type == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    if scale_type == "e8m0":
        return np.ldexp(1.0, bits - 128).astype(np.float32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    value = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 11), np.ldexp(1.0 * mantissa, -10))
    return np.where(bits == 127, 0, value).astype(np.float32)


_formats: dict[str, Format] = {}


def register(format: Format) -> Format:
    """Make a format known by its name and number."""
    for other in _formats.values():
        if other.name == format.name or other.type_id == format.type_id:
            raise ValueError(f"two formats claim a name or number: {other} and {format}")
    _formats[format.name] = format
    return format


@functools.cache
def _discovered() -> dict[str, Format]:
    import_all("qattn.formats")
    return _formats


@functools.cache
def _types() -> dict[int, Format]:
    return {format.type_id: format for format in _discovered().values()}


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all formats."""
    return tuple(sorted(_discovered()))


def get(name: str) -> Format:
    """The format of that name.

    Raises
    ------
    FormatError
        There is none.
    """
    found = _discovered().get(name)
    if found is None:
        raise FormatError(f"there is no format {name!r}; known: {', '.join(names())} (qattn.formats.names())")
    return found


def by_type(type_id: int) -> Format:
    """The format that ggml gives this number.

    Raises
    ------
    FormatError
        There is none.
    """
    found = _types().get(type_id)
    if found is None:
        raise FormatError(f"there is no format of type {type_id}; known: {', '.join(names())} (qattn.formats.names())")
    return found


def dequantize_reference(format: Format, data: Array) -> Array:
    """The values of rows (..., row_bytes) uint8 → (..., columns) float32, by NumPy alone."""
    columns = data.shape[-1] // format.bytes * format.block
    shape = (*data.shape[:-1], columns)
    if format.dtype is not None:
        values = np.ascontiguousarray(data).view(format.dtype)
        if format.name == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return values.astype(np.float32).reshape(shape)
    planes = format.split(data.reshape(-1, format.bytes))
    with np.errstate(invalid="ignore"):
        values = planes.levels.astype(np.float32) * np.repeat(planes.scale, format.group, axis=1)
        if planes.offset is not None:
            values += np.repeat(planes.offset, format.group, axis=1)
    return values.reshape(shape)
