"""IQ2_S: 256 weights in groups of 16: an f16 scale, low bytes of 10-bit indices into a grid of 8 magnitudes, signs, the
upper bits of the indices, then 4-bit steps.  Source: ggml's block_iq2_s.
"""

from typing import Any

from qattn.formats._bits import odd_nibble_step_at, word_at
from qattn.formats._grids import grid, signed
from qattn.formats._registry import Format, register

_GRID = grid("IQ2_S")


def code(b: Any, i: int) -> Any:
    octet = i >> 3
    index = b[2 + octet] | ((b[66 + (octet >> 2)] >> (2 * (octet & 3))) & 3) << 8
    return _GRID[index, i & 7] + 3 * ((b[34 + octet] >> (i & 7)) & 1)


register(
    Format(
        "IQ2_S",
        type_id=22,
        block=256,
        bytes=82,
        group=16,
        bits=3,
        code=code,
        table=signed(8, 25, 43),
        scale_bits=word_at(0),
        scale_unit=1 / 8,
        step=odd_nibble_step_at(74),
    )
)
