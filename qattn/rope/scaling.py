"""How models change the frequencies of a rotary embedding to see further than they were first trained for.

A scaling gives one multiplier for each pair's frequency, and one factor for all cosines and sines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qattn import _check

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scaling:
    """Leaves everything as it is."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by; scores are by its square."""
        return 1.0

    def multipliers(self, exponents: Array, dims: int, theta: float) -> Array:
        """What frequencies are multiplied by.

        exponents : (pairs,) float64; the frequencies are ``theta**-exponents``, and a pair's exponent is 2i / dims
        """
        return np.ones_like(exponents)


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling: theta becomes ``theta · alpha**(dims / (dims - 2))``.

    The fastest pair keeps its frequency, the slowest one's is divided by alpha.  GGUF's ``rope.scaling.alpha``.
    """

    alpha: float

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def multipliers(self, exponents: Array, dims: int, theta: float) -> Array:
        return _ntk(self.alpha, exponents, dims)


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """NTK-aware scaling by as much as the context exceeds the original one, as of a sequence of `context_length`.

    alpha is ``factor · context_length / original_context - (factor - 1)``, and 1 within the original context.
    """

    factor: float
    original_context: int
    context_length: int

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        _check.at_least("original_context", self.original_context, 1)
        _check.at_least("context_length", self.context_length, 1)

    def multipliers(self, exponents: Array, dims: int, theta: float) -> Array:
        beyond = max(0.0, self.context_length / self.original_context - 1)
        return _ntk(1 + self.factor * beyond, exponents, dims)


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (Peng et al., 2023): slow pairs are interpolated, fast ones extrapolate, with a ramp between them.

    Parameters
    ----------
    factor : float
        Slow pairs turn that much slower.  GGUF's ``rope.scaling.factor``.
    original_context : int
        The context that the model was trained for.  GGUF's ``rope.scaling.original_context_length``.
    ext_factor : float
        How far fast pairs extrapolate: 1 keeps their frequency, 0 is linear scaling for all.
    attn_factor : float
        A further factor of cosines and sines.
    beta_fast, beta_slow : float
        The ramp runs from the pairs that turn `beta_fast` times within the original context to those that turn
        `beta_slow` times.
    """

    factor: float
    original_context: int
    ext_factor: float = 1.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "attn_factor", "beta_fast", "beta_slow"):
            positive(name, getattr(self, name))
        _check.at_least("original_context", self.original_context, 1)
        if not (math.isfinite(self.ext_factor) and self.ext_factor >= 0):
            raise ValueError(f"ext_factor is {self.ext_factor}; expected 0 or a positive number")

    @property
    def attention_factor(self) -> float:
        """`attn_factor`, and the magnitude that makes up for the interpolation if pairs extrapolate at all."""
        return self.attn_factor * (yarn_magnitude(self.factor) if self.ext_factor else 1.0)

    def multipliers(self, exponents: Array, dims: int, theta: float) -> Array:
        if theta <= 1:
            raise ValueError(f"theta is {theta}; YaRN needs a theta above 1, so that later pairs turn slower")
        low = max(0, math.floor(self._pair(self.beta_fast, dims, theta)))
        high = min(dims - 1, math.ceil(self._pair(self.beta_slow, dims, theta)))
        ramp = np.clip((np.arange(len(exponents)) - low) / max(1, high - low), 0, 1)
        kept = (1 - ramp) * self.ext_factor
        return (1 - kept) / self.factor + kept

    def _pair(self, turns: float, dims: int, theta: float) -> float:
        """Which pair turns so many times within the original context: a real number."""
        return dims * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """LongRoPE (Ding et al., 2024): a factor for each pair, of one list or of another by the length of the context.

    Parameters
    ----------
    short, long : (pairs,) floats
        Frequencies are divided by `long` if `context_length` exceeds `original_context`, else by `short`.  GGUF's
        tensors ``rope_factors_short.weight`` and ``rope_factors_long.weight``.
    original_context : int
        GGUF's ``rope.scaling.original_context_length``.
    context_length : int
        The context that the model is used with.  It chooses once for all positions, as keys in a cache stay rotated.
    attn_factor : float
        Factor of cosines and sines, with either list.  GGUF's ``rope.scaling.attn_factor``; see `longrope_magnitude`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    context_length: int
    attn_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("short", "long"):
            object.__setattr__(self, name, tuple(np.asarray(getattr(self, name), np.float64).ravel().tolist()))
        _check.at_least("original_context", self.original_context, 1)
        _check.at_least("context_length", self.context_length, 1)
        positive("attn_factor", self.attn_factor)

    @property
    def attention_factor(self) -> float:
        return self.attn_factor

    def multipliers(self, exponents: Array, dims: int, theta: float) -> Array:
        chosen = "long" if self.context_length > self.original_context else "short"
        return 1 / pair_factors(chosen, getattr(self, chosen), len(exponents))


def yarn_magnitude(factor: float, multiplier: float = 1.0) -> float:
    """1 + 0.1 · multiplier · ln(factor): by how much YaRN enlarges queries and keys.

    DeepSeek and others that have a multiplier of their own want ``YaRN(attn_factor=1 / yarn_magnitude(factor, m))``.
    """
    return 1 + 0.1 * multiplier * math.log(factor)


def longrope_magnitude(context: int, original_context: int) -> float:
    """sqrt(1 + ln(context / original_context) / ln(original_context)): Phi-3's factor, of its longest context."""
    if context <= original_context:
        return 1.0
    return math.sqrt(1 + math.log(context / original_context) / math.log(original_context))


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; expected a positive number")


def pair_factors(name: str, factors: Any, pairs: int) -> Array:
    """Check factors of frequencies, one for each pair → (pairs,) float64."""
    factors = np.asarray(factors, np.float64)
    if factors.shape != (pairs,):
        raise ValueError(f"{name} has shape {factors.shape}; rope_dims {2 * pairs} needs {(pairs,)}")
    if not (np.isfinite(factors).all() and (factors != 0).all()):
        raise ValueError(f"{name} must be finite, and not 0")
    return factors


def _ntk(alpha: float, exponents: Array, dims: int) -> Array:
    """Two elements are one pair, the fastest, which stays."""
    return alpha ** (-exponents * dims / (dims - 2)) if dims > 2 else np.ones_like(exponents)
