"""Where the tokens of a ragged batch belong: what layers tell the kernels of all devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qattn import devices
from qattn._backend import as_host


class Batch(NamedTuple):
    """Arrays on the device that computes."""

    slots: Any
    """(tokens,) int64, the sequence in the cache."""
    places: Any
    """(tokens,) int64, the index in the sequence."""
    angles: Any
    """(tokens,) int64, the position that the rotary embedding sees."""
    row_offsets: Any
    """(sequences + 1,) int64, the tokens of each sequence."""
    one_each: bool = False
    """Whether every sequence has one token, as far as the host knows."""

    @classmethod
    def appended(cls, lengths: Any, row_offsets: Any) -> Batch:
        """Where tokens belong that are the last of sequences of these lengths, on the CPU: `row_offsets` in order."""
        new = np.diff(row_offsets)
        slots = np.repeat(np.arange(len(lengths)), new)
        places = np.arange(row_offsets[-1]) + (lengths - row_offsets[1:])[slots]
        return cls(slots, places, places, row_offsets, one_each=bool((new == 1).all()))

    def to(self, device: str) -> Batch:
        """The same batch with its arrays on a device."""
        slots, places, angles, offsets = (devices.asarray(array, device) for array in self[:4])
        return Batch(slots, places, angles, offsets, self.one_each)


def check_row_offsets(offsets: Any, rows: int, what: str) -> np.ndarray[Any, Any]:
    """Row offsets on the host as int64, checked to rise from 0 to the number of rows."""
    offsets = as_host(offsets, "row_offsets")
    if offsets.dtype.kind not in "iu":
        raise ValueError(f"row_offsets have dtype {offsets.dtype}; expected integers")
    offsets = offsets.astype(np.int64)
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any():
        raise ValueError(f"row_offsets is {offsets.tolist()}; expected to rise from 0 to {rows}, the tokens of {what}")
    return offsets
