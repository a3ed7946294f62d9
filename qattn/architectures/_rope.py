"""The rotary embedding that a file's metadata and tensors ask for, as llama.cpp reads them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from qattn.architectures._metadata import Metadata
from qattn.errors import GGUFError
from qattn.rope import LongRoPE, RotaryEmbedding, YaRN, shared, yarn_magnitude
from qattn.rope.tables import Pairing as Pairing

Factors = Literal["", "freqs", "long", "either"]


class Scaling(NamedTuple):
    """How positions beyond the trained ones are reached."""

    factor: float = 1.0
    """Positions are divided by it."""
    yarn: float = 0.0
    """How far YaRN mixes unscaled frequencies in; 0: not at all."""
    attention: float = 1.0
    """Factor of cosines and sines, before YaRN's own."""
    original: int = 0
    """Positions of the training, from which YaRN's range and the choice of LongRoPE's factors follow."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def model_scaling(
    m: Metadata,
    *,
    log_multiplier: float = 0.0,
    same_multiplier: bool = False,
    yarn: float = -1.0,
    attention: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Scaling:
    """The scaling of a model.  The parameters are what only some architectures read."""
    kind = m.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise NotImplementedError(f"{m.architecture}: RoPE scaling {kind!r} is not supported")
    named = "rope.scaling.factor" if m.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = 1.0 if kind == "none" else m.number(named, 1.0)
    yarn = yarn if yarn >= 0 else float(kind == "yarn")
    if yarn:
        # The factor that YaRN applies by itself, 1 + 0.1 log(factor), is divided out here.
        ratio = log_multiplier if same_multiplier and log_multiplier else 1.0
        grown = max(factor, 1.0)
        attention = yarn_magnitude(grown, ratio) / (yarn_magnitude(grown, log_multiplier) if log_multiplier else 1.0)
        attention /= yarn_magnitude(factor)
    attention *= m.number("rope.scaling.attn_factor", 1.0)
    original = m.integer("rope.scaling.original_context_length", m.integer("context_length", 0))
    return Scaling(factor, yarn, attention, original, beta_fast, beta_slow)


def rotary(
    m: Metadata,
    dims: int,
    base: float,
    pairing: Pairing,
    *,
    scaling: Scaling | None = None,
    factor: float | None = None,
    factors: Factors = "",
    sections: Literal["", "blocks", "interleaved"] = "",
) -> RotaryEmbedding:
    """The embedding of a layer; equal ones are one object, since its tables are as long as a context.

    Parameters
    ----------
    scaling : Scaling, optional
        That of the model, unless given.
    factor : float, optional
        Takes the place of the scaling's: 1 in layers with a window that is not scaled.
    factors : "freqs", "long" or "either"
        Which tensors divide frequencies: ``rope_freqs``, those of LongRoPE, or what the metadata says.
    sections : "blocks" or "interleaved"
        How the sections of ``rope.dimension_sections`` lie.
    """
    own = model_scaling(m) if scaling is None else scaling
    if factor is not None:
        own = own._replace(factor=factor)
    if factors == "either":
        factors = "long" if m.get("rope.scaling.type") == "longrope" else "freqs"
    options: dict[str, Any] = {"scale": own.factor}
    if factors == "freqs":
        options["factors"] = _table(m, "rope_freqs.weight", dims // 2)
    elif factors == "long":
        short, long = (_table(m, f"rope_factors_{name}.weight", dims // 2) for name in ("short", "long"))
        if short and long and not own.yarn:
            options["scaling"] = LongRoPE(short, long, own.original, m.context, own.attention)
        else:
            options["factors"] = long if m.context > own.original else short
    if "scaling" not in options and (own.yarn or own.attention != 1):
        yarn = YaRN(own.factor, own.original, own.yarn, own.attention, own.beta_fast, own.beta_slow)
        options |= {"scale": 1.0, "scaling": yarn}
    if sections and any(_sections(m)):
        options |= {"sections": _sections(m), "section_order": sections}
    return shared(dims, base, pairing=pairing, **options)


def use_sections(m: Metadata) -> bool:
    """Whether the metadata asks for M-RoPE."""
    given = _sections(m)
    return given[0] > 0 and given[1] > 0


def _sections(m: Metadata) -> tuple[int, ...]:
    given = m.array("rope.dimension_sections") or [m.get("rope.dimension_sections", 0)] * 4
    if not 1 <= len(given) <= 4 or not all(isinstance(size, (int, np.integer)) and size >= 0 for size in given):
        raise GGUFError(f"metadata {m.key('rope.dimension_sections')} is {given}; expected up to four sizes")
    return tuple(int(size) for size in given) + (0,) * (4 - len(given))


def _table(m: Metadata, name: str, pairs: int) -> tuple[float, ...] | None:
    """A tensor of factors, whose first ones count where fewer pairs turn."""
    return tuple(np.asarray(m.model.mapped(name)).ravel()[:pairs].tolist()) if name in m.model else None
