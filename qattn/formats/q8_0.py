"""Q8_0: 32 weights, an f16 scale, then int8 levels.  Source: ggml's block_q8_0."""

from typing import Any

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return b[2 + i] ^ 128  # a signed byte plus 128


register(Format("Q8_0", type_id=8, block=32, bytes=34, group=32, bits=8, code=code, zero=128, scale_bits=word_at(0)))
