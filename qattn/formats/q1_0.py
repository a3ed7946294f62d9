"""Q1_0: 128 weights, an f16 scale, then a bit each, 1 for +scale and 0 for -scale.  Source: ggml's block_q1_0."""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return (b[2 + (i >> 3)] >> (i & 7)) & 1


register(
    Format(
        "Q1_0",
        type_id=41,
        block=128,
        bytes=18,
        group=128,
        bits=1,
        code=code,
        table=(-1, 1),
        scale_bits=word_at(0),
    )
)
