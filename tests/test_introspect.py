"""What layers and models tell of themselves: captures agree with each other, with float64, and cost nothing unasked."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import qattn
from qattn import KVCache, KVCacheParams, cache_types, introspect, masks, probe
from qattn.architectures import Gate, Latent, Norm
from qattn.models import Decoder, Model
from tests import reference, test_latent, tiny_model
from tests.block_reference import block
from tests.reference import nmse
from tests.strategies import normal
from tests.test_features import HIDDEN, Tensors, layers, loaded, plain

EVERYTHING = set(probe.NAMES)
TEXT = "hello world, hello whole wide world"


def grouped(attn, values):
    """Keys or values, one for each head: (keys, kv_heads, n) → (keys, heads, n)."""
    return np.repeat(values, attn.num_attention_heads // values.shape[1], axis=1)


def statistics_of(weights, places, sinks):
    """The statistics in float64, from the whole matrix: weights (heads, tokens, keys), tokens at these places."""
    weights = weights.astype(np.float64)
    sink = 1 - weights.sum(axis=2) if sinks else np.zeros(weights.shape[:2])
    every = np.concatenate([weights, np.maximum(sink, 0)[..., None]], axis=2)
    entropy = -(every * np.log(np.where(every > 0, every, 1))).sum(axis=2)
    distance = (weights * np.abs(np.arange(weights.shape[2]) - places[:, None])).sum(axis=2)
    distance /= np.where(weights.any(axis=2), weights.sum(axis=2), 1)
    return probe.Statistics(entropy.T, distance.T, weights[..., 0].T, sink.T)


def check(attn, captured, y, first=0):
    """All that is captured belongs together, for tokens that follow `first` others in the cache."""
    weights, scores, tokens = captured["weights"], captured["scores"], len(y)
    assert weights.shape == scores.shape == (attn.num_attention_heads, tokens, first + tokens)
    told, want = captured["statistics"], statistics_of(weights, np.arange(first, first + tokens), attn.config.sinks)
    for name, got, wanted in zip(told._fields, told, want, strict=True):
        assert_allclose(got, wanted, rtol=1e-4, atol=3e-5, err_msg=name)
    sees = np.isfinite(scores).any(axis=2)
    sums = weights.sum(axis=2) + told.sink.T
    assert_allclose(sums[sees], 1, atol=2e-6)
    assert not weights[~np.isfinite(scores)].any()
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(np.exp(scores.astype(np.float64)).sum(axis=2)) - np.log1p(-told.sink.T.astype(np.float64))
    certain = sees & (told.sink.T < 0.99)  # of what a sink leaves over, few digits are left in float32
    assert_allclose(captured["lse"].T[certain], lse[certain], rtol=1e-4, atol=1e-4)
    output = attn.o_proj(np.ascontiguousarray(captured["heads"].reshape(tokens, -1)))
    assert np.array_equal(output, y) and np.array_equal(captured["output"], y)


@settings(max_examples=60)
@given(described=layers(), tokens=st.integers(1, 20))
def test_captures_of_any_layer_belong_together(described, tokens):
    config, tensors = described
    attn, x = loaded(config, tensors), normal((tokens, HIDDEN), 50)
    y, captured = attn(x, capture=EVERYTHING)
    assert list(captured) == list(probe.NAMES)
    check(attn, captured, y)
    heads = config.output_scale * block(config, tensors, x)[0]
    assert nmse(captured["heads"].reshape(tokens, -1), heads) < 1e-9
    if not (config.gate or config.output_norm) and config.value_scale == config.output_scale == 1:
        attended = np.einsum("htk,khd->thd", captured["weights"], grouped(attn, captured["v"]))
        assert nmse(captured["heads"], attended) < 1e-9
    attn.reset()
    assert np.array_equal(attn(x), y) and np.array_equal(captured["input"], x)


@settings(max_examples=25)
@given(
    softcap=st.sampled_from([0.0, 3.0]),
    alibi=st.sampled_from([0.0, 8.0]),
    sinks=st.booleans(),
    masked=st.sampled_from(["", "bool", "float", "per head"]),
    cut=st.integers(0, 8),
)
def test_scores_and_lse_are_those_of_float64(softcap, alibi, sinks, masked, cut):
    config, tensors = plain(softcap=softcap, alibi=alibi, sinks=sinks)
    if sinks:
        tensors["attn_sinks.weight"] = normal(4, 3)
    attn, x, rng = loaded(config, tensors), normal((9, HIDDEN)), np.random.default_rng(0)
    mask = {"": None, "bool": rng.random((9, 9)) < 0.7, "float": normal((9, 9)), "per head": normal((9, 4, 9))}[masked]
    attn(x[:cut], mask=None if mask is None else mask[:cut, ..., :cut])
    y, lse, captured = attn(x[cut:], mask=None if mask is None else mask[cut:], return_lse=True, capture=EVERYTHING)
    check(attn, captured, y, cut)
    slopes = slopes_of(alibi)
    bias, seen = 0.0, reference.causal(9 - cut, 9)
    if masked == "bool":
        seen = seen & mask[cut:]
    elif masked:
        bias = mask[cut:].reshape(9 - cut, -1, 9).transpose(1, 0, 2)
    out, want = reference.attention(
        captured["q"], captured["k"], captured["v"], config.scale, seen,
        cap=softcap, slopes=slopes, sinks=tensors.get("attn_sinks.weight"), bias=bias,
    )  # fmt: skip
    assert nmse(captured["heads"], out) < 1e-11
    assert_allclose(lse, want, rtol=1e-5, atol=1e-5)
    assert np.array_equal(lse, captured["lse"])


def slopes_of(alibi):
    """ALiBi's slopes of 4 heads."""
    return 2.0 ** (-alibi * np.arange(1, 5) / 4) if alibi else None


