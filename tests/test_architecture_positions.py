"""The rotary embeddings that metadata and tensors of each architecture ask for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qattn import architectures
from qattn.rope import LongRoPE, YaRN
from tests.gguf_headers import MORE, Headers

WINDOW = {"attention.sliding_window": 24}


@pytest.fixture
def header(tmp_path):
    with Headers(tmp_path) as headers:
        yield headers


ROPES = [
    # architecture, metadata, layer, attributes of the embedding
    ("llama", {}, 0, {"rope_dims": 16, "theta": 10000.0, "pairing": "interleaved", "scale": 1.0}),
    ("qwen2", {"rope.freq_base": 1e6, "rope.dimension_count": 8}, 0, {"rope_dims": 8, "theta": 1e6, "pairing": "neox"}),
    ("llama", {"rope.scaling.factor": 4.0}, 0, {"scale": 4.0}),
    ("llama", {"rope.scaling.factor": 0.0}, 0, {"scale": 1.0}),
    ("llama", {"rope.scale_linear": 2.0}, 0, {"scale": 2.0}),
    ("llama", {"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, 0, {"scale": 1.0}),
    ("gemma3", WINDOW | {"rope.freq_base": 1e6, "rope.scaling.factor": 8.0}, 0, {"theta": 10000.0, "scale": 1.0}),
    ("gemma3", WINDOW | {"rope.freq_base": 1e6, "rope.scaling.factor": 8.0}, 5, {"theta": 1e6, "scale": 8.0}),
    ("gemma2", {"rope.freq_base": 5e4, "rope.freq_base_swa": 2e4}, 0, {"theta": 2e4}),
    ("cohere2", WINDOW | {"rope.freq_base": 5e4, "rope.freq_base_swa": 2e4}, 0, {"theta": 5e4}),
    ("olmo2", WINDOW | {"rope.scaling.factor": 8.0}, 0, {"scale": 1.0}),
    ("olmo2", WINDOW | {"rope.scaling.factor": 8.0}, 3, {"scale": 8.0}),
    ("step35", MORE, 1, {"rope_dims": 4, "theta": 10000.0}),
    ("step35", MORE, 0, {"rope_dims": 8, "theta": 20000.0}),
    ("qwen2vl", {"rope.dimension_sections": [2, 3, 3, 0]}, 0, {"sections": (2, 3, 3), "section_order": "blocks"}),
    ("qwen3vl", {"rope.dimension_sections": [3, 3, 2, 0]}, 0, {"section_order": "interleaved", "pairing": "neox"}),
    ("glm4", {"rope.dimension_sections": [2, 3, 3, 0]}, 0, {"pairing": "neox", "sections": (2, 3, 3)}),
    ("glm4", {}, 0, {"pairing": "interleaved", "sections": ()}),
    ("hunyuan-dense", {"rope.dimension_sections": [2, 3, 3, 0]}, 0, {"pairing": "neox", "sections": ()}),
    ("hunyuan_vl", {"rope.dimension_sections": [2, 3, 3, 0]}, 0, {"pairing": "neox", "sections": (2, 3, 3)}),
    ("hunyuan-dense", {"rope.scaling.alpha": 1000.0}, 0, {"theta": pytest.approx(1e4 * 1000 ** (16 / 14))}),
]


@pytest.mark.parametrize(("name", "metadata", "layer", "attributes"), ROPES)
def test_positions_turn_as_the_metadata_says(header, name, metadata, layer, attributes):
    rope = architectures.describe(header(name, metadata), layer).rope
    assert {attribute: getattr(rope, attribute) for attribute in attributes} == attributes


def test_layers_share_an_embedding(header):
    model = header("gemma3", WINDOW)
    ropes = [architectures.describe(model, layer).rope for layer in range(8)]
    assert ropes[0] is ropes[4] and len({id(rope) for rope in ropes}) == 1
    model = header("gemma3", WINDOW | {"rope.freq_base": 1e6})
    assert architectures.describe(model, 0).rope is ropes[0] is not architectures.describe(model, 5).rope


def test_keys_that_an_architecture_does_not_read_change_nothing(header):
    foreign = {
        "attn_logit_softcapping": 50.0,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.scale": 0.3,
        "attention.temperature_scale": 0.1,
        "attention.sliding_window": 24,
        "attention.q_lora_rank": 8,
        "rope.dimension_sections": [2, 3, 3, 0],
        "rope.scaling.yarn_beta_fast": 5.0,
    }
    assert architectures.describe(header("llama", foreign)) == architectures.describe(header("llama"))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}


def test_yarn_scales_frequencies_and_magnitude(header):
    rope = architectures.describe(header("qwen3", YARN)).rope
    assert isinstance(rope.scaling, YaRN) and rope.scaling.factor == 4 and rope.scaling.original_context == 512
    assert rope.attention_factor == pytest.approx(1 + 0.1 * math.log(4))
    scaled = architectures.describe(header("qwen3", YARN | {"rope.scaling.attn_factor": 0.5})).rope
    assert scaled.attention_factor == pytest.approx(rope.attention_factor / 2)


def test_only_some_read_the_parameters_of_yarn(header):
    given = YARN | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_ext_factor": 0.5}
    grok, mistral, qwen = (architectures.describe(header(name, given)).rope for name in ("grok", "mistral3", "qwen3"))
    assert [rope.scaling.beta_fast for rope in (grok, mistral, qwen)] == [16, 16, 32]
    assert [rope.scaling.ext_factor for rope in (grok, mistral, qwen)] == [0.5, 1, 1]


@pytest.mark.parametrize(("name", "multiplier"), [("deepseek2", 0.0707), ("deepseek2", 0.1), ("mistral4", 0.0707)])
def test_deepseeks_scores_grow_by_the_square_of_a_magnitude(header, name, multiplier):
    metadata = YARN | MORE | {"rope.scaling.yarn_log_multiplier": multiplier}
    config = architectures.describe(header(name, metadata, ["blk.0.attn_k_b.weight"]))
    all_dims = 1 + multiplier * math.log(4)
    turned = all_dims if name == "deepseek2" else 1 + 0.1 * math.log(4)  # what cosines and sines are to grow by
    assert config.rope.attention_factor == pytest.approx(turned / all_dims)
    assert config.scale == pytest.approx(24**-0.5 * (config.rope.attention_factor * all_dims) ** 2)


def test_the_context_chooses_the_factors_of_longrope(header):
    tensors = {f"rope_factors_{name}.weight": np.full(8, value) for name, value in (("short", 2.0), ("long", 3.0))}
    model = header("phi3", {"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.25}, tensors)
    plain = architectures.describe(header("phi3")).rope.frequencies
    for context, factor in ((512, 2.0), (513, 3.0), (None, 3.0)):
        rope = architectures.describe(model, context=context).rope
        assert isinstance(rope.scaling, LongRoPE) and rope.attention_factor == 1.25
        np.testing.assert_allclose(rope.frequencies * factor, plain)


def test_llama_takes_the_factors_that_the_metadata_names(header):
    tensors = {f"rope_{name}.weight": np.full(8, 2.0) for name in ("freqs", "factors_short", "factors_long")}
    tensors["rope_freqs.weight"] = np.full(8, 5.0)
    plain = architectures.describe(header("llama")).rope.frequencies
    for kind, factor in (("linear", 5.0), ("longrope", 2.0)):
        rope = architectures.describe(header("llama", {"rope.scaling.type": kind}, tensors)).rope
        np.testing.assert_allclose(rope.frequencies * factor, plain)


def test_an_unknown_scaling_is_refused(header):
    with pytest.raises(NotImplementedError, match="RoPE scaling 'spiral' is not supported"):
        architectures.describe(header("llama", {"rope.scaling.type": "spiral"}))
