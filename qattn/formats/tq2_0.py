"""TQ2_0: 256 ternary weights, two bits each, then an f16 scale.  Source: ggml's block_tq2_0."""

from qattn.formats._bits import strided_pairs_at, word_at
from qattn.formats._registry import Format, register

register(
    Format(
        "TQ2_0",
        type_id=35,
        block=256,
        bytes=66,
        group=256,
        bits=2,
        code=strided_pairs_at(0),
        zero=1,
        scale_bits=word_at(64),
    )
)