@pytest.mark.parametrize(
    ("dtype", "hadamard"), [*((kind.name, False) for kind in cache_types.TYPES), ("q8_0/q4_0", False), ("q4_0", True)]
)
def test_weights_come_out_with_any_cache_type(dtype, hadamard):
    attn, x = loaded(*plain()), normal((20, HIDDEN))
    params = KVCacheParams(2, 8, dtype=dtype, hadamard=hadamard)
    y, captured = attn(x, kv_cache=KVCache(params), capture=EVERYTHING)
    check(attn, captured, y)
    attended = np.einsum("htk,khd->thd", captured["weights"], grouped(attn, captured["v"]))
    assert nmse(captured["heads"], attended) < 1e-9  # computed from the very keys and values that the cache has


def test_a_batch_gives_a_list_for_each_sequence():
    attn = loaded(*plain(alibi=8.0))
    cache, alone = KVCache(attn.kv_params, 3), [KVCache(attn.kv_params) for _ in range(3)]
    for offsets in ([0, 4, 4, 12], [0, 1, 6, 7]):
        x, lengths = normal((offsets[-1], HIDDEN)), cache.lengths + np.diff(offsets)
        mask = normal((len(x), 4, lengths.max()), 1)
        options = {"mask": mask, "row_offsets": offsets, "return_lse": True, "capture": EVERYTHING}
        y, lse, captured = attn(x, kv_cache=cache, **options)
        assert lse.shape == (len(x), 4)
        for s, rows in enumerate(map(slice, offsets, offsets[1:])):
            own_y, own = attn(x[rows], kv_cache=alone[s], mask=mask[rows, :, : lengths[s]], capture=EVERYTHING)
            assert np.array_equal(own_y, y[rows])
            for name in probe.NAMES:
                assert_allclose(np.asarray(captured[name][s]), np.asarray(own[name]), atol=1e-6, err_msg=name)


def test_long_texts_are_taken_in_blocks(monkeypatch):
    config, tensors = plain(sinks=True, softcap=3.0)
    tensors["attn_sinks.weight"] = normal(4, 3)
    attn, x, mask = loaded(config, tensors), normal((23, HIDDEN)), normal((23, 4, 23))
    _, whole = attn(x, mask=mask, capture=EVERYTHING)
    attn.reset()
    monkeypatch.setattr(probe, "_BLOCK", 5 * 4 * 23)
    y, captured = attn(x, mask=mask, capture=EVERYTHING)
    check(attn, captured, y)
    for name in ("scores", "weights", "statistics"):
        assert_allclose(np.asarray(captured[name]), np.asarray(whole[name]), atol=1e-6, err_msg=name)


