"""IQ1_S: 256 weights in groups of 32: an f16 scale, low bytes of 11-bit indices into a grid of 8 ternary digits, then
for each group a word with their upper bits, 3 bits of step and the sign of a shift by 1/8.  Source: ggml's block_iq1_s.

A weight is scale · step · (digit ± 1/8): the shift is an offset of its group, an eighth of its scale.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._grids import grid
from qattn.formats._registry import Format, register

GRID = grid("IQ1_S")


def code(b: Any, i: int) -> Any:
    at, octet = 34 + (i >> 5) * 2, i >> 3
    word = b[at] | b[at + 1] << 8
    return GRID[b[2 + octet] | ((word >> (3 * (octet & 3))) & 7) << 8, i & 7]


def step(b: Any, g: int) -> Any:
    return 2 * ((b[35 + 2 * g] >> 4) & 7) + 1


def offset_step(b: Any, g: int) -> Any:
    high = b[35 + 2 * g]
    return (2 * ((high >> 4) & 7) + 1) * (1 - 2 * (high >> 7))


register(
    Format(
        "IQ1_S",
        type_id=19,
        block=256,
        bytes=50,
        group=32,
        bits=2,
        code=code,
        zero=1,
        scale_bits=word_at(0),
        step=step,
        offset_bits=word_at(0),
        offset_unit=1 / 8,
        offset_step=offset_step,
    )
)
