"""Where the tokens of a ragged batch belong: what layers tell the kernels of all devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qattn import devices


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