def test_any_function_is_a_mask_here_too():
    strided = masks.from_function(lambda query, key: key <= query and (query - key) % 3 != 1)
    attn, x = loaded(*plain(mask=strided)), normal((9, HIDDEN))
    y, captured = attn(x, capture=EVERYTHING)
    check(attn, captured, y)
    away = np.arange(9)[:, None] - np.arange(9)
    assert np.array_equal(captured["weights"][0] > 0, (away >= 0) & (away % 3 != 1))


def test_a_window_cache_has_zeros_for_what_it_let_go():
    attn, x = loaded(*plain(mask=masks.SlidingWindow(4))), normal((400, HIDDEN))
    cache = qattn.PagedKVCache(attn.kv_params, pages=4, page_size=128, window=4)
    want = attn(x)
    got = [attn(x[n : n + 100], kv_cache=cache, capture=EVERYTHING) for n in range(0, 400, 100)]
    assert nmse(np.concatenate([y for y, _ in got]), want) < 1e-11
    y, captured = got[-1]
    check(attn, captured, y, 300)
    assert len(captured["k"]) == 400 and not captured["k"][:256].any() and captured["k"][297:].any(axis=(1, 2)).all()


@pytest.mark.parametrize("absorbed", [False, True])
def test_latent_attention_tells_what_it_compares(absorbed):
    latent = Latent(32, 8, 24, 16, 1e-5, 0, absorbed)
    attn = test_latent.latent_layer(latent, 4, test_latent.weights(latent, 4)[absorbed])
    x = normal((9, HIDDEN * 2))
    y, captured = attn(x, capture=EVERYTHING)
    check(attn, captured, y)
    assert captured["q"].shape == (9, 4, 40 if absorbed else 24)
    assert captured["k"].shape == (9, 1, 40) if absorbed else (9, 4, 24)
    assert captured["heads"].shape == (9, 4, 16)
    if not absorbed:
        assert nmse(captured["heads"], np.einsum("htk,khd->thd", captured["weights"], captured["v"])) < 1e-11


def test_a_layer_that_shares_a_cache_reads_its_keys():
    owner, reader = loaded(*plain()), loaded(*plain(shares_cache_of=0))
    owner(normal((9, HIDDEN), 1))
    y, captured = reader(normal((9, HIDDEN), 2), kv_cache=owner.kv_cache, capture=EVERYTHING)
    check(reader, captured, y)
    assert np.array_equal(captured["k"], owner.kv_cache.read()[0])


def test_cross_attention_tells_what_it_looks_at():
    attn = loaded(*plain(cross=True, mask=masks.Null(), rope=None))
    attn.remember(normal((5, HIDDEN), 2))
    _, captured = attn(normal((9, HIDDEN), 1), capture=EVERYTHING)
    assert captured["weights"].shape == (4, 9, 5)
    assert_allclose(captured["weights"].sum(axis=2), 1, atol=1e-6)
    attended = np.einsum("htk,khd->thd", captured["weights"], grouped(attn, captured["v"]))
    assert nmse(captured["heads"], attended) < 1e-11


def test_nothing_is_taken_along_unasked(monkeypatch):
    attn, x = loaded(*plain()), normal((9, HIDDEN))
    monkeypatch.setattr(importlib.import_module("qattn.attention"), "Probe", None)
    assert isinstance(attn(x), np.ndarray)


def test_no_scores_are_computed_for_what_needs_none(monkeypatch):
    attn, x = loaded(*plain()), normal((9, HIDDEN))
    monkeypatch.setattr(probe, "_block", None)
    _, captured = attn(x, capture=EVERYTHING - {"scores", "weights", "statistics"})
    assert captured["q"].shape == (9, 4, 8)
    with pytest.raises(TypeError):
        attn(x, capture={"weights"})


