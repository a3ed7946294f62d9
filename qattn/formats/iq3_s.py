"""IQ3_S: 256 weights in groups of 32: an f16 scale, low bytes of 9-bit indices into a grid of 4 magnitudes, their upper
bits, signs, then 4-bit steps.  Source: ggml's block_iq3_s.
"""

from typing import Any

from qattn.formats._bits import odd_nibble_step_at, word_at
from qattn.formats._grids import grid, signed
from qattn.formats._registry import Format, register

_GRID = grid("IQ3_S")


def code(b: Any, i: int) -> Any:
    quad = i >> 2
    index = b[2 + quad] | ((b[66 + (quad >> 3)] >> (quad & 7)) & 1) << 8
    return _GRID[index, i & 3] + 8 * ((b[74 + (i >> 3)] >> (i & 7)) & 1)


register(
    Format(
        "IQ3_S",
        type_id=21,
        block=256,
        bytes=110,
        group=32,
        bits=4,
        code=code,
        table=signed(1, 3, 5, 7, 9, 11, 13, 15),
        scale_bits=word_at(0),
        step=odd_nibble_step_at(106),
    )
)
