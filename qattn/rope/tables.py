"""Angles of the rotary position embedding (Su et al., 2021), as tables of cosines and sines.

Pair i of a head turns by ``position · theta**(-2i / dims) / factors[i] / scale``.  Which two elements make a pair is a
convention: GGUF's "normal" models interleave them, (2i, 2i + 1); NeoX models pair element i with i + dims / 2.
"""

from __future__ import annotations

import operator
from typing import Any, Literal, NamedTuple

import numpy as np

from qattn import devices

Pairing = Literal["interleaved", "neox"]
PAIRINGS: tuple[Pairing, ...] = ("interleaved", "neox")


class Rotation(NamedTuple):
    """What kernels need to rotate heads."""

    cos: Any
    """(positions, rope_dims / 2) float32, on the device that computes."""
    sin: Any
    neox: bool
    """Whether pairs are half a head apart."""


class RotaryEmbedding:
    """The rotary embedding of a model: how fast each pair of a head's elements turns with the position.

    Parameters
    ----------
    rope_dims : int
        Elements of a head that turn, from the first on; even.  The rest pass through.
    theta : float
        Base of the frequencies, GGUF's ``rope.freq_base``.
    pairing : "interleaved" or "neox"
        Which elements make a pair.
    scale : float
        Linear scaling (Chen et al., 2023): positions are divided by it.  GGUF's ``rope.scaling.factor``.
    factors : (rope_dims / 2,) floats, optional
        Frequencies are divided by them: the tensor ``rope_freqs.weight`` of Llama 3.

    Raises
    ------
    ValueError
        For odd or no dimensions, a base, scale or factor that is not positive and finite, or factors of another shape.
    """

    def __init__(
        self,
        rope_dims: int,
        theta: float = 10000.0,
        *,
        pairing: Pairing = "interleaved",
        scale: float = 1.0,
        factors: Any = None,
    ) -> None:
        rope_dims = operator.index(rope_dims)
        if rope_dims < 2 or rope_dims % 2:
            raise ValueError(f"rope_dims is {rope_dims}; pairs need a positive even number")
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing is {pairing!r}; expected one of {', '.join(map(repr, PAIRINGS))}")
        for name, value in (("theta", theta), ("scale", scale)):
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a positive number")
        self.rope_dims, self.theta, self.pairing, self.scale = rope_dims, float(theta), pairing, float(scale)
        frequencies = self.theta ** (-np.arange(0, rope_dims, 2, dtype=np.float64) / rope_dims) / self.scale
        if factors is not None:
            factors = np.asarray(factors, np.float64)
            if factors.shape != frequencies.shape:
                raise ValueError(f"factors has shape {factors.shape}; rope_dims {rope_dims} needs {frequencies.shape}")
            if not (np.isfinite(factors).all() and (factors > 0).all()):
                raise ValueError("factors must be positive and finite")
            frequencies = frequencies / factors
        self.frequencies: np.ndarray[Any, Any] = frequencies
        """(rope_dims / 2,) float64, radians per position."""
        self._cos = self._sin = np.empty((0, frequencies.size), np.float32)
        self._copies: dict[str, tuple[Any, Any]] = {}

    @property
    def neox(self) -> bool:
        """Whether pairs are half a head apart."""
        return self.pairing == "neox"

    def table(self, positions: int, device: str = "cpu") -> tuple[Any, Any]:
        """Cosines and sines of positions 0 … at least `positions` - 1: two (n, rope_dims / 2) float32 arrays.

        Computed in float64 and kept, on each device; the table at least doubles when it has to grow.
        """
        self._grow(positions)
        if device == "cpu":
            return self._cos, self._sin
        if device not in self._copies:
            self._copies[device] = (devices.asarray(self._cos, device), devices.asarray(self._sin, device))
        return self._copies[device]

    def rotation(self, positions: int, device: str = "cpu") -> Rotation:
        """The table for positions 0 … at least `positions` - 1, and the pairing."""
        return Rotation(*self.table(positions, device), self.neox)

    def _grow(self, positions: int) -> None:
        have = len(self._cos)
        if positions > have:
            more = np.arange(have, max(positions, 2 * have, 256), dtype=np.float64)
            angles = np.outer(more, self.frequencies)
            self._cos = np.concatenate([self._cos, np.cos(angles).astype(np.float32)])
            self._sin = np.concatenate([self._sin, np.sin(angles).astype(np.float32)])
            self._copies = {}

    def __repr__(self) -> str:
        scale = f", scale={self.scale:g}" if self.scale != 1 else ""
        return f"RotaryEmbedding({self.rope_dims}, theta={self.theta:g}, pairing={self.pairing!r}{scale})"
