"""Q5_0: 32 weights, an f16 scale, the fifth bits of the codes, then their nibbles.  Source: ggml's block_q5_0."""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return ((b[6 + (i & 15)] >> (4 * (i >> 4))) & 15) | ((b[2 + (i >> 3)] >> (i & 7)) & 1) << 4


register(Format("Q5_0", type_id=6, block=32, bytes=22, group=32, bits=5, code=code, zero=16, scale_bits=word_at(0)))
