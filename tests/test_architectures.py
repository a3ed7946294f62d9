"""Descriptions of attention by architecture: recorded blocks, and what metadata and tensors make of them."""

from __future__ import annotations

import numpy as np
import pytest

import qattn
from qattn import architectures
from qattn.architectures._config import Gate, Norm, Temperature
from qattn.errors import GGUFError
from qattn.masks import Causal, Chunked, Null, SlidingWindow, SlidingWindowNoncausal, SymmetricWindow
from tests.block_reference import block, file_tensors
from tests.conftest import GOLDEN
from tests.gguf_headers import MORE, Headers
from tests.reference import nmse
from tests.strategies import normal

FILES = sorted((GOLDEN / "architectures").glob("*.gguf"))


@pytest.fixture
def header(tmp_path):
    with Headers(tmp_path) as headers:
        yield headers


# Recorded blocks


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_description_gives_the_recorded_block(path):
    recorded = np.load(path.with_suffix(".npz"))
    layers = [int(name[2:]) for name in recorded.files if name.startswith("x-")]
    assert layers
    with qattn.open(path) as model:
        for layer in layers:
            heads, output = block(architectures.describe(model, layer), file_tensors(model), recorded[f"x-{layer}"])
            # In float64; the recordings are of float32, with angles of thousands of radians in MiniCPM 3.
            assert nmse(heads, recorded[f"kqv-{layer}"]) < 1e-10
            assert nmse(output, recorded[f"wo-{layer}"]) < 1e-10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_layer_gives_the_recorded_block(path):
    recorded = np.load(path.with_suffix(".npz"))
    for layer in [int(name[2:]) for name in recorded.files if name.startswith("x-")]:
        for precision, cache_dtype, limit in (("exact", "float32", 1e-11), ("int8", "bfloat16", 3e-4)):
            attn = qattn.GGUFQAttentionWithRope.from_gguf(path, layer, precision=precision, cache_dtype=cache_dtype)
            output, seen = attn(recorded[f"x-{layer}"], capture={"heads"})
            with qattn.open(path) as model:
                scale = output_scale(model, attn.config)
            assert nmse(seen["heads"].reshape(len(output), -1), recorded[f"kqv-{layer}"] * scale) < limit
            want = recorded[f"wo-{layer}"] * scale + (0 if attn.o_proj.bias is None else attn.o_proj.bias)
            assert nmse(output, want) < limit


def output_scale(model, config):
    """What a file multiplies the output by, behind the recorded product."""
    name = f"{config.prefix}{config.output}.scale"
    applied = name in model and f"{config.output}.scale" not in config.unused
    return config.output_scale * (float(np.asarray(model.mapped(name)).ravel()[0]) if applied else 1.0)


def test_all_recorded_files_are_supported_as_a_whole():
    assert len(FILES) == 35
    for path in FILES:
        with qattn.open(path) as model:
            assert architectures.unsupported(model) == []


# What metadata means

NO_ROPE, RMS = {"rope": None}, Norm("rms", pytest.approx(1e-6))
WINDOW = {"attention.sliding_window": 24}
PREDICTS = WINDOW | {"nextn_predict_layers": 1, "attention.sliding_window_pattern": [True] * 7}
NO_BIASES, NO_SCALES = ({f"attn_{name}.{kind}" for name in ("q", "k", "v", "qkv")} for kind in ("bias", "scale"))
RATIO = {"attention.compress_ratios": [0, 4] * 4}

