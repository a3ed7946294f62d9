"""Q6_K: 256 weights in groups of 16: nibbles of the codes, their upper two bits, int8 steps, an f16 scale.

Source: ggml's block_q6_K.
"""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    low = (b[(i >> 7) * 64 + (i & 63)] >> (4 * ((i >> 6) & 1))) & 15
    return low | ((b[128 + (i >> 7) * 32 + (i & 31)] >> (2 * ((i >> 5) & 3))) & 3) << 4


def step(b: Any, g: int) -> Any:
    return (b[192 + g] ^ 128) - 128


register(
    Format(
        "Q6_K",
        type_id=14,
        block=256,
        bytes=210,
        group=16,
        bits=6,
        code=code,
        zero=32,
        scale_bits=word_at(208),
        step=step,
    )
)