def test_an_unknown_name_is_refused_before_anything_happens():
    attn = loaded(*plain())
    with pytest.raises(ValueError, match="capture is 'score'; expected one of 'input', 'q', 'k', 'v', 'scores'"):
        attn(normal((9, HIDDEN)), capture={"score", "q"})
    assert len(attn.kv_cache) == 0
    assert list(attn(normal((3, HIDDEN)), capture="weights")[1]) == ["weights"]
    assert attn(normal((3, HIDDEN)), capture=())[1] == {}


def test_a_gpu_tells_the_same(cupy):
    config, tensors = plain(sinks=True, softcap=3.0, alibi=8.0)
    tensors["attn_sinks.weight"] = normal(4, 3)
    x, factors = normal((7, HIDDEN)), [1, 0, 0.5, 1]
    on_cpu, on_gpu = loaded(config, tensors), loaded(config, tensors, devices=["cuda:0"])
    on_cpu.head_scale = on_gpu.head_scale = factors
    for some in (slice(0, 6), slice(6, 7)):
        _, want = on_cpu(x[some], capture=EVERYTHING)
        y, captured = on_gpu(cupy.asarray(x[some]), capture=EVERYTHING)
        assert isinstance(y, cupy.ndarray)
        for name in probe.NAMES:
            parts = captured[name] if name == "statistics" else [captured[name]]
            assert all(isinstance(part, cupy.ndarray) for part in parts), name
            got = np.stack([cupy.asnumpy(part) for part in parts])
            assert_allclose(
                got, np.stack(want[name] if name == "statistics" else [want[name]]), atol=2e-4, err_msg=name
            )


def test_a_gpu_tells_of_pages_and_codes(cupy):
    config, tensors = plain()
    x, params = normal((140, HIDDEN)), qattn.KVCacheParams(2, 8, dtype="q8_0/q4_0")
    told = []
    for device, xp in (("cpu", np), ("cuda:0", cupy)):
        attn = loaded(config, tensors, devices=[device])
        cache = qattn.PagedKVCache(params, 2, pages=4, device=device)
        attn(xp.asarray(x[:135]), kv_cache=cache, row_offsets=[0, 3, 135])
        _, captured = attn(xp.asarray(x[135:]), kv_cache=cache, row_offsets=[0, 4, 5], capture={"k", "v", "weights"})
        told.append({name: [cupy.asnumpy(each) for each in parts] for name, parts in captured.items()})
    for name in ("k", "v", "weights"):
        for got, want in zip(told[1][name], told[0][name], strict=True):
            assert got.shape == want.shape and nmse(got, want) < 1e-4, name


# Scaling heads


@settings(max_examples=20)
@given(
    factors=st.lists(st.sampled_from([0.0, 0.5, 1.0, -2.0]), min_size=4, max_size=4),
    features=st.sampled_from([{}, {"gate": Gate("sigmoid")}, {"output_norm": Norm("rms", 1e-5)}, {"value_scale": 0.5}]),
)
def test_heads_are_scaled_before_the_output_projection(factors, features):
    config, tensors = plain(**features)
    tensors["attn_gate.weight"], tensors["attn_sub_norm.weight"] = normal((32, HIDDEN), 6) / 4, normal(32, 7)
    needed = Tensors({name: value for name, value in tensors.items() if takes(config, name)})
    attn, x = loaded(config, needed), normal((9, HIDDEN))
    y, captured = attn(x, capture={"heads"})
    attn.head_scale = factors
    attn.reset()
    scaled, after = attn(x, capture={"heads"})
    want = captured["heads"] * np.float32(factors)[:, None]
    assert_allclose(after["heads"], want, rtol=1e-6, atol=1e-7)
    assert_allclose(scaled, attn.o_proj(want.reshape(9, -1)), rtol=1e-5, atol=1e-6)
    assert np.array_equal(attn.head_scale, np.float32(factors))
    attn.head_scale = None
    attn.reset()
    assert np.array_equal(attn(x), y)


def takes(config, name):
    return not (("gate" in name and not config.gate) or ("sub_norm" in name and not config.output_norm))