CASES = [
    # architecture, metadata, layer, fields
    ("llama", {}, 0, {"mask": Causal(), "scale": 0.25, "head_dim": 16, "num_key_value_heads": 2}),
    ("llama", {"attention.key_length": 32, "attention.value_length": 8}, 0, {"head_dim": 32, "value_dim": 8}),
    ("llama", {"attention.key_length": 0, "attention.head_count_kv": 0}, 0, {"head_dim": 16, "num_key_value_heads": 4}),
    ("llama", {"attention.causal": False}, 0, {"mask": Null()}),
    ("llama", {"attention.head_count": [4, 8] * 4}, 1, {"num_attention_heads": 8, "head_dim": 16}),
    ("granite", {"attention.scale": 0.5}, 0, {"scale": 0.5}),
    ("granite", {"rope.scaling.finetuned": False}, 0, NO_ROPE),
    ("granitemoe", {"attention.scale": 0.0}, 0, {"scale": 0.25}),
    (
        "granite_swa",
        WINDOW | {"attention.sliding_window_pattern": [True] * 8},
        7,
        {"mask": SlidingWindow(24), "sinks": True},
    ),
    ("llama4", WINDOW, 0, {"mask": Chunked(8192), "temperature": None, "norm_after_rope": True}),
    ("llama4", WINDOW, 3, NO_ROPE | {"mask": Causal(), "temperature": Temperature(8192, 0.1, 1), "q_norm": None}),
    ("llama4", {"attention.sliding_window": 0}, 3, {"mask": Causal(), "temperature": None}),
    ("mistral3", {"attention.temperature_scale": 0.1}, 0, {"temperature": Temperature(4096, pytest.approx(0.1))}),
    ("smollm3", {}, 3, NO_ROPE),
    ("maincoder", {}, 0, {"norm_after_rope": True, "q_norm": RMS}),
    ("talkie", {}, 0, {"k_norm": Norm("rms", pytest.approx(1e-6), weighted=False)}),
    ("chameleon", {}, 0, {"q_norm": Norm("layer", 1e-5)}),
    ("baichuan", {"block_count": 40}, 0, NO_ROPE | {"alibi": 8.0}),
    ("refact", {}, 0, NO_ROPE | {"alibi": 8.0}),
    ("bloom", {}, 0, NO_ROPE | {"alibi": 8.0}),
    ("jais", {"attention.max_alibi_bias": 4.0}, 0, NO_ROPE | {"alibi": 4.0, "scale": 1 / 16}),
    ("mpt", {"attention.clamp_kqv": 6.0}, 0, NO_ROPE | {"alibi": 0.0, "clamp_qkv": 6.0, "q_norm": None}),
    ("dbrx", {"attention.clamp_kqv": 0.0}, 0, {"clamp_qkv": None}),
    ("gpt2", {}, 0, NO_ROPE),
    ("dream", {}, 0, {"mask": Null()}),
    ("rnd1", {}, 0, {"mask": Null()}),
    ("qwen3next", {}, 3, {"gate": Gate("sigmoid", interleaved=True)}),
    ("gemma2", {}, 0, {"mask": SlidingWindow(4096), "softcap": 50.0}),
    ("gemma2", {"block_count": 46, "attention.key_length": 32}, 1, {"mask": Causal(), "scale": 16**-0.5}),
    ("gemma2", {"attn_logit_softcapping": 20.0}, 0, {"softcap": 20.0}),
    ("gemma3", WINDOW, 4, {"mask": SlidingWindow(24), "k_norm": RMS}),
    ("gemma3", WINDOW, 5, {"mask": Causal()}),
    ("gemma3", {}, 0, {"mask": Causal()}),
    ("gemma3", WINDOW | {"attention.causal": False}, 0, {"mask": SlidingWindowNoncausal(24)}),
    ("gemma4", MORE | {"attention.causal": False}, 1, {"mask": Causal()}),
    ("gemma4", MORE | {"attention.causal": False}, 0, {"mask": SlidingWindowNoncausal(24)}),
    ("gemma-embedding", WINDOW, 0, {"mask": SymmetricWindow(24), "scale": 0.25}),
    ("gemma3n", WINDOW | {"block_count": 30}, 24, {"shares_cache_of": 19, "scale": 1.0, "mask": Causal()}),
    ("gemma3n", WINDOW | {"block_count": 30}, 25, {"shares_cache_of": 18, "mask": SlidingWindow(24)}),
    ("gpt-oss", WINDOW, 0, {"mask": SlidingWindow(24), "sinks": True}),
    ("gpt-oss", WINDOW, 1, {"mask": Causal()}),
    ("exaone4", {"block_count": 64}, 0, {"mask": SlidingWindow(4096)}),
    ("exaone4", {"block_count": 64}, 3, NO_ROPE | {"mask": Causal()}),
    ("exaone-moe", {}, 0, {"mask": SlidingWindow(128)}),
    ("exaone-moe", PREDICTS, 7, NO_ROPE | {"mask": Causal()}),
    ("cohere2moe", PREDICTS, 7, {"mask": Causal()}),
    ("dots3note", MORE | PREDICTS, 7, {"mask": SlidingWindow(24)}),
    ("cohere2", WINDOW, 3, NO_ROPE | {"mask": Causal()}),
    ("cohere2moe", WINDOW, 4, NO_ROPE | {"mask": Causal()}),
    ("smallthinker", WINDOW, 0, NO_ROPE | {"mask": Causal()}),
    ("smallthinker", WINDOW, 1, {"mask": SlidingWindow(4096)}),
    ("afmoe", WINDOW, 3, NO_ROPE | {"mask": Causal(), "gate": Gate("sigmoid")}),
    ("laguna", WINDOW, 1, {"mask": SlidingWindow(24), "gate": Gate("softplus")}),
    ("grok", {}, 0, {"scale": pytest.approx(0.08838834764831845), "softcap": 30.0}),
    ("bitnet", {}, 0, {"output_norm": RMS}),
    ("hunyuan-moe", {}, 0, {"norm_after_rope": True}),
    ("olmo2", WINDOW, 0, {"mask": SlidingWindow(24)}),
    ("phi3", WINDOW, 0, {"mask": Causal()}),
    ("jamba", {"attention.head_count_kv": [2, 0] * 4}, 0, NO_ROPE),
    ("nemotron_h", {"attention.head_count_kv": [2, 0] * 4}, 0, NO_ROPE),
    ("lfm2", WINDOW | {"attention.head_count_kv": [2, 0] * 4}, 2, {"mask": SlidingWindow(24)}),
    ("bert", {"attention.causal": True}, 0, NO_ROPE | {"mask": Null()}),
    ("jina-bert-v2", {}, 0, NO_ROPE | {"alibi": 8.0, "mask": Null()}),
    ("modern-bert", WINDOW, 1, {"mask": SymmetricWindow(24)}),
    ("modern-bert", WINDOW, 3, {"mask": Null()}),
    ("t5encoder", {}, 1, NO_ROPE | {"distances": "two-sided", "mask": Null(), "prefix": "enc.blk.1.", "scale": 1.0}),
    ("t5", {}, 1, NO_ROPE | {"distances": "one-sided", "mask": Causal(), "output": "attn_o"}),
    (
        "qwen4exp",
        RATIO | {"attention.indexer.top_k": 8, "attention.recurrent_layers": [False] * 8},
        0,
        {"mask": Causal()},
    ),
    ("hy_v4", MORE, 0, {"unused": frozenset({"attn_gate.scale", "attn_output.scale"})}),
    ("mimo2", MORE | {"nextn_predict_layers": 1}, 6, {"unused": frozenset(NO_BIASES | NO_SCALES)}),
    ("mimo2", MORE | {"nextn_predict_layers": 1}, 7, {"unused": frozenset(NO_BIASES)}),
    ("minimax-m3", {"leading_dense_block_count": 1}, 0, {"k_norm": RMS}),
]


