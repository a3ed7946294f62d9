"""IQ4_XS: 256 weights in groups of 32: an f16 scale, 6-bit steps, IQ4_NL's codes.  Source: ggml's block_iq4_xs."""

from typing import Any

from qattn.cache_types import IQ4_NL_LEVELS
from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register


def code(b: Any, i: int) -> Any:
    return (b[8 + (i >> 5) * 16 + (i & 15)] >> (4 * ((i >> 4) & 1))) & 15


def step(b: Any, g: int) -> Any:
    """Bytes 2 and 3 hold the upper two bits of each step, bytes 4 to 7 the lower four."""
    low = (b[4 + (g >> 1)] >> (4 * (g & 1))) & 15
    return (low | ((b[2 + (g >> 2)] >> (2 * (g & 3))) & 3) << 4) - 32


register(
    Format(
        "IQ4_XS",
        type_id=23,
        block=256,
        bytes=136,
        group=32,
        bits=4,
        code=code,
        table=IQ4_NL_LEVELS,
        scale_bits=word_at(0),
        step=step,
    )
)
