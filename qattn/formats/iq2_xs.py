"""IQ2_XS: 256 weights in groups of 16: an f16 scale, for 8 weights each a word with 9 bits of an index into a grid and
7 bits of signs, then 4-bit steps.  Source: ggml's block_iq2_xs.
"""

from typing import Any

from qattn.formats._bits import odd_nibble_step_at, word_at
from qattn.formats._grids import EVEN_SIGNS, grid, signed
from qattn.formats._registry import Format, register

_GRID = grid("IQ2_XS")


def code(b: Any, i: int) -> Any:
    at = 2 + (i >> 3) * 2
    sign = (EVEN_SIGNS[b[at + 1] >> 1] >> (i & 7)) & 1
    return _GRID[b[at] | (b[at + 1] & 1) << 8, i & 7] + 3 * sign


register(
    Format(
        "IQ2_XS",
        type_id=17,
        block=256,
        bytes=74,
        group=16,
        bits=3,
        code=code,
        table=signed(8, 25, 43),
        scale_bits=word_at(0),
        scale_unit=1 / 8,
        step=odd_nibble_step_at(66),
    )
)
