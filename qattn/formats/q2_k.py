"""Q2_K: 256 weights in groups of 16: a nibble each for the steps of scale and offset, then 2-bit codes, two f16.

Source: ggml's block_q2_K.
"""

from typing import Any

from qattn.formats._bits import strided_pairs_at, word_at
from qattn.formats._registry import Format, register


def step(b: Any, g: int) -> Any:
    return b[g] & 15


def offset_step(b: Any, g: int) -> Any:
    return b[g] >> 4


register(
    Format(
        "Q2_K",
        type_id=10,
        block=256,
        bytes=84,
        group=16,
        bits=2,
        code=strided_pairs_at(16),
        scale_bits=word_at(80),
        step=step,
        offset_bits=word_at(82),
        offset_unit=-1.0,
        offset_step=offset_step,
        paired=True,
    )
)
