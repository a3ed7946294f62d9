"""Decoders of every architecture that is described, against float64 NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import CacheError, GGUFError, introspect, masks
from qattn.cpu.kernel import Kernel, Program
from qattn.linear import Linear
from qattn.models import Decoder, ModelConfig, architectures
from qattn.models.config import unsupported
from tests import reference_decoder, tiny_model
from tests.reference import nmse

ARCHITECTURES = tiny_model.ARCHITECTURES
TOKENS = np.random.default_rng(1).integers(0, 256, 40)  # more than Gemma's window, and than Phi's original context


def test_every_architecture_is_tested():
    assert set(ARCHITECTURES) == set(architectures.names())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "limit"), [("exact", 1e-11), ("int8", 2e-3)])
def test_logits_agree_with_float64(tmp_path, architecture, precision, limit):
    path = tiny_model.write(tmp_path / "m.gguf", architecture=architecture)
    logits = Decoder.from_gguf(path, precision=precision).forward(TOKENS)
    assert nmse(logits, reference_decoder.logits(path, TOKENS)) < limit


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("gemma3", {"final_logit_softcapping": 0.0}),
        ("gemma3", {"final_logit_softcapping": 3.0}),
        ("gemma3", {"attention.sliding_window": 20}),
        ("gemma3", {"rope.freq_base_swa": 10000.0}),
        ("gemma3", {"rope.freq_base": 50.0}),
        ("gemma3", {"attention.sliding_window_pattern": [False, True]}),
        ("phi3", {"rope.scaling.original_context_length": tiny_model.CONTEXT}),
        ("phi3", {"rope.scaling.attn_factor": 1.0}),
    ],
)
def test_what_the_metadata_says_is_heeded(tmp_path, architecture, change):
    changes = {f"{architecture}.{key}": value for key, value in change.items()}
    path = tiny_model.write(tmp_path / "m.gguf", architecture=architecture, **changes)
    logits = Decoder.from_gguf(path, precision="exact").forward(TOKENS)
    assert nmse(logits, reference_decoder.logits(path, TOKENS)) < 1e-11
    unchanged = tiny_model.write(tmp_path / "unchanged.gguf", architecture=architecture)
    assert nmse(reference_decoder.logits(unchanged, TOKENS), logits) > 1e-5  # so that the test could fail


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_heads_and_biases_are_optional(tmp_path, tied, biases):
    weights = tiny_model.weights("qwen2", tied=tied, biases=biases)
    if not tied and biases:
        weights["output.bias"] = np.linspace(-5, 5, len(tiny_model.TOKENS), dtype=np.float32)
    path = tiny_model.write(tmp_path / "m.gguf", weights, "qwen2")
    logits = Decoder.from_gguf(path, precision="exact").forward(TOKENS)
    assert nmse(logits, reference_decoder.logits(path, TOKENS)) < 1e-11


@pytest.fixture(scope="module", params=ARCHITECTURES)
def decoder(request, tmp_path_factory):
    """A decoder of each architecture."""
    path = tiny_model.write(tmp_path_factory.mktemp("m") / "m.gguf", architecture=request.param)
    return Decoder.from_gguf(path, precision="exact")


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True))
def test_tokens_in_pieces_give_the_logits_of_all_at_once(decoder, cuts):
    decoder.reset()
    whole = decoder.forward(TOKENS)
    decoder.reset()
    pieces = [decoder.forward(piece) for piece in np.split(TOKENS, sorted(cuts))]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert len(decoder) == 40


def test_a_decode_step_is_recorded_and_its_replay_gives_the_same_bits(decoder, monkeypatch):
    decoder.reset()
    whole = decoder.forward(TOKENS)
    decoder.reset()
    decoder.forward(TOKENS[:1])
    program, called = decoder._step.program, []
    call, replay = Kernel.__call__, Program.replay
    monkeypatch.setattr(
        Kernel, "__call__", lambda self, *args, **kw: called.append(self.name) or call(self, *args, **kw)
    )
    monkeypatch.setattr(Program, "replay", lambda self: called.append(self) or replay(self))
    for n, token in enumerate(TOKENS[1:], 1):
        assert np.array_equal(decoder.forward([token])[0], whole[n])
    assert called == [program] * 39


def test_a_recorded_step_notices_what_is_replaced(decoder):
    decoder.reset()
    decoder.forward(TOKENS)
    plain = decoder.forward([7])[0]
    recorded, layer = decoder._step, decoder.layers[0]

    def again():
        decoder.truncate(len(TOKENS))
        return decoder.forward([7])[0]

    layer.down = layer.down  # nothing changes
    assert np.array_equal(again(), plain) and decoder._step is recorded
    changes = [
        (layer.attention, "head_scale", np.zeros(layer.attention.num_attention_heads)),
        (layer.attention, "mask", masks.SlidingWindow(1)),
        (layer, "attention_norm", 2 * layer.attention_norm),
        (layer, "down", Linear(np.ones(layer.down.shape, np.float32))),
        (layer.gate_up, "bias", np.ones(layer.gate_up.shape[0], np.float32)),
        (layer.attention.o_proj, "bias", np.ones(layer.attention.o_proj.shape[0], np.float32)),
    ]
    for owner, name, value in changes:
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert not np.allclose(again(), plain), name
        setattr(owner, name, before)
        assert np.array_equal(again(), plain), name
    decoder.layers.reverse()
    assert not np.array_equal(again(), plain)
    decoder.layers.reverse()
    assert np.array_equal(again(), plain)


def test_a_recorded_step_gives_way_to_a_probe(decoder):
    decoder.reset()
    decoder.forward(TOKENS)
    plain = decoder.forward([7])[0]
    decoder.truncate(len(TOKENS))
    with introspect.probed(decoder, {"weights"}) as record:
        assert np.array_equal(decoder.forward([7])[0], plain)
        record.take()
        decoder.forward([8])
        record.take()
    weights = record.joined()[0]["weights"]
    assert weights.shape[1:] == (2, len(TOKENS) + 2) and np.allclose(weights.sum(axis=-1), 1, atol=1e-5)
    decoder.truncate(len(TOKENS))
    assert np.array_equal(decoder.forward([7])[0], plain)


# Window caches


@pytest.fixture
def windowed(tmp_path):
    """A decoder whose first layer has a window, with caches for all tokens, and one with window caches."""
    path = tiny_model.write(tmp_path / "m.gguf", architecture="gemma3")
    options = {"precision": "exact", "max_length": 2000}
    return [Decoder.from_gguf(path, window_caches=window_caches, **options) for window_caches in (False, True)]


def test_window_caches_give_the_same_bits_in_less_memory(windowed):
    tokens, (plain, decoder) = np.resize(TOKENS, 1500), windowed
    local, full = (layer.attention.kv_cache for layer in decoder.layers)
    before = local.nbytes
    for piece in [tokens[:700], *tokens[700:1000, None], tokens[1000:1100], tokens[1100:1101], tokens[1101:]]:
        assert np.array_equal(decoder.forward(piece), plain.forward(piece))
    assert len(decoder) == len(local) == len(full) == 1500
    assert local.nbytes == before < full.nbytes / 2 and local.starts[0] > 1000
    decoder.reset()
    plain.reset()
    assert np.array_equal(decoder.forward(tokens[:40]), plain.forward(tokens[:40]))


def test_window_caches_reach_back_no_farther_than_their_windows(windowed):
    (plain, decoder), tokens = windowed, np.resize(TOKENS, 1000)
    for each in windowed:
        each.forward(tokens)
    with pytest.raises(CacheError, match="would see token 294, and the window has left those before 384 behind"):
        decoder.truncate(300)
    with pytest.raises(CacheError, match="window caches have let go of the tokens before 384"):
        decoder.forget(900, 950)
    assert len(decoder) == 1000 and all(len(layer.attention.kv_cache) == 1000 for layer in decoder.layers)
    for each in windowed:
        each.truncate(990)
    assert np.array_equal(decoder.forward([3]), plain.forward([3]))


def test_a_failed_prompt_leaves_no_tokens_where_a_window_has_passed(windowed, monkeypatch):
    _, decoder = windowed
    decoder.forward(TOKENS)
    calls, layer = [], decoder.layers[1]
    call = type(layer).__call__

    def fail(self, *args):
        calls.append(self)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return call(self, *args)

    monkeypatch.setattr(type(layer), "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        decoder.forward(np.resize(TOKENS, 1500))
    assert len(decoder) == 0 and all(len(layer.attention.kv_cache) == 0 for layer in decoder.layers)


# Files that can't be run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_missing_tensor_is_named(tmp_path, architecture):
    weights, described = tiny_model.weights(architecture), architectures.get(architecture)
    needed = [name for name in weights if name in described.layer_tensors(1) | described.shared_tensors()]
    for name in set(needed) - set(described.inert):
        rest = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(GGUFError, match=f"has no tensor {name}"):
            Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", rest, architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tensor_that_the_architecture_has_no_use_for_is_refused(tmp_path, architecture):
    weights = tiny_model.weights(architecture)
    for name in (
        "blk.0.attn_norm_2.weight",
        "blk.1.attn_norm.bias",
        "blk.0.attn_output_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_down.scale",
        "blk.1.layer_output_scale.weight",
        "output_norm.bias",
        "dense_2.weight",
    ):
        file = tiny_model.write(tmp_path / "m.gguf", weights | {name: np.ones(64, np.float32)}, architecture)
        with pytest.raises(NotImplementedError, match=f"its decoder doesn't know the tensors {name}"):
            Decoder.from_gguf(file)


def test_norms_behind_the_blocks_are_gemmas_alone(tmp_path):
    weights = tiny_model.weights("llama") | {"blk.0.post_ffw_norm.weight": np.ones(64, np.float32)}
    with pytest.raises(NotImplementedError, match=r"doesn't know the tensors blk\.0\.post_ffw_norm\.weight"):
        Decoder.from_gguf(tiny_model.write(tmp_path / "m.gguf", weights))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("final_logit_softcapping", 25.0),
        ("logit_scale", 0.5),
        ("logit_scale", [0.5, 0.5]),
        ("num_loops", 2),
        ("residual_scale", 0.22),
        ("use_parallel_residual", True),
    ],
)
def test_metadata_that_would_change_the_result_is_refused(tmp_path, key, value):
    path = tiny_model.write(tmp_path / "m.gguf", **{f"llama.{key}": value})
    message = rf"llama\.{key} is .*, which its decoder doesn't know"
    with qattn.open(path) as model, pytest.raises(NotImplementedError, match=message):
        ModelConfig.from_gguf(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_say_nothing_are_no_obstacle(tmp_path, architecture):
    nothing = {"embedding_scale": 0.0, "expert_count": 0, "logit_scale": 0.0, "residual_scale": 0.0, "num_loops": 0}
    nothing |= {"use_parallel_residual": False, "attention.causal": True}
    if architecture != "gemma3":
        nothing["final_logit_softcapping"] = 30.0  # llama.cpp's default, which it writes for all
    changes = {f"{architecture}.{key}": value for key, value in nothing.items()}
    with qattn.open(tiny_model.write(tmp_path / "m.gguf", architecture=architecture, **changes)) as model:
        assert unsupported(model) == []
