"""Rotary embedding beside ggml's operator: its formulas in float64, and what it gave."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qattn
from qattn import NTK, DynamicNTK, LongRoPE, RotaryEmbedding, YaRN
from qattn.rope import longrope_magnitude, yarn_magnitude
from tests.reference import nmse
from tests.strategies import normal
from tests.test_rope import sectioned


def ggml_rotate(x, positions, *, mode, dims, theta=1e4, scale=1.0, extrapolation=0.0, attention=1.0, factors=None,
                context=1, fast=1.0, slow=1.0, sections=(), apart=True):  # fmt: skip
    """ggml's operator in float64: x (tokens, heads, head_dim), positions (4, tokens) or fewer rows, rotated heads."""
    pairs = dims if mode == "vision" else dims // 2
    bounds = [dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    low, high = max(0, math.floor(bounds[0])), min(dims - 1, math.ceil(bounds[1]))
    magnitude = attention * (1 + 0.1 * math.log(1 / scale) if extrapolation else 1)
    blocks = [(row, place) for row, size in enumerate(sections) for place in range(size)] or [(0, 0)]
    out = np.array(x, np.float64)
    for i in range(pairs):
        row, place = blocks[i % len(blocks)]
        if mode == "interleaved":
            place = i % len(blocks)
            row = place % 3 if place < 3 * [*sections, 0, 0][place % 3] else 3
        position = positions[row] if row < len(positions) else np.zeros_like(positions[0])
        full = position * theta ** (-2 * (place if mode == "vision" else i) / dims)
        full = full / (1 if factors is None else factors[i])
        mix = extrapolation * (1 - min(1, max(0, (i - low) / max(0.001, high - low))))
        angle = (full * scale * (1 - mix) + full * mix)[:, None]
        a, b = (i, i + pairs) if apart else (2 * i, 2 * i + 1)
        cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
        out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return out


def as_ggml(rope):
    """The operator's parameters for an embedding with sections."""
    vision, s = rope.section_order == "vision", rope.scaling
    dims = rope.rope_dims // (2 if vision else 1)
    arguments = {"mode": rope.section_order, "dims": dims, "theta": rope.theta, "sections": rope.sections}
    if isinstance(s, YaRN):
        arguments |= dict(scale=1 / s.factor, extrapolation=s.ext_factor, attention=s.attn_factor)
        arguments |= dict(context=s.original_context, fast=s.beta_fast, slow=s.beta_slow)
    elif isinstance(s, (NTK, DynamicNTK)):
        alpha = s.alpha if isinstance(s, NTK) else 1 + s.factor * max(0, s.context_length / s.original_context - 1)
        arguments["theta"] *= alpha ** (dims / (dims - 2)) if dims > 2 else 1
    return arguments | {"apart": rope.neox}


# YaRN's ramp would end behind the last element of a head.
LONG_RAMP = RotaryEmbedding(
    16, 20.0, scaling=YaRN(4.0, 4096, beta_fast=64.0, beta_slow=0.5), sections=(4, 4), section_order="vision"
)


@settings(max_examples=80)
@example(case=(LONG_RAMP, np.array([[100], [70]])), rest=0)
@given(case=sectioned(), rest=st.integers(0, 7))
def test_sections_agree_with_float64(case, rest):
    rope, positions = case
    x = normal((positions.shape[1], 2, rope.rope_dims + rest))
    want = ggml_rotate(x, positions, **as_ggml(rope))
    assert np.abs(qattn.rope(x, positions, rope) - want).max(initial=0) < 2e-5


GRID = list(itertools.product((1.0, 1.4245), (0.0, 0.7465), (1.0, 1.4245), (False, True)))
SHAPES = ["normal-64-64", "normal-80-32", "neox-64-64", "neox-80-20", "blocks-64-64", "blocks-64-20",
          "interleaved-64-64", "interleaved-80-32", "vision-80-80"]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "rope-ggml.npz")


