"""The decoder, what it generates, and how well it agrees with exact arithmetic."""

import numpy as np
import pytest

import qattn
from qattn import CacheError, GGUFError, GGUFQAttentionWithRope
from qattn.cpu import feed_forward
from qattn.models import Decoder, Model, ModelConfig, Sampler, TemplateError
from qattn.models.perplexity import perplexity
from tests import reference_decoder, tiny_model
from tests.reference import nmse


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of the tiny model."""
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def decoder(tiny):
    return Decoder.from_gguf(tiny, precision="exact")


# The decoder


def test_more_tokens_than_are_computed_at_once_give_the_same_logits(tmp_path):
    path = tiny_model.write(tmp_path / "m.gguf", llama__context_length=2000)
    tokens = np.random.default_rng(3).integers(0, 256, 1100)
    decoder = Decoder.from_gguf(path, precision="exact")
    last = decoder.forward(tokens, last_only=True)
    decoder.reset()
    whole = decoder.forward(tokens)
    assert whole.shape == (1100, len(tiny_model.TOKENS))
    assert np.array_equal(whole[-1:], last)


def test_a_truncated_sequence_can_be_continued(decoder):
    decoder.reset()
    want = decoder.forward([1, 2, 3, 4])
    decoder.truncate(2)
    assert np.array_equal(decoder.forward([3, 4]), want[2:])


def test_tokens_can_be_forgotten(tmp_path):
    """In a model of one layer, keys and values know of no other tokens: the rest is as if there had been no others."""
    path = tiny_model.write(tmp_path / "m.gguf", llama__block_count=1)
    decoder, other = (Decoder.from_gguf(path, precision="exact") for _ in range(2))
    tokens = np.random.default_rng(3).integers(0, 256, 40)
    decoder.forward(tokens)
    decoder.forget(3, 20)
    decoder.forget(5, 5)
    other.forward(np.delete(tokens, slice(3, 20)))
    assert len(decoder) == len(other) == 23
    for more in ([7, 8], [9], [10], [11]):
        assert nmse(decoder.forward(more), other.forward(more)) < 1e-9
    with pytest.raises(CacheError, match="tokens 3 to 99 were to be forgotten; there are 28"):
        decoder.forget(3, 99)


@pytest.mark.parametrize(("dtype", "hadamard"), [("q8_0", False), ("q8_0/q4_0", True), ("float8", False)])
def test_a_cache_of_any_type(tiny, dtype, hadamard):
    exact = Decoder.from_gguf(tiny, precision="exact")
    coarse = Decoder.from_gguf(tiny, precision="exact", cache_dtype=dtype, hadamard=hadamard)
    tokens = np.random.default_rng(3).integers(0, 256, 40)
    for each in (tokens[:30], *tokens[30:, None]):
        want, got = exact.forward(each), coarse.forward(each)
        assert 0 < nmse(got, want) < 0.1
    params = coarse.layers[0].attention.kv_params
    assert (params.dtype, params.hadamard) == (dtype, hadamard)


def test_every_token_goes_through_the_attention_layer(tiny, monkeypatch):
    seen = []
    inner = GGUFQAttentionWithRope.forward

    def forward(self, x, *others):
        seen.append(len(x))
        return inner(self, x, *others)

    monkeypatch.setattr(GGUFQAttentionWithRope, "forward", forward)
    Decoder.from_gguf(tiny).forward([1, 2, 3])
    assert seen == [3] * tiny_model.LAYERS


def test_an_interrupted_forward_leaves_the_caches_as_they_were(tiny, monkeypatch):
    decoder = Decoder.from_gguf(tiny, precision="exact")
    want = decoder.forward([1, 2, 3])[2]
    decoder.truncate(2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feed_forward, "gated", interrupted)  # the first layer's cache has the token by then
        with pytest.raises(KeyboardInterrupt):
            decoder.forward([9])
    assert {len(layer.attention.kv_cache) for layer in decoder.layers} == {2}
    assert np.array_equal(decoder.forward([3])[0], want)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens are empty"),
        ([1, 999], r"tokens\[1\] is 999; the vocabulary has tokens 0 to 264"),
        ([-1], r"tokens\[0\] is -1"),
        ([1.5], "dtype float64; expected integers"),
        ([[1, 2]], r"tokens has shape \(1, 2\)"),
    ],
)
def test_wrong_tokens_are_refused(decoder, tokens, message):
    with pytest.raises(ValueError, match=message):
        decoder.forward(tokens)


def test_a_context_longer_than_the_cache_is_refused_before_any_work(decoder):
    decoder.reset()
    decoder.forward([1])
    with pytest.raises(CacheError, match="64 tokens after the 1 that it has don't fit into the cache of 64"):
        decoder.forward([1] * 64)
    assert {len(layer.attention.kv_cache) for layer in decoder.layers} == {1}


# Files that can't be run


def test_a_missing_tensor_is_named(tmp_path):
    for name in ("token_embd.weight", "output_norm.weight", "blk.1.ffn_norm.weight", "blk.0.ffn_up.weight"):
        tensors = tiny_model.weights()
        del tensors[name]
        with pytest.raises(GGUFError, match=f"has no tensor {name}"):
            Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", tensors))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = tiny_model.weights() | {"blk.0.ffn_down.weight": np.ones((64, 64), np.float32)}
    with pytest.raises(GGUFError, match=r"blk.0.ffn_down.weight has shape \(64, 64\); .* needs \(64, 96\)"):
        Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize(
    "key",
    ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.layer_norm_rms_epsilon"],
)
def test_missing_metadata_is_named(tmp_path, key):
    path = tiny_model.write(tmp_path / "m.gguf", **{f"llama.{key}": None})
    with pytest.raises(GGUFError, match=f"metadata llama.{key} is missing"):
        Decoder.from_gguf(path)


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path):
    path = tiny_model.write(tmp_path / "m.gguf", llama__block_count=2**31)
    with pytest.raises(GGUFError, match=r"has no tensor blk.2.attn_norm.weight, but llama.block_count is 2147483648"):
        Decoder.from_gguf(path)


def test_a_decoder_that_would_come_out_wrong_is_refused(tmp_path):
    tensors = tiny_model.weights() | {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    with pytest.raises(NotImplementedError, match=r"doesn't know the tensors blk.0.ffn_gate_inp.weight"):
        Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", tensors))
    with pytest.raises(NotImplementedError, match=r"llama.expert_count is 8, which its decoder doesn't know"):
        Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", llama__expert_count=8))
    with pytest.raises(NotImplementedError, match="no decoder for architecture 'mamba'"):
        Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", architecture="mamba"))


def test_the_configuration_is_what_the_file_says(tiny):
    with qattn.open(tiny) as model:
        config = ModelConfig.from_gguf(model)
    assert config == ModelConfig("llama", 2, 64, 96, len(tiny_model.TOKENS), 64, pytest.approx(1e-5))


# Capabilities


def test_a_supported_file_is_said_to_be_supported(tiny):
    report = qattn.capabilities(tiny)
    assert report.supported and report.layers == 2 and report.formats == {"F32": True, "Q8_0": True}
    assert str(report) == "tensors: supported (F32, Q8_0)\nattention: supported (llama, 2 layers)"


def test_what_is_not_supported_is_named(tmp_path):
    tensors = tiny_model.weights() | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    report = qattn.capabilities(tiny_model.write(tmp_path / "m.gguf", tensors))
    assert not report.supported and not report.unsupported_tensors
    assert "attn_sinks" in str(report)


def test_damaged_metadata_of_attention_is_reported(tmp_path):
    path = tiny_model.write(tmp_path / "m.gguf", **{"llama.attention.head_count": None})
    assert "llama.attention.head_count is missing" in str(qattn.capabilities(path))


def test_a_tensor_of_an_unknown_format_is_reported(tiny, tmp_path):
    content = bytearray(tiny.read_bytes())
    entry = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    content[entry : entry + 4] = (99).to_bytes(4, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    report = qattn.capabilities(path)
    assert report.unsupported_tensors == {"token_embd.weight": "type 99"}
    assert "1 NOT supported: token_embd.weight is type 99" in str(report)


# Text


def test_generating_greedily_takes_the_largest_logit_each_time(tiny):
    model = Model.from_gguf(tiny)
    generation = model.generate("hello world", max_tokens=10)
    text = "".join(generation)
    tokens = list(generation.prompt_tokens)
    for token in generation.tokens:
        model.reset()
        assert token == model.forward(tokens)[-1].argmax()
        tokens.append(token)
    assert text == model.tokenizer.decode(generation.tokens)
    assert generation.finish_reason in ("max_tokens", "end")


def test_two_generations_at_once_are_refused(tiny):
    """Also where the other one has read as many tokens."""
    model = Model.from_gguf(tiny)
    first, second = model.generate([1, 2, 3], max_tokens=5), model.generate([7, 6, 5], max_tokens=5)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="read something else meanwhile"):
        list(first)


def test_generation_stops_where_the_cache_ends(tiny):
    model = Model.from_gguf(tiny, max_length=12)
    model.tokenizer.ends = frozenset()
    generation = model.generate("hello", max_tokens=None)
    list(generation)
    assert generation.finish_reason == "full"
    assert len(generation.prompt_tokens) + len(generation.tokens) == 13  # the last one needs no place


def test_rows_that_pad_the_embeddings_are_never_chosen(tmp_path):
    tensors = tiny_model.weights()
    used, padded = tensors["token_embd.weight"], np.full((64, tiny_model.HIDDEN), 0, np.float32)
    tensors["token_embd.weight"] = np.concatenate([used * 0.01, padded])
    tensors["output.weight"] = np.concatenate([used * 0.01, -50 * used[:32], 50 * used[:32]])  # huge logits, both signs
    model = Model.from_gguf(tiny_model.write(tmp_path / "m.gguf", tensors))
    generation = model.generate("hello", max_tokens=10)
    list(generation)
    assert max(generation.tokens) < len(tiny_model.TOKENS)
    assert model.decoder.config.vocabulary_size == len(tiny_model.TOKENS) + 64


def test_an_end_token_ends_the_text_and_is_not_shown(tiny):
    model = Model.from_gguf(tiny)
    first = int(model.forward(model.tokenizer.encode("hello"))[-1].argmax())
    model.tokenizer.ends = frozenset({first})
    generation = model.generate("hello", max_tokens=5)
    assert list(generation) == [] and generation.tokens == [] and generation.finish_reason == "end"


def test_the_seed_decides_the_text(tiny):
    model = Model.from_gguf(tiny)
    texts = {
        seed: "".join(model.generate("hello", max_tokens=20, sampler=Sampler(2.0, seed=seed))) for seed in range(4)
    }
    again = "".join(model.generate("hello", max_tokens=20, sampler=Sampler(2.0, seed=2)))
    assert again == texts[2] and len(set(texts.values())) > 1


def test_an_empty_prompt_is_refused(tiny):
    model = Model.from_gguf(tiny)
    for prompt in ("", []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            model.generate(prompt)


def test_a_prompt_longer_than_the_cache_is_refused(tiny):
    with pytest.raises(CacheError, match="the prompt has 65 tokens, but the cache holds 64"):
        Model.from_gguf(tiny).generate([1] * 65)


def test_a_chat_prompt_has_control_tokens_but_its_messages_have_none_unless_written_out(tiny):
    model = Model.from_gguf(tiny)
    tokens = model.chat_prompt([{"role": "user", "content": "hello"}])
    assert tokens[0] == tiny_model.START and tokens.count(tiny_model.END) == 1
    assert tiny_model.START not in model.generate("<|start|>hello").prompt_tokens


def test_a_model_without_a_chat_template_says_so(tmp_path):
    model = Model.from_gguf(tiny_model.write(tmp_path / "m.gguf", tokenizer__chat_template=None))
    with pytest.raises(TemplateError, match="no chat template"):
        model.chat_prompt([{"role": "user", "content": "hello"}])


def test_perplexity_is_that_of_the_logits(tiny):
    model = Model.from_gguf(tiny, precision="exact")
    text = "hello world, " * 6
    tokens = model.tokenizer.encode(text)
    assert len(tokens) > 20
    result = perplexity(model, text, context=20)
    losses = []
    for first in range(0, len(tokens), 20):
        piece = tokens[first : first + 20]
        logits = reference_decoder.logits(tiny, piece)
        log_sums = np.log(np.exp(logits).sum(axis=1))
        losses += [log_sums[i] - logits[i, piece[i + 1]] for i in range(len(piece) - 1)]
    assert result.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result.tokens == len(losses)
    with pytest.raises(ValueError, match="the text has 1 tokens; perplexity needs at least 2"):
        perplexity(model, "h")
