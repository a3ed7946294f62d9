"""Q5_K: Q4_K with the fifth bits of the codes between steps and nibbles.  Source: ggml's block_q5_K."""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register
from qattn.formats.q4_k import offset_step, step


def code(b: Any, i: int) -> Any:
    low = (b[48 + (i >> 6) * 32 + (i & 31)] >> (4 * ((i >> 5) & 1))) & 15
    return low | ((b[16 + (i & 31)] >> (i >> 5)) & 1) << 4


register(
    Format(
        "Q5_K",
        type_id=13,
        block=256,
        bytes=176,
        group=32,
        bits=5,
        code=code,
        scale_bits=word_at(0),
        step=step,
        offset_bits=word_at(2),
        offset_unit=-1.0,
        offset_step=offset_step,
    )
)
