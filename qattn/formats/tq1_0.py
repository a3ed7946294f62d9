"""TQ1_0: 256 ternary weights, five to a byte, then an f16 scale.  Source: ggml's block_tq1_0.

A byte holds the fraction 0.t₀t₁t₂t₃t₄ in base 3, rounded up to 8 bits: tripling it pushes the next digit out on top.
"""

from typing import Any

import numpy as np

from qattn.formats._bits import word_at
from qattn.formats._registry import Format, register

_POWERS = np.array([1, 3, 9, 27, 81])


def code(b: Any, i: int) -> Any:
    """32 bytes have digits 32 apart, 16 bytes digits 16 apart, 4 bytes four digits, 4 apart."""
    if i < 160:
        byte, digit = b[i & 31], i >> 5
    elif i < 240:
        byte, digit = b[32 + (i & 15)], (i - 160) >> 4
    else:
        byte, digit = b[48 + (i & 3)], (i - 240) >> 2
    return (((byte * _POWERS[digit]) & 255) * 3) >> 8


register(Format("TQ1_0", type_id=34, block=256, bytes=54, group=256, bits=2, code=code, zero=1, scale_bits=word_at(52)))
