"""IQ4_NL: 32 weights, an f16 scale, then 4-bit codes that stand for unevenly spaced levels.

Source: ggml's block_iq4_nl and kvalues_iq4nl.
"""

from qattn.formats._bits import nibbles_at, word_at
from qattn.formats._registry import Format, register

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

register(
    Format(
        "IQ4_NL",
        type_id=20,
        block=32,
        bytes=18,
        group=32,
        bits=4,
        code=nibbles_at(2),
        table=LEVELS,
        scale_bits=word_at(0),
    )
)
