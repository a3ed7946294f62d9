"""IQ4_NL: 32 weights, an f16 scale, then 4-bit codes that stand for unevenly spaced levels.

Source: ggml's block_iq4_nl and kvalues_iq4nl.
"""

from qattn.cache_types import IQ4_NL_LEVELS
from qattn.formats._bits import nibbles_at, word_at
from qattn.formats._registry import Format, register

register(
    Format(
        "IQ4_NL",
        type_id=20,
        block=32,
        bytes=18,
        group=32,
        bits=4,
        code=nibbles_at(2),
        table=IQ4_NL_LEVELS,
        scale_bits=word_at(0),
    )
)
