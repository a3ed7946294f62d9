"""Q2_0: 64 weights, an f16 scale, then 2-bit codes, the first in the lowest bits.  Source: ggml's block_q2_0."""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return (b[2 + (i >> 2)] >> (2 * (i & 3))) & 3


register(Format("Q2_0", type_id=42, block=64, bytes=18, group=64, bits=2, code=code, zero=1, scale_bits=word_at(0)))
