"""Q4_K: 256 weights in groups of 32: two f16, 6-bit steps of scale and offset, 4-bit codes.

Source: ggml's block_q4_K.
"""

from typing import Any

from qattn.formats._bits import strided_nibbles_at, word_at
from qattn.formats._registry import Format, register


def step(b: Any, g: int) -> Any:
    """12 bytes: steps 0-3, offset steps 0-3, nibbles of 4-7 of both; the first 8 bytes' upper bits belong to 4-7."""
    if g < 4:
        return b[4 + g] & 63
    return (b[8 + g] & 15) | (b[g] >> 6) << 4


def offset_step(b: Any, g: int) -> Any:
    if g < 4:
        return b[8 + g] & 63
    return (b[8 + g] >> 4) | (b[4 + g] >> 6) << 4


register(
    Format(
        "Q4_K",
        type_id=12,
        block=256,
        bytes=144,
        group=32,
        bits=4,
        code=strided_nibbles_at(16),
        scale_bits=word_at(0),
        step=step,
        offset_bits=word_at(2),
        offset_unit=-1.0,
        offset_step=offset_step,
    )
)