@pytest.mark.parametrize(("name", "metadata", "layer", "fields"), CASES)
def test_metadata_means_what_llama_cpp_reads(header, name, metadata, layer, fields):
    config = architectures.describe(header(name, metadata), layer)
    assert {field: getattr(config, field) for field in fields} == fields
    assert (config.rope is None) == ("rope" in fields)


# Tensors


def test_tensors_tell_which_norms_and_gates_there_are(header):
    names = ["attn_q_norm.weight", "attn_k_norm.weight", "attn_sinks.weight", "attn_gate.weight"]
    tensors = [f"blk.0.{name}" for name in names]
    assert architectures.describe(header("command-r", {}, tensors[:2])).q_norm.kind == "layer"
    assert architectures.describe(header("command-r")).q_norm is None
    assert architectures.describe(header("mimo2", MORE, tensors[2:3])).sinks
    assert not architectures.describe(header("mimo2", MORE)).sinks
    assert architectures.describe(header("step35", MORE, tensors[3:])).gate == Gate("sigmoid")
    assert architectures.describe(header("mpt", {}, tensors[:2])).k_norm.kind == "layer"
    assert architectures.describe(header("mpt", {}, tensors[1:2])).unused == {
        f"attn_k_norm.{e}" for e in ("weight", "bias")
    }


def test_gemma_4_takes_values_from_keys_where_it_has_no_weight_of_values(header):
    metadata = MORE | {"attention.key_length": 32, "attention.value_length": 32, "attention.key_length_swa": 16}
    metadata |= {"attention.value_length_swa": 16, "attention.shared_kv_layers": 2}
    model = header("gemma4", metadata, ["blk.0.attn_v.weight", "blk.0.attn_k.weight"])
    first, second, shared = (architectures.describe(model, layer) for layer in (0, 1, 7))
    assert (first.head_dim, first.value_from_key, first.mask) == (16, False, SlidingWindow(24))
    assert (second.head_dim, second.value_from_key, second.mask) == (32, True, Causal())
    assert first.v_norm == Norm("rms", pytest.approx(1e-6), weighted=False)
    assert (shared.shares_cache_of, architectures.describe(model, 6).shares_cache_of) == (5, 4)


