"""How packed weights lie in memory: what the kernels of all devices read.

Rows come in tiles of 16, columns in cells of 32.  A tile's codes lie cell by cell: a cell of ``bits`` planes holds, for
each quad of columns, 4 codes of each of the 16 rows, split into 4-, 2- and 1-bit planes::

    quad q of a 4-bit plane   bits 4(q & 1) … +3 of byte (q >> 1) · 64 + 4 · row + column
    quad q of a 2-bit plane   bits 2(q & 3) … +1 of byte (q >> 2) · 64 + …
    quad q of a 1-bit plane   bit q of byte …

So a 16-lane vector of a CPU takes one quad of all rows, and a word is what the four-byte dot products of CPUs and GPUs,
and the fragments of a GPU's tensor cores, consist of.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TILE = 16  # rows that lie side by side
CELL = 32  # columns that share one activation scale
OCTET = 8  # columns that may share a bit of their codes
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


class Layout(NamedTuple):
    """What a kernel must know of packed weights.  No format's name is in it."""

    bits: int
    """Bits of a code; 16 or 32 for weights that stay floats."""
    table: bool = False
    """Codes index a table of levels, else they are levels plus a zero point."""
    group: int = CELL
    """Columns that share a scale."""
    base_group: int = CELL
    """Columns that share a base scale."""
    base: str = "f16"
    """What a base scale is stored as, or a float weight: "f16", "bf16", "f32"."""
    step: bool = False
    """scale = base · step, with an int8 step for each group."""
    down: int = 0
    """Scales are so many times halved: base · step / 2**down."""
    up: int = 0
    """Without a table, codes stand for bytes: this many bits further up."""
    shared: int = 0
    """What the codes of the group's i-th eight columns gain if bit 4 + i of its step is set.  If they gain anything,
    the step itself is 0 … 15, the lower four bits."""
    offset: bool = False
    """There is an offset for each group, built like the scale."""
    paired: bool = False
    """The steps of scale and offset are 0 … 15, the lower and the upper four bits of a byte."""
    zero: int = 0
    """The code of level 0."""
    signed: bool = False
    """Codes of 8 bits are signed, since the machine's dot product wants them so."""

    @property
    def largest(self) -> int:
        """The largest byte that codes stand for, or the largest magnitude of signed ones."""
        if self.signed:
            return 128
        if self.table or self.up:
            return 2 * self.zero  # such levels reach further down than up
        return (1 << self.bits) - 1

    @property
    def nibbles(self) -> bool:
        """Whether a scale's step is the lower four bits of its byte."""
        return self.paired or self.shared > 0

    def name(self) -> str:
        """A name for caches, unique and fit for a file."""
        defaults = self._field_defaults
        return "-".join(
            name if value is True else f"{name}{value}"
            for name, value in zip(self._fields, self, strict=True)
            if value != defaults.get(name)
        )


class Packed(NamedTuple):
    """The arrays of packed weights, for `tiles` of 16 rows and K columns."""

    codes: np.ndarray
    """(tiles, K / 32, 64 · bits) uint8; for float weights (tiles, K, 16)."""
    scales: np.ndarray
    """(tiles, K / base_group, 16) float16 or bfloat16 as uint16, or float32."""
    steps: np.ndarray
    """(tiles, K / group, 16) int8; empty if the layout has no steps."""
    offsets: np.ndarray
    offset_steps: np.ndarray
    """Likewise; empty if these steps are `paired` with the others."""
    table: np.ndarray
    """64 bytes: the levels plus the zero point, four times over."""
    targets: np.ndarray
    """(rows,) int32: which rows of the whole matrix these are, and so which columns of the product they give."""
    rows: int
