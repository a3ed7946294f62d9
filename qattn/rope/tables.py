"""Angles of the rotary position embedding (Su et al., 2021), as tables of cosines and sines.

Pair i of a head turns by ``position · theta**(-2i / dims) · multipliers[i] / factors[i] / scale``.  Which two elements
make a pair is a convention: GGUF's "normal" models interleave them, (2i, 2i + 1); NeoX models pair element i with
i + dims / 2.  Where a token has several positions (time, height, width), sections say which of them a pair turns by.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal, NamedTuple

import numpy as np

from qattn import _check, devices
from qattn.preparation import Preparation
from qattn.rope.scaling import Scaling, pair_factors, positive

Array = np.ndarray[Any, Any]
Pairing = Literal["interleaved", "neox"]
PAIRINGS: tuple[Pairing, ...] = ("interleaved", "neox")
SectionOrder = Literal["blocks", "interleaved", "vision"]
SECTION_ORDERS: tuple[SectionOrder, ...] = ("blocks", "interleaved", "vision")
POSITIONS = 4  # of a token, at most; ggml has as many
TEXT_POSITIONS = 3  # of these are a text token's own position; the fourth is 0, as in llama.cpp


class Rotation(NamedTuple):
    """What positions do to heads: kernels rotate them."""

    cos: Any
    """(positions, rope_dims / 2) float32, on the device that computes."""
    sin: Any
    neox: bool
    """Whether pairs are half a head apart."""
    heat: Any = None
    """(positions,) float32, what queries are multiplied by in layers that have a temperature: by whoever rotates if
    there is a preparation, else before."""
    preparation: Preparation | None = None
    """What happens to heads before, where that is left to whoever rotates."""

    @classmethod
    def none(cls, positions: int, device: str) -> Rotation:
        """That of an embedding that turns nothing."""
        with devices.current(device):
            nothing = devices.namespace(device).empty((positions, 0), np.float32)
        return cls(nothing, nothing, neox=False)


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
    scaling : YaRN, LongRoPE, NTK or DynamicNTK, optional
        See `qattn.rope.scaling`.
    sections : up to 4 integers
        Pairs that turn by each of a token's positions, GGUF's ``rope.dimension_sections``.  Zeros at the end count for
        nothing; none at all: a token has one position.
    section_order : "blocks", "interleaved" or "vision"
        M-RoPE's sections lie one behind the other (Qwen 2 VL) or take turns (Qwen 3 VL), over one sequence of
        frequencies.  Those of "vision" lie one behind the other, and each has the frequencies of `rope_dims` / 2
        elements, from the first on.  What is left over behind the sections: in "interleaved" it turns by the fourth
        position, in the others the sections begin again.

    Raises
    ------
    ValueError
        For odd or no dimensions, a base or scale that is not positive and finite, factors that are 0 or of another
        shape, or sections that can't be.
    """

    def __init__(
        self,
        rope_dims: int,
        theta: float = 10000.0,
        *,
        pairing: Pairing = "interleaved",
        scale: float = 1.0,
        factors: Any = None,
        scaling: Scaling | None = None,
        sections: tuple[int, ...] = (),
        section_order: SectionOrder = "blocks",
    ) -> None:
        rope_dims = operator.index(rope_dims)
        if not 2 <= rope_dims <= _MOST_DIMS or rope_dims % 2:
            raise ValueError(f"rope_dims is {rope_dims}; pairs need an even number from 2 to {_MOST_DIMS}")
        _check.choice("pairing", pairing, PAIRINGS)
        _check.choice("section_order", section_order, SECTION_ORDERS)
        if scaling is not None and not isinstance(scaling, Scaling):
            raise ValueError(
                f"scaling is {scaling!r}; expected one of qattn.rope.scaling, for instance YaRN(4.0, 32768)"
            )
        positive("theta", theta)
        positive("scale", scale)
        self.rope_dims, self.theta, self.pairing, self.scale = rope_dims, float(theta), pairing, float(scale)
        self.scaling, self.sections, self.section_order = scaling or Scaling(), _sections(sections), section_order
        pairs = np.arange(rope_dims // 2)
        dims = rope_dims
        if self.sections:
            self._rows, within = _sectioned(pairs, self.sections, section_order)
            if section_order == "vision":
                pairs, dims = within, rope_dims // 2
        elif section_order != "blocks":
            raise ValueError(f"section_order is {section_order!r}, and there are no sections")
        else:
            self._rows = np.zeros_like(pairs)
        exponents = 2 * pairs / dims
        frequencies = self.theta**-exponents * self.scaling.multipliers(exponents, dims, self.theta) / self.scale
        if factors is not None:
            frequencies = frequencies / pair_factors("factors", factors, len(pairs))
        self.frequencies: Array = frequencies
        """(rope_dims / 2,) float64, radians per position."""
        self._text_frequencies = np.where(self._rows < TEXT_POSITIONS, frequencies, 0.0)
        nothing = np.empty((0, frequencies.size), np.float32)
        self._tables: dict[str, tuple[Any, Any]] = {"cpu": (nothing, nothing)}
        """By device."""

    @property
    def neox(self) -> bool:
        """Whether pairs are half a head apart."""
        return self.pairing == "neox"

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by: YaRN and LongRoPE have one."""
        return self.scaling.attention_factor

    def table(self, positions: int, device: str = "cpu") -> tuple[Any, Any]:
        """Cosines and sines of positions 0 … at least `positions` - 1: two (n, rope_dims / 2) float32 arrays.

        Computed in float64 and kept, on each device; the table at least doubles when it has to grow.
        """
        there = self._tables.get(device)
        if there is None or len(there[0]) < positions:
            there = self._grown(positions, device)
        return there

    def rotation(self, positions: int, device: str = "cpu") -> Rotation:
        """The table for positions 0 … at least `positions` - 1 of text, and the pairing."""
        return Rotation(*self.table(positions, device), self.neox)

    def rotation_at(self, positions: Array, device: str = "cpu") -> tuple[Rotation, Array]:
        """A table for given positions, and the row of it that each token takes.

        positions : (tokens,) int64, the positions of text, which share one table unless they are far out; or (up to 4,
        tokens), a position for each section, for which a table is made; those that are missing are 0
        """
        if positions.ndim == 1:
            end = int(positions.max(initial=-1)) + 1
            if end > max(_LONGEST, len(self._tables["cpu"][0])):
                return self._own_table(np.outer(positions, self._text_frequencies), self.attention_factor, device)
            return self.rotation(end, device), positions
        padded = np.zeros((positions.shape[1], POSITIONS))
        padded[:, : len(positions)] = positions.T
        angles = np.take(padded, self._rows, axis=1) * self.frequencies  # in C order, which indexing would not give
        return self._own_table(angles, self.attention_factor, device)

    def rotation_by(self, steps: Array, device: str = "cpu") -> tuple[Rotation, Array]:
        """What turns heads on that are rotated already, as of `rotation_at`: by (tokens,) steps of either sign.

        Lengths stay, whatever the attention factor.
        """
        return self._own_table(np.outer(steps, self._text_frequencies), 1.0, device)

    def _own_table(self, angles: Array, factor: float, device: str) -> tuple[Rotation, Array]:
        cos, sin = (devices.asarray(table, device) for table in _cos_sin(angles, factor))
        return Rotation(cos, sin, self.neox), np.arange(len(angles))

    def _grown(self, positions: int, device: str) -> tuple[Any, Any]:
        """The table, after it has grown where it has to; what another thread makes meanwhile may be made once more."""
        tables = dict(self._tables)
        cos, sin = tables["cpu"]
        have = len(cos)
        if positions > have:
            more = np.arange(have, max(positions, 2 * have, 256), dtype=np.float64)
            new = _cos_sin(np.outer(more, self._text_frequencies), self.attention_factor)
            cos, sin = (np.concatenate(pair) for pair in zip((cos, sin), new, strict=True))
            tables = {"cpu": (cos, sin)}
        if device not in tables:
            tables[device] = (devices.asarray(cos, device), devices.asarray(sin, device))
        self._tables = tables
        return tables[device]

    def __repr__(self) -> str:
        scale = f", scale={self.scale:g}" if self.scale != 1 else ""
        scaling = f", scaling={type(self.scaling).__name__}" if type(self.scaling) is not Scaling else ""
        sections = f", sections={self.sections}, section_order={self.section_order!r}" if self.sections else ""
        return (
            f"RotaryEmbedding({self.rope_dims}, theta={self.theta:g}, pairing={self.pairing!r}"
            f"{scale}{scaling}{sections})"
        )


_MOST_DIMS = 1 << 16  # far more than heads have
_LONGEST = 1 << 18  # positions of a table for all up to the largest: 128 MB for heads of 128


shared = functools.lru_cache(maxsize=16)(RotaryEmbedding)
"""The same embedding for the same arguments (`factors` a tuple): tables are as long as a context, layers share them."""


def _sections(sections: Any) -> tuple[int, ...]:
    """Check sections, and leave out zeros at the end."""
    given = tuple(operator.index(section) for section in sections)
    if len(given) > POSITIONS or min(given, default=0) < 0:
        raise ValueError(f"sections is {given}; expected up to {POSITIONS} numbers of pairs")
    while given and given[-1] == 0:
        given = given[:-1]
    return given


def _sectioned(pairs: Array, sections: tuple[int, ...], order: SectionOrder) -> tuple[Array, Array]:
    """Which position each pair turns by, 0 … 3, and where in its section it lies."""
    place, ends = pairs % sum(sections), np.cumsum(sections)
    if order == "interleaved":
        ahead = np.array([*sections, 0, 0])[place % 3]
        return np.where(place // 3 < ahead, place % 3, 3), place // 3
    rows = np.searchsorted(ends, place, side="right")
    return rows, place - (ends - sections)[rows]


def _cos_sin(angles: Array, factor: float) -> tuple[Array, Array]:
    return (factor * np.cos(angles)).astype(np.float32), (factor * np.sin(angles)).astype(np.float32)
