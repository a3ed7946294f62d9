"""The code books of the IQ formats, from the `gguf` package: each index stands for 4 or 8 magnitudes.

Levels are magnitudes with signs.  Signs are stored as bits, or 7 of them as a number, where the 8th makes their
parity even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import quants

Array = np.ndarray[Any, Any]


def grid(name: str) -> Array:
    """The code book of a format: (entries, 4 or 8) uint8, each a place in the format's list of magnitudes."""
    source = getattr(quants, name)
    source.init_grid()
    values = np.asarray(source.grid).reshape(source.grid_shape)
    return np.searchsorted(source.grid_map, values).astype(np.uint8)


def signed(*magnitudes: int) -> tuple[int, ...]:
    """A table of levels: the magnitudes, then their negatives."""
    return (*magnitudes, *(-magnitude for magnitude in magnitudes))


_SEVEN = np.arange(128)
EVEN_SIGNS: Array = (_SEVEN | (np.bitwise_xor.reduce([_SEVEN >> i for i in range(7)]) & 1) << 7).astype(np.uint8)
"""(128,) uint8: 8 sign bits for each 7."""
