"""NVFP4: 64 weights in groups of 16: four 8-bit floats as scales, then 4-bit floats as in MXFP4.

Source: ggml's block_nvfp4.
"""

from typing import Any

from qattn.formats._registry import Format, register
from qattn.formats.mxfp4 import LEVELS


def code(b: Any, i: int) -> Any:
    return (b[4 + (i >> 4) * 8 + (i & 7)] >> (4 * ((i >> 3) & 1))) & 15


def scale_bits(b: Any, g: int) -> Any:
    return b[g]


register(
    Format(
        "NVFP4",
        type_id=40,
        block=64,
        bytes=36,
        group=16,
        bits=4,
        code=code,
        table=LEVELS,
        scale_bits=scale_bits,
        scale_type="ue4m3",
    )
)
