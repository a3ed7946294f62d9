"""Ways to write integers into bytes that several formats share, as snippets: see `qattn.formats._registry`."""

from __future__ import annotations

from typing import Any

from qattn.formats._registry import Snippet


def word_at(start: int) -> Snippet:
    """Bytes start and start + 1 as a little-endian number, whatever the index: an f16 of the whole block."""

    def word(b: Any, g: int) -> Any:
        return b[start] | b[start + 1] << 8

    return word


def nibbles_at(start: int) -> Snippet:
    """32 codes of 4 bits in 16 bytes: the first 16 are the low halves."""

    def nibble(b: Any, i: int) -> Any:
        return (b[start + (i & 15)] >> (4 * (i >> 4))) & 15

    return nibble


def strided_nibbles_at(start: int) -> Snippet:
    """256 codes of 4 bits in 128 bytes: of each 32 bytes, the low halves come first."""

    def nibble(b: Any, i: int) -> Any:
        return (b[start + (i >> 6) * 32 + (i & 31)] >> (4 * ((i >> 5) & 1))) & 15

    return nibble


def strided_pairs_at(start: int) -> Snippet:
    """256 codes of 2 bits in 64 bytes: of each 32 bytes, the lowest pairs of bits come first."""

    def pair(b: Any, i: int) -> Any:
        return (b[start + (i >> 7) * 32 + (i & 31)] >> (2 * ((i >> 5) & 3))) & 3

    return pair


def odd_nibble_step_at(start: int) -> Snippet:
    """The step 2 · n + 1 of group g, where n is a nibble, two in a byte."""

    def step(b: Any, g: int) -> Any:
        return 2 * ((b[start + (g >> 1)] >> (4 * (g & 1))) & 15) + 1

    return step
