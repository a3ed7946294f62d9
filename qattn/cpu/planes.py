"""Reads codes out of the planes of a cell, see `qattn.layout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qattn.cpu.simd import Value
from qattn.layout import PLANES


def quad_codes(vector: Callable[[int], Value], bits: int, quad: int, clean: bool = True, up: int = 0) -> Value:
    """The codes of a quad of columns: 16 int32 of four bytes each.

    vector : gives a vector of a cell, 16 int32, by its number
    clean : whether bits above a code's are 0; a table lookup does without
    up : how many bits further up the codes are wanted
    """
    first, shift = 0, 0
    word: Any = 0
    for plane in PLANES[bits]:
        quads = 8 // plane  # that share a vector
        part, at = vector(first + quad // quads), plane * (quad % quads) - shift - up
        part = part >> at if at > 0 else part << -at
        end = shift + plane
        mask = (1 << end if clean or end < bits else 256) - (1 << shift) << up
        word = (part & mask * 0x01010101) | word
        first, shift = first + plane, end
    return word