def test_a_head_scale_is_a_number_for_each_head():
    attn = loaded(*plain())
    with pytest.raises(ValueError, match=r"head_scale has shape \(3,\); expected \(4,\)"):
        attn.head_scale = [1, 2, 3]
    assert attn.head_scale is None


# Models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", llama__context_length=256)


@pytest.fixture(scope="module")
def model(tiny):
    return Model.from_gguf(tiny, precision="exact")


def test_a_model_tells_what_its_layers_compute(model):
    tokens = model.tokenizer.encode(TEXT)
    captured = model.capture(TEXT, EVERYTHING)
    assert sorted(captured) == [0, 1] and len(model.decoder) == len(tokens)
    for layer, found in captured.items():
        attn = model.decoder.layers[layer].attention
        y, want = attn(found["input"], kv_cache=KVCache(attn.kv_params), capture=EVERYTHING)
        check(attn, found, found["output"])
        assert nmse(found["output"], y) < 1e-12
        for name in probe.NAMES:
            assert_allclose(np.asarray(found[name]), np.asarray(want[name]), atol=1e-5, err_msg=name)


def test_only_what_is_asked_for_is_kept(model):
    captured = model.capture(TEXT, "statistics", layers=[1])
    assert list(captured) == [1] and list(captured[1]) == ["statistics"]
    assert all(layer.attention.probe is None for layer in model.decoder.layers)


def test_a_long_text_is_one_capture(model, monkeypatch):
    whole = model.capture(TEXT, EVERYTHING)
    monkeypatch.setattr("qattn.models.decoder._CHUNK", 3)
    pieces = model.capture(TEXT, EVERYTHING)
    for layer, found in whole.items():
        for name in probe.NAMES:
            got, want = np.asarray(pieces[layer][name]), np.asarray(found[name])
            assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=f"{layer}: {name}")


def test_a_capture_of_one_token_after_recorded_steps(model):
    model.reset()
    model.forward([1, 2, 3])
    before = model.forward([4])  # records
    assert model.capture([5], {"weights"}, layers=[0])[0]["weights"].shape == (4, 1, 1)
    model.reset()
    model.forward([1, 2, 3])
    assert np.array_equal(model.forward([4]), before)


def test_a_capture_that_fails_leaves_an_empty_model(model):
    for arguments, message in (
        (([], {"q"}), "tokens are empty"),
        (([1], {"attention"}), "capture is 'attention'; expected one of"),
        (([1, 9999], {"q"}), r"tokens\[1\] is 9999"),
        (([1] * 257, {"q"}), "257 tokens don't fit into the cache of 256"),
    ):
        with pytest.raises(ValueError, match=message):
            model.capture(*arguments)
        assert all(layer.attention.probe is None for layer in model.decoder.layers)
    with pytest.raises(ValueError, match="layer is 2; the model has layers 0 to 1"):
        model.capture(TEXT, {"q"}, layers=[2])


