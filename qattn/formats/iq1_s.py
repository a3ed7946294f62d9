"""IQ1_S: 256 weights in groups of 32: an f16 scale, low bytes of 11-bit indices into a grid of 8 ternary digits, then
for each group a word with their upper bits, 3 bits of step and the sign of a shift by 1/8.  Source: ggml's block_iq1_s.

A weight is scale · step · (digit ± 1/8).  The step takes the sign of the shift, and the digit with it, so that three
levels remain, in eighths: -9, -1 and 7.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._grids import grid
from qattn.formats._registry import Format, register

GRID = grid("IQ1_S")


def code(b: Any, i: int) -> Any:
    at, octet = 34 + (i >> 5) * 2, i >> 3
    word = b[at] | b[at + 1] << 8
    digit = GRID[b[2 + octet] | ((word >> (3 * (octet & 3))) & 7) << 8, i & 7]
    turned = 2 * (word >> 15 ^ 1)  # 2 for a positive shift, whose codes are 2 - digit: 1 stays, others turn a bit
    return digit ^ turned & (digit << 1 ^ 2)


def step(b: Any, g: int) -> Any:
    high = b[35 + 2 * g]
    return (2 * ((high >> 4) & 7) + 1) * (2 * (high >> 7) - 1)


register(
    Format(
        "IQ1_S",
        type_id=19,
        block=256,
        bytes=50,
        group=32,
        bits=2,
        code=code,
        table=(-9, -1, 7),
        scale_bits=word_at(0),
        scale_unit=1 / 8,
        step=step,
    )
)