def _loaded(model, layer, x):
    attn = qattn.GGUFQAttentionWithRope.from_gguf(model, layer, precision="exact", cache_dtype="float32")
    return attn, attn(x) if attn.config.shares_cache_of is None else None


@pytest.mark.parametrize("biases", ["qkv", "qk"])
def test_biases_may_stand_apart_from_a_fused_weight(header, biases):
    """All three are added; less of them are left alone."""
    sizes = {"q": 64, "k": 32, "v": 32}
    tensors = {
        f"blk.0.attn_{name}.bias": normal(sizes[name], size) for name, size in zip("qkv", (1, 2, 3), strict=True)
    }
    tensors = {name: bias for name, bias in tensors.items() if name[11] in biases}
    tensors |= {"blk.0.attn_qkv.weight": normal((128, 64), 4), "blk.0.attn_output.weight": normal((64, 64), 5)}
    model, x = header("llama", {}, tensors), normal((5, 64))
    attn, output = _loaded(model, 0, x)
    assert nmse(output, block(attn.config, file_tensors(model), x)[1]) < 1e-10


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_layer_without_keys_takes_the_first_rows_of_a_fused_weight(header, name):
    metadata = MORE | WINDOW | {"block_count": 30, "attention.sliding_window_pattern": [True, False] * 15}
    metadata |= {"attention.shared_kv_layers": 10, "rope.dimension_count": 16}
    metadata |= {f"attention.{name}_length": 16 for name in ("key", "value")}
    there = {"attn_qkv.weight": normal((128, 64)), "attn_output.weight": normal((64, 64), 1)}
    there |= {"attn_qkv.input_scale": np.ones(1)}
    there |= {f"attn_{name}_norm.weight": normal(16, 2) for name in "qk"}
    tensors = {f"blk.{layer}.{name}": value for layer in (18, 19, 24) for name, value in there.items()}
    model, x = header(name, metadata, tensors), normal((5, 64), 3)
    reader, _ = _loaded(model, 24, x)
    stored, _ = _loaded(model, reader.config.shares_cache_of, x)
    output = reader(x, kv_cache=stored.kv_cache)
    want = block(reader.config, file_tensors(model), x, other=(stored.config, x))[1]
    assert nmse(output, want) < 1e-10


def test_split_weights_are_absorbed(header):
    metadata = MORE | {"attention.q_lora_rank": 48}
    split = architectures.describe(header("deepseek2", metadata, ["blk.0.attn_k_b.weight", "blk.0.attn_q_a.weight"]))
    assert (split.num_key_value_heads, split.head_dim, split.value_dim) == (1, 40, 32)
    assert (split.latent.absorbed, split.latent.q_rank, split.latent.key_dim) == (True, 48, 24)
    whole = architectures.describe(header("deepseek2", metadata, ["blk.0.attn_kv_b.weight"]))
    assert (whole.num_key_value_heads, whole.head_dim, whole.value_dim) == (4, 24, 16)
    assert (whole.latent.absorbed, whole.latent.q_rank) == (False, 0)


def test_the_parts_of_t5_have_prefixes_and_one_table_of_biases(header):
    model = header("t5", {"decoder_block_count": 4}, ["enc.blk.0.attn_rel_b.weight"])
    encoder, cross = (architectures.describe(model, 3, part=part) for part in ("encoder", "cross"))
    assert (encoder.prefix, encoder.distance_table) == ("enc.blk.3.", "enc.blk.0.attn_rel_b.weight")
    assert (cross.prefix, cross.cross, cross.mask) == ("dec.blk.3.cross_", True, Null())
    with pytest.raises(ValueError, match="layer is 4; the model has layers 0 to 3"):
        architectures.describe(model, 4)
    with pytest.raises(ValueError, match="part is 'cross'; llama has no parts"):
        architectures.describe(header("llama"), part="cross")


# All of them


@pytest.mark.parametrize("name", architectures.names())
def test_every_architecture_describes_a_layer(header, name):
    config = architectures.describe(header(name, MORE | {"full_attention_interval": 1}))
    assert config.scale > 0 and config.num_attention_heads == 4 and config.prefix.endswith("blk.0.")
    assert config.head_dim == (24 if config.latent else 16)


