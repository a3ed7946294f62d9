"""Q5_1: 32 weights, an f16 scale, an f16 offset, the fifth bits of the codes, then their nibbles.

Source: ggml's block_q5_1.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return ((b[8 + (i & 15)] >> (4 * (i >> 4))) & 15) | ((b[4 + (i >> 3)] >> (i & 7)) & 1) << 4


register(
    Format(
        "Q5_1",
        type_id=7,
        block=32,
        bytes=24,
        group=32,
        bits=5,
        code=code,
        scale_bits=word_at(0),
        offset_bits=word_at(2),
    )
)
