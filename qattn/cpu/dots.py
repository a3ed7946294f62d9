"""Sums of dot products of bytes, for rows that are multiplied by the same codes.

Most machines add four products of bytes to an int32 in an instruction or two.  AVX2 without VNNI has one that adds two
products to an int16, and one that adds two int16 to an int32.  There, products of small codes are added up as int16 for
as long as they can't overflow, which takes little more than half of the instructions.
"""

from __future__ import annotations

from collections.abc import Callable

from qattn.cpu.simd import PAIRS, Emitter, Value

LEVEL = 127  # the largest magnitude of a rounded activation, or query


class Dots:
    """Sums of four bytes' products for 16 lanes of int32, one for each of several rows.

    Parameters
    ----------
    starts : list of Value
        The first value of each sum: int32.
    count : int
        How many products are added to each, of 64 bytes.
    codes : int
        The largest code, an unsigned byte, or the largest magnitude of a `signed` one.
    x : int
        The largest magnitude of what codes are multiplied by.
    """

    def __init__(
        self, e: Emitter, starts: list[Value], count: int, codes: int, signed: bool = False, x: int = LEVEL
    ) -> None:
        self.e, self._sums, self._dot = e, list(starts), Emitter.dot4_signed if signed else Emitter.dot4
        room = 32767 // (2 * codes * x) if PAIRS and not signed else 1
        self._room = room if room >= count else min(room, 2)
        self._pairs: dict[int, Value] = {}
        self._added = [0] * len(starts)
        # Products of a row that are added one after the other, before those of the next row: so that either the sums
        # of int16 need registers for long, or those of int32.
        self._together = 2 if self._room == 2 < count else 1

    def add_all(self, quads: range, codes: Callable[[int], Value], x: Callable[[int, int], Value]) -> None:
        """Add the products of ``codes(quad)`` and ``x(quad, row)``, for all rows; codes are asked for once each."""
        for first in quads[:: self._together]:
            taken = [(quad, codes(quad)) for quad in range(first, first + self._together)]
            for row in range(len(self._sums)):
                for quad, code in taken:
                    self.add(row, code, x(quad, row))
            self._settle()

    def add(self, row: int, codes: Value, x: Value) -> None:
        """Add the products of 64 bytes of codes and a row's."""
        if self._room < 2:
            self._sums[row] = self._dot(self.e, self._sums[row], codes, x)
            return
        products = self.e.pair_products(codes, x)
        self._pairs[row] = self._pairs[row] + products if row in self._pairs else products
        self._added[row] += 1
        if self._added[row] == self._room:
            self._add_up(row)

    def _settle(self) -> None:
        """Let the machine finish what was added before it goes on."""
        if self._pairs:
            self._pairs = dict(zip(self._pairs, self.e.settled(list(self._pairs.values())), strict=True))
        else:
            self._sums = self.e.settled(self._sums)

    def total(self, row: int) -> Value:
        """The sum, 16 int32."""
        self._add_up(row)
        return self._sums[row]

    def _add_up(self, row: int) -> None:
        if row in self._pairs:
            self._sums[row], self._added[row] = self.e.add_pairs(self._sums[row], self._pairs.pop(row)), 0
