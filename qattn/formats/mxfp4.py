"""MXFP4: 32 weights, a power of two as scale, then 4-bit floats (e2m1), here doubled to make integers.

Source: ggml's block_mxfp4; OCP Microscaling Formats 1.0.
"""

from typing import Any

from qattn.formats._bits import nibbles_at
from qattn.formats._registry import Format, register

LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def scale_bits(b: Any, g: int) -> Any:
    return b[0]


register(
    Format(
        "MXFP4",
        type_id=39,
        block=32,
        bytes=17,
        group=32,
        bits=4,
        code=nibbles_at(1),
        table=LEVELS,
        scale_bits=scale_bits,
        scale_type="e8m0",
    )
)