def test_ablated_heads_come_back(model):
    def logits():
        model.reset()
        return np.concatenate([model.forward([1, 2, 3]), model.forward([4]), model.forward([5])])

    whole = logits()
    with introspect.ablated(model, 0, [1, 3]):
        without = logits()
        assert model.decoder.layers[0].attention.head_scale.tolist() == [1, 0, 1, 0]
        with introspect.ablated(model.decoder, 0, [0, 1], factor=0.5), introspect.ablated(model, 1, [2]):
            assert model.decoder.layers[0].attention.head_scale.tolist() == [0.5, 0, 1, 0]
            assert np.abs(logits() - without).max(axis=1).min() > 1e-3
        assert np.array_equal(logits(), without)
        model.reset()
        at_once = model.forward([1, 2, 3, 4, 5])
    assert_allclose(without, at_once, atol=1e-4)  # steps that were recorded before know of it
    assert np.abs(whole - without).max(axis=1).min() > 1e-3
    assert np.array_equal(logits(), whole)
    for arguments, message in (
        ((2, [0]), "layer is 2; the model has"),
        ((0, [4]), "head is 4; layer 0 has heads 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message), introspect.ablated(model, *arguments):
            pass
    assert model.decoder.layers[0].attention.head_scale is None


# What a quantization costs


def test_costs_are_those_of_the_whole_matrices(tiny, model, tmp_path):
    weights = tiny_model.weights()
    coarse = {
        name: np.asarray(qattn.quantize(w, "Q4_0")) if ".attn_" in name and w.ndim == 2 else w
        for name, w in weights.items()
    }
    path = tiny_model.write(tmp_path / "coarse.gguf", coarse, llama__context_length=256)
    tokens = model.tokenizer.encode(TEXT)
    with qattn.open(path) as other, qattn.open(tiny) as same:
        assert introspect.differences(same, other) == []
        found = list(introspect.costs(model, other, tokens))
        assert [cost.layer for cost in found] == [0, 1]
        theirs = Decoder.from_gguf(other, precision="exact")
        inputs = model.capture(tokens, {"input"})
        for cost in found:
            x, both = inputs[cost.layer]["input"], []
            for decoder in (model.decoder, theirs):
                attn = decoder.layers[cost.layer].attention
                both.append(attn(x, kv_cache=KVCache(attn.kv_params), capture={"weights"}))
            (y, a), (its, b) = both
            assert_allclose(cost.nmse, nmse(its, y), rtol=1e-6)
            p, q = (np.where(np.tri(len(tokens)), c["weights"].astype(np.float64), 1) for c in (a, b))
            assert_allclose(cost.kl, (p * np.log(p / q)).sum(axis=2).mean(axis=1), rtol=1e-3, atol=1e-7)
            assert 1e-4 < cost.nmse < 0.1 and (cost.kl > 1e-6).all()
        exact = list(introspect.costs(model, same, tokens))
        assert all(cost.nmse == 0 and not cost.kl.any() for cost in exact)


def test_costs_know_layers_that_share_a_cache(monkeypatch):
    others = [loaded(*plain()), loaded(*plain(shares_cache_of=0))]
    ours = [loaded(*plain()), loaded(*plain(shares_cache_of=0))]
    inputs = [normal((9, HIDDEN), n) for n in range(2)]
    decoder = SimpleNamespace(
        layers=[SimpleNamespace(attention=attn) for attn in ours],
        capture=lambda *_: {n: {"input": x} for n, x in enumerate(inputs)},
    )
    others[1].head_scale = [1, 1, 0, 1]
    from_gguf = SimpleNamespace(from_gguf=lambda file, layer, **_: others[layer])
    monkeypatch.setattr(introspect, "GGUFQAttentionWithRope", from_gguf)
    first, second = introspect.costs(decoder, None, None)
    assert first.nmse == 0 and second.nmse > 0.01 and not second.kl.any()


def test_files_that_can_not_be_compared_say_why(tiny, tmp_path):
    tensors = tiny_model.weights()
    fewer = {name: w for name, w in tensors.items() if not name.startswith("blk.1.")}
    wider = dict(tensors) | {"blk.1.attn_k.weight": normal((64, 64))}
    changes = {
        "other architecture": ((tensors, "mamba"), {}, "the architecture is 'mamba', not 'llama'"),
        "missing": ((fewer,), {"llama__block_count": 1}, "there is no blk.1.attn_k.weight"),
        "wider": ((wider,), {}, r"blk.1.attn_k.weight has shape \(64, 64\), not \(32, 64\)"),
        "other heads": ((tensors,), {"llama__attention__head_count": 8, "llama__attention__head_count_kv": 4},
                        "num_attention_heads is 8, not 4"),
    }  # fmt: skip
    with qattn.open(tiny) as one:
        for name, (given_tensors, metadata, message) in changes.items():
            with qattn.open(tiny_model.write(tmp_path / f"{name}.gguf", *given_tensors, **metadata)) as other:
                found = introspect.differences(one, other)
                assert any(message.replace("\\", "") in phrase for phrase in found), found
        with qattn.open(tmp_path / "missing.gguf") as shorter:
            found = introspect.differences(shorter, one)
            assert any("there is blk.1.attn_output.weight, which" in phrase for phrase in found), found
