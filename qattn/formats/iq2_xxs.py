"""IQ2_XXS: 256 weights in groups of 32: an f16 scale, then for each group four indices into a grid of 8 magnitudes,
and a word with 4 · 7 bits of signs and 4 bits of step.  Source: ggml's block_iq2_xxs.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._grids import EVEN_SIGNS, grid, signed
from qattn.formats._registry import Format, register

_GRID = grid("IQ2_XXS")


def code(b: Any, i: int) -> Any:
    at, octet = 2 + (i >> 5) * 8, (i >> 3) & 3
    word = b[at + 4] | b[at + 5] << 8 | b[at + 6] << 16 | b[at + 7] << 24
    sign = (EVEN_SIGNS[(word >> (7 * octet)) & 127] >> (i & 7)) & 1
    return _GRID[b[at + octet], i & 7] + 3 * sign


def step(b: Any, g: int) -> Any:
    return 2 * (b[9 + 8 * g] >> 4) + 1


register(
    Format(
        "IQ2_XXS",
        type_id=16,
        block=256,
        bytes=66,
        group=32,
        bits=3,
        code=code,
        table=signed(8, 25, 43),
        scale_bits=word_at(0),
        scale_unit=1 / 8,
        step=step,
    )
)