def of_the_grid(recorded, shape, point):
    """Heads, their positions, the embedding, and what the operator's formulas give."""
    mode, size, dims = shape.split("-")[0], *map(int, shape.split("-")[1:])
    scale, extrapolation, attention, with_factors = point
    sections = {"vision": (dims // 4,) * 2, "blocks": (dims // 3,) * 3, "interleaved": (dims // 3,) * 3}.get(mode, ())
    x, positions = recorded["x"][..., :size], recorded["positions"] if sections else recorded["positions"][:1]
    factors = recorded["factors"][: dims // 2] if with_factors else None
    rope = RotaryEmbedding(
        dims, pairing="interleaved" if mode == "normal" else "neox", factors=factors, sections=sections,
        scaling=YaRN(1 / scale, 1, extrapolation, attention, beta_fast=1.0, beta_slow=1.0),
        section_order=mode if sections else "blocks",
    )  # fmt: skip
    want = ggml_rotate(
        x, positions, mode=mode, dims=dims // (2 if mode == "vision" else 1), scale=scale,
        extrapolation=extrapolation, attention=attention, factors=factors, sections=sections, apart=rope.neox,
    )  # fmt: skip
    return x, positions if sections else positions[0], rope, want


@pytest.mark.parametrize("shape", SHAPES)
def test_the_grid_of_ggmls_operator_tests(recorded, shape):
    """Mode, head size and rotated elements, over scale × extrapolation × attention factor × factors.

    ggml's own tests give 0 for the original context, which ramps as 1 does.
    """
    for point, ggml in zip(GRID, recorded[shape], strict=True):
        x, positions, rope, want = of_the_grid(recorded, shape, point)
        got = qattn.rope(x, positions, rope)
        assert nmse(got, want) < 1e-12
        assert nmse(got, ggml) < 1e-7  # the bound of ggml's tests; its angles are float32 products of float32 products


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_the_grid_on_a_gpu(cupy, recorded, shape):
    for point in (GRID[-1], GRID[SHAPES.index(shape)]):
        x, positions, rope, want = of_the_grid(recorded, shape, point)
        assert nmse(qattn.rope(cupy.asarray(x), positions, rope).get(), want) < 1e-12


MODELS = {
    "llama": {"rope_dims": 128},
    "llama-3": {"rope_dims": 128, "theta": 5e5},
    "qwen": {"rope_dims": 128, "theta": 1e6},
    "gemma": {"rope_dims": 256, "theta": 1e6, "scale": 8.0},
    "yarn": {"rope_dims": 64, "theta": 150000.0, "scaling": YaRN(32.0, 4096)},
    "yarn-qwen": {"rope_dims": 128, "theta": 1e6, "scaling": YaRN(4.0, 32768)},
    "yarn-deepseek": {"rope_dims": 64, "scaling": YaRN(40.0, 4096, attn_factor=1 / yarn_magnitude(40.0))},
    "phi-3": {"rope_dims": 96},
}


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_agree_with_ggmls_to_1e_6(recorded, name):
    """The angle at each position up to 131072, divided by the position: ggml's by its recorded cosines and sines.

    Frequencies are compared and not angles, as ggml multiplies them up in float32: far out its own angles are off.
    """
    arguments = dict(MODELS[name])
    if name == "phi-3":
        factors = recorded["factors-phi-3"]
        arguments["scaling"] = LongRoPE(np.ones(48), factors, 4096, 131072, longrope_magnitude(131072, 4096))
    elif f"factors-{name}" in recorded:
        arguments["factors"] = recorded[f"factors-{name}"]
    rope, at = RotaryEmbedding(**arguments), recorded["at"][:, None].astype(np.float64)
    cos, sin = np.split(recorded[f"model-{name}"].astype(np.float64), 2, -1)
    off = np.angle((cos + 1j * sin) * np.exp(-1j * at * rope.frequencies))
    assert np.abs(off / at).max() < 1e-6
    assert np.abs(np.hypot(cos, sin) - rope.attention_factor).max() < 1e-6
