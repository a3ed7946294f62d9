"""Q3_K: 256 weights in groups of 16: the third bits of the codes, their lower two, 6-bit steps, an f16 scale.

Source: ggml's block_q3_K.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    low = (b[32 + (i >> 7) * 32 + (i & 31)] >> (2 * ((i >> 5) & 3))) & 3
    return low | ((b[i & 31] >> (i >> 5)) & 1) << 2


def step(b: Any, g: int) -> Any:
    """12 bytes: nibbles of steps 0-7 (low) and 8-15 (high), then their upper pairs of bits, four in a byte."""
    low = (b[96 + (g & 7)] >> (4 * (g >> 3))) & 15
    return (low | ((b[104 + (g & 3)] >> (2 * (g >> 2))) & 3) << 4) - 32


register(
    Format(
        "Q3_K",
        type_id=11,
        block=256,
        bytes=110,
        group=16,
        bits=3,
        code=code,
        zero=4,
        scale_bits=word_at(108),
        step=step,
    )
)
