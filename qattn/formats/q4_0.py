"""Q4_0: 32 weights, an f16 scale, then 4-bit codes.  Source: ggml's block_q4_0."""

from qattn.formats._bits import nibbles_at, word_at
from qattn.formats._registry import Format, register

register(
    Format("Q4_0", type_id=2, block=32, bytes=18, group=32, bits=4, code=nibbles_at(2), zero=8, scale_bits=word_at(0))
)
