"""IQ3_XXS: 256 weights in groups of 32: an f16 scale, indices into a grid of 4 magnitudes, then for each group a word
with 4 · 7 bits of signs and 4 bits of step.  Source: ggml's block_iq3_xxs.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._grids import EVEN_SIGNS, grid, signed
from qattn.formats._registry import Format, register

_GRID = grid("IQ3_XXS")


def code(b: Any, i: int) -> Any:
    at = 66 + (i >> 5) * 4
    word = b[at] | b[at + 1] << 8 | b[at + 2] << 16 | b[at + 3] << 24
    sign = (EVEN_SIGNS[(word >> (7 * ((i >> 3) & 3))) & 127] >> (i & 7)) & 1
    return _GRID[b[2 + (i >> 2)], i & 3] + 8 * sign


def step(b: Any, g: int) -> Any:
    return 2 * (b[69 + 4 * g] >> 4) + 1


register(
    Format(
        "IQ3_XXS",
        type_id=18,
        block=256,
        bytes=98,
        group=32,
        bits=4,
        code=code,
        table=signed(4, 12, 20, 28, 36, 44, 52, 62),
        scale_bits=word_at(0),
        scale_unit=1 / 4,
        step=step,
    )
)
