"""The types that keys and values are stored as, described once for the kernels of all devices.

A float type narrows each element by itself.  A block type rounds 32 neighbours along a head together, as ggml's format
of the same name does: an element is ``scale · level``, plus an offset where the type has one, with scale and offset in
float16.  Heads whose size is no multiple of 32 are padded with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

LARGEST_F16 = 65504.0  # above it, float16 is infinite
BLOCK = 32  # elements that share a scale


class CacheType(NamedTuple):
    """What an element of a key or value is."""

    name: str
    """What `KVCacheParams` calls it."""
    kind: str
    """What kernels call it."""
    bits: int
    """Of an element, or of its code."""
    rounding: str = ""
    """How a block is rounded; empty for float types.  "amax": the largest magnitude becomes ±127.  "peak": the element
    of largest magnitude, with its sign, becomes the lowest level.  "range": the smallest becomes code 0, which is the
    offset, and the largest the highest code.  "table": the peak becomes the first level, then the scale is fitted."""
    zero: int = 0
    """The code of level 0."""
    table: tuple[int, ...] = ()
    """The levels that codes stand for, if they are no consecutive integers."""

    @property
    def in_blocks(self) -> bool:
        """Whether elements are codes that share a scale."""
        return bool(self.rounding)

    @property
    def offset(self) -> bool:
        """Whether a block has an offset."""
        return self.rounding == "range"

    @property
    def signed_scale(self) -> bool:
        """Whether a scale may be negative."""
        return self.rounding in ("peak", "table")

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 elements."""
        return BLOCK * self.bits // 8 + 2 * self.in_blocks + 2 * self.offset

    def row_bytes(self, size: int) -> int:
        """Bytes of a key or value of `size` elements."""
        return -(-size // BLOCK) * self.block_bytes if self.in_blocks else size * self.bits // 8


IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl

TYPES = (
    CacheType("float32", "f32", 32),
    CacheType("float16", "f16", 16),
    CacheType("bfloat16", "bf16", 16),
    CacheType("float8", "f8", 8),  # e4m3: 4 bits of exponent, 3 of mantissa, no infinity; beyond ±448 it is ±448
    CacheType("q8_0", "q8_0", 8, "amax", zero=128),
    CacheType("q5_1", "q5_1", 5, "range"),
    CacheType("q5_0", "q5_0", 5, "peak", zero=16),
    CacheType("q4_1", "q4_1", 4, "range"),
    CacheType("q4_0", "q4_0", 4, "peak", zero=8),
    CacheType("iq4_nl", "iq4_nl", 4, "table", table=IQ4_NL_LEVELS),
)
_BY_KIND = {type_.kind: type_ for type_ in TYPES}


def of_kind(kind: str) -> CacheType:
    """The type that kernels call `kind`."""
    return _BY_KIND[kind]


def named(name: str) -> CacheType:
    """The type of that name.

    Raises
    ------
    ValueError
        There is none.
    """
    for type_ in TYPES:
        if type_.name == name:
            return type_
    raise ValueError(f"dtype is {name!r}; a cache stores {', '.join(type_.name for type_ in TYPES)}")


def padded(size: int) -> int:
    """The elements of a row as tensor cores take them."""
    return -(-size // 16) * 16


def stride(kind: str, size: int) -> int:
    """Array elements between rows of `size` elements on a GPU, `padded` for tensor cores if they are halves or bytes;
    of codes, bytes."""
    type_ = of_kind(kind)
    if type_.in_blocks:
        return -(-type_.row_bytes(size) // 4) * 4
    return size if kind == "f32" else padded(size)