def test_refusals_have_a_reason(header):
    for name in ("mamba", "rwkv7", "deepseek4", "gemma4-assistant", "graniteswitch", "gptj", "clip", "eagle3"):
        with pytest.raises(
            NotImplementedError, match=rf"architecture '{name}' is not supported: .+; there are: afmoe, "
        ):
            architectures.describe(header(name))
    assert architectures.unsupported(header("mamba")) == ["architecture 'mamba': it is recurrent and has no attention"]


def test_an_unknown_architecture_is_refused_by_name(header):
    with pytest.raises(NotImplementedError, match="architecture 'nonsense' is not supported; there are: afmoe"):
        architectures.describe(header("nonsense"))


def test_recurrent_layers_are_refused_and_left_out(header):
    tensors = [f"blk.{layer}.attn_q.weight" for layer in range(8)]
    for name, metadata in (
        ("jamba", {"attention.head_count_kv": [2, 0] * 4}),
        ("lfm2moe", {"attention.head_count_kv": [2, 0] * 4}),
        ("qwen35", {"full_attention_interval": 2, "block_count": 8}),
        ("minimax-01", {"attention.recurrent_layers": [False, True] * 4}),
    ):
        model = header(name, metadata, tensors)
        attends = 1 if name == "qwen35" else 0
        assert architectures.attention_layers(model) == list(range(attends, 8, 2))
        assert architectures.unsupported(model) == []
        with pytest.raises(
            NotImplementedError, match=rf"{name}: layer {1 - attends} is recurrent; it has no attention"
        ):
            architectures.describe(model, 1 - attends)


def test_layers_of_another_kind_are_refused(header):
    with pytest.raises(NotImplementedError, match="layer 2 is a feed-forward layer"):
        architectures.describe(header("nemotron_h", {"feed_forward_length": [0, 0, 9, 0, 0, 0, 0, 0]}), 2)
    with pytest.raises(NotImplementedError, match="deci: layer 1 has no attention"):
        architectures.describe(header("deci", {"attention.head_count_kv": [2, 0] * 4}), 1)


def test_chunks_to_both_sides_are_refused(header):
    with pytest.raises(NotImplementedError, match="llama4: layer 0 sees later keys in chunks"):
        architectures.describe(header("llama4", {"attention.causal": False}))


@pytest.mark.parametrize("name", ["deepseek32", "glm-dsa", "hy_v4", "dots3note", "minimax-m3", "glm5-next", "qwen4exp"])
def test_layers_that_select_keys_are_refused_unless_they_select_all(header, name):
    metadata = MORE | RATIO | {"full_attention_interval": 1, "attention.indexer.top_k": 100}
    model = header(name, metadata)
    assert architectures.describe(model, 1, context=100)
    with pytest.raises(NotImplementedError, match=rf"{name}: layer 1 selects 10\d of up to 4096 keys by an indexer"):
        architectures.describe(model, 1)


def test_tensors_that_no_description_knows_are_refused(header):
    model = header("llama", {}, ["blk.0.attn_q.weight", "blk.0.attn_sinks.weight", "blk.0.ffn_up.weight"])
    assert architectures.unsupported(model) == ["tensors blk.*.attn_sinks.weight"]
    with pytest.raises(NotImplementedError, match=r"llama with tensors blk\.0\.attn_sinks\.weight is not supported"):
        architectures.describe(model)
    assert architectures.describe(model, 1)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("llama", {"attention.head_count": 0}, "llama.attention.head_count is 0; expected at least 1"),
        ("llama", {"attention.head_count": "four"}, "llama.attention.head_count is 'four'; expected an integer"),
        ("llama", {"attention.head_count": [4, 4]}, "llama.attention.head_count has 2 entries; layer 3 has none"),
        ("llama", {"rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0; expected a positive number"),
        ("mimo2", {"attention.sliding_window_pattern": [True]}, "attention.sliding_window_pattern has 1 entries"),
        ("granite_swa", {}, "granite_swa.attention.sliding_window_pattern is missing"),
        ("cohere2", {}, "cohere2.attention.sliding_window is missing"),
        ("qwen2vl", {"rope.dimension_sections": [1, 2, 3, 4, 5]}, "expected up to four sizes"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(header, name, metadata, message):
    layer = 0 if name == "cohere2" else 3
    with pytest.raises(GGUFError, match=message):
        architectures.describe(header(name, metadata), layer)
