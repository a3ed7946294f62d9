"""Q4_1: 32 weights, an f16 scale, an f16 offset, then 4-bit codes.  Source: ggml's block_q4_1."""

from qattn.formats._bits import nibbles_at, word_at
from qattn.formats._registry import Format, register

register(
    Format(
        "Q4_1",
        type_id=3,
        block=32,
        bytes=20,
        group=32,
        bits=4,
        code=nibbles_at(4),
        scale_bits=word_at(0),
        offset_bits=word_at(2),
    )
)
