"""Real models against the same weights in exact arithmetic, and against llama.cpp (tests/golden/README.md)."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from qattn import GGUFQAttentionWithRope
from qattn.models import Decoder, Model, Tokenizer
from tests.reference import nmse


class Recorded(NamedTuple):
    """A fixture with the model's path, the name of its recorded values, and what llama.cpp's rounding costs it."""

    fixture: str
    name: str
    divergence: float


MODELS = [
    Recorded("smollm2", "smollm2-135m-q4_1", 3.35e-3),
    Recorded("gemma3", "gemma-3-270m-q4_k_m", 3.13e-3),
]


@pytest.fixture(params=MODELS, ids=lambda model: model.fixture)
def model(request):
    return request.param


@pytest.fixture
def path(request, model):
    return request.getfixturevalue(model.fixture)


@pytest.fixture
def exact(golden, model):
    with np.load(golden / f"{model.name}-exact.npz") as values:
        return dict(values)


def divergence(logits, exact):
    """KL divergence of each position from the exact model, the tokens beyond its 32 best taken together."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    log_q = np.take_along_axis(logits, exact["top_ids"], 1) - peak
    log_q -= np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    log_p = exact["top_logits"] - exact["logsumexp"][:, None]
    rest_p, rest_q = (1 - np.exp(log).sum(axis=1) for log in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)


def test_float32_is_the_exact_model(path, exact):
    logits = Decoder.from_gguf(path, precision="exact", max_length=128).forward(exact["tokens"])
    assert divergence(logits, exact).mean() <= 1e-5
    assert np.array_equal(logits.argmax(axis=1), exact["top_ids"][:, 0])
    top = np.take_along_axis(logits, exact["top_ids"], 1)
    assert nmse(top, exact["top_logits"]) < 1e-9


def test_rounded_activations_are_as_accurate_as_those_of_llama_cpp(path, model, exact):
    logits = Decoder.from_gguf(path, max_length=128).forward(exact["tokens"])
    assert divergence(logits, exact).mean() <= model.divergence
    margin = exact["top_logits"][:, 0] - exact["top_logits"][:, 1]
    clear = margin > 0.3
    assert np.array_equal(logits.argmax(axis=1)[clear], exact["top_ids"][clear, 0])


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_text_is_continued_as_llama_cpp_does(path, model, golden, precision):
    writer = Model.from_gguf(path, precision=precision, max_length=128)
    for case in json.loads((golden / f"{model.name}-greedy.json").read_text()):
        tokens = writer.tokenizer.encode(case["prompt"], special=True)
        assert tokens == case["prompt_tokens"]
        generation = writer.generate(tokens, max_tokens=len(case["greedy_tokens"]))
        list(generation)
        sure = next((i for i, margin in enumerate(case["top1_margin"]) if margin < 0.3), len(case["top1_margin"]))
        want = [token for token in case["greedy_tokens"][:sure] if token not in writer.tokenizer.ends]
        assert generation.tokens[: len(want)] == want


def test_gemmas_tokens_are_those_of_llama_cpp(gemma3, golden):
    tokenizer = Tokenizer.from_gguf(gemma3)
    for case in json.loads((golden / "gemma-3-270m-tokens.json").read_text()):
        assert tokenizer.encode(case["text"], special=True) == case["tokens"], case["text"]


@pytest.mark.parametrize("layer", [0, 15, 29])
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_attention_blocks_of_smollm2(smollm2, golden, layer, precision):
    with np.load(golden / "smollm2-135m-q4_1-exact.npz") as values:
        exact = dict(values)
    cache = {"exact": "float32", "int8": "bfloat16"}[precision]
    limit = 1e-6 if precision == "exact" else {0: 7e-5, 15: 5.2e-4, 29: 7.2e-4}[layer]  # llama.cpp's own deviations
    attn = GGUFQAttentionWithRope.from_gguf(smollm2, layer, precision=precision, cache_dtype=cache)
    heads = []
    project, attn.o_proj = attn.o_proj, lambda x: heads.append(x) or project(x)
    out = attn(exact[f"x-{layer}"])
    assert nmse(heads[0], exact[f"kqv-{layer}"]) <= limit
    assert nmse(out, exact[f"wo-{layer}"]) <= limit
