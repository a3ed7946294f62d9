"""IQ1_M: IQ1_S with groups of 16 and a shift for each 8 weights; the f16 scale is the upper four bits of four words.

Shifts are finer than groups here, so they are part of the level: digit ± 1/8, counted in eighths, an odd integer.  The
upper half of the levels has the shift upwards.

Source: ggml's block_iq1_m.
"""

from typing import Any

from qattn.formats._registry import Format, register
from qattn.formats.iq1_s import GRID

LEVELS = (-9, -1, 7, 15, -7, 1, 9, 17)  # of digits -1, 0 and 1; a 2 never occurs


def code(b: Any, i: int) -> Any:
    """Bytes 0 to 31 are low bytes of indices; bytes 32 to 47 hold a nibble for each: 3 upper bits, the shift's sign."""
    octet = i >> 3
    nibble = (b[32 + (octet >> 1)] >> (4 * (octet & 1))) & 15
    return GRID[b[octet] | (nibble & 7) << 8, i & 7] | (nibble >> 3 ^ 1) << 2


def shared(b: Any, g: int) -> Any:
    return ((b[32 + g] >> 3) & 1 | (b[32 + g] >> 7) << 1) ^ 3


def scale_bits(b: Any, g: int) -> Any:
    return b[49] >> 4 | (b[51] >> 4) << 4 | (b[53] >> 4) << 8 | (b[55] >> 4) << 12


def step(b: Any, g: int) -> Any:
    at = 48 + (g >> 2) * 2
    return 2 * (((b[at] | b[at + 1] << 8) >> (3 * (g & 3))) & 7) + 1


register(
    Format(
        "IQ1_M",
        type_id=29,
        block=256,
        bytes=56,
        group=16,
        bits=3,
        code=code,
        shared=shared,
        table=LEVELS,
        scale_bits=scale_bits,
        scale_unit=1 / 8,
        step=step,
    )
)
