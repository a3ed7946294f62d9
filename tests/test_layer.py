"""GGUFQAttentionWithRope and its base class."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import (
    AttentionWithRope,
    CacheError,
    GGUFQAttentionWithRope,
    KVCache,
    KVCacheParams,
    MHAMaskVariant,
    PackedMatrix,
    QuantArray,
    RotaryEmbedding,
    masks,
)
from tests import reference
from tests.reference import nmse
from tests.strategies import normal, random_weights, visible

HIDDEN, HEADS, KV_HEADS, DIM = 256, 6, 2, 32


def parameters(**changes):
    kv_params = KVCacheParams(KV_HEADS, DIM, dtype=changes.pop("cache", "float32"), max_length=changes.pop("max", None))
    given = {
        "rope": RotaryEmbedding(DIM, pairing=changes.pop("pairing", "interleaved")),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": HIDDEN,
        "kv_params": kv_params,
    }
    return given | changes


def state(formats=("Q4_K", "Q4_K", "Q6_K", "Q4_0"), bias=False):
    rows = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, HIDDEN)
    columns = (HIDDEN, HIDDEN, HIDDEN, HEADS * DIM)
    out = {}
    for seed, (name, fmt, n, m) in enumerate(zip("qkvo", formats, rows, columns, strict=True)):
        values = normal((n, m), seed) / 16
        out[f"{name}_proj.weight"] = qattn.quantize(values, fmt) if fmt else values
        if bias:
            out[f"{name}_proj.bias"] = normal((n,), seed + 10)
    return out


def layer(formats=("Q4_K", "Q4_K", "Q6_K", "Q4_0"), bias=False, **changes):
    attn = GGUFQAttentionWithRope(**parameters(has_bias=bias, **changes))
    attn.load_state_dict(state(formats, bias))
    return attn


def want(attn, x, visible=None):
    bias = 0.0 if attn.wqkv_bias is None else attn.wqkv_bias
    out = reference.layer(
        x, np.asarray(attn.wqkv), np.asarray(attn.o_proj.weights), attn.rope, HEADS, KV_HEADS, DIM,
        bias=bias, scale=attn.scale, visible=visible,
    )  # fmt: skip
    return out if attn.o_proj.bias is None else out + attn.o_proj.bias


@pytest.mark.parametrize("pairing", ["interleaved", "neox"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("precision", "limit"), [("exact", 1e-11), ("int8", 5e-4)])
def test_the_layer_agrees_with_float64(precision, limit, bias, pairing):
    attn, x = layer(bias=bias, precision=precision, pairing=pairing), normal((21, HIDDEN))
    assert nmse(attn(x), want(attn, x)) < limit


@pytest.mark.parametrize(("cache", "limit"), [("float32", 5e-4), ("float16", 5e-4), ("bfloat16", 6e-4)])
def test_the_cache_type_costs_little(cache, limit):
    attn, x = layer(cache=cache), normal((21, HIDDEN))
    assert nmse(attn(x), want(attn, x)) < limit


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), precision=st.sampled_from(["exact", "int8"]))
def test_a_prompt_in_chunks_is_the_prompt_at_once(cuts, precision):
    attn, x = layer(precision=precision), normal((40, HIDDEN))
    whole = attn(x)
    attn.reset()
    edges = [0, *sorted(cuts), 40]
    chunks = [attn(x[a:b]) for a, b in itertools.pairwise(edges)]
    assert nmse(np.concatenate(chunks), whole) < 1e-11
    assert len(attn.kv_cache) == 40


@settings(max_examples=25)
@given(steps=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_ragged_batch_is_its_sequences_one_by_one(steps):
    attn, cache = layer(precision="exact"), KVCache(KVCacheParams(KV_HEADS, DIM, dtype="float32"), sequences=3)
    alone = [KVCache(KVCacheParams(KV_HEADS, DIM, dtype="float32")) for _ in range(3)]
    for i, counts in enumerate(steps):
        offsets = np.concatenate([[0], np.cumsum(counts)])
        x = normal((offsets[-1], HIDDEN), i)
        got = attn(x, kv_cache=cache, row_offsets=offsets)
        for s in range(3):
            rows = slice(offsets[s], offsets[s + 1])
            assert np.array_equal(got[rows], attn(x[rows], kv_cache=alone[s]))
    assert cache.lengths.tolist() == [len(c) for c in alone]


def test_the_layer_continues_its_cache_and_forgets_it():
    attn, x = layer(), normal((5, HIDDEN))
    first = attn(x)
    assert not np.array_equal(attn(x), first)
    attn.reset()
    assert np.array_equal(attn(x), first)


def test_only_relative_positions_matter():
    attn, x = layer(precision="exact"), normal((9, HIDDEN))
    first = attn(x)
    attn.reset()
    assert nmse(attn(x, positions=1000), first) < 1e-7


def test_the_null_mask_sees_later_tokens():
    attn, x = layer(precision="exact", mask_variant=MHAMaskVariant.NULL_MASK), normal((9, HIDDEN))
    assert nmse(attn(x), want(attn, x, np.ones((9, 9), bool))) < 1e-11


@pytest.mark.parametrize("name", masks.names())
def test_every_mask(name):
    """By its name, or as a value; a prompt that comes in two pieces, of which the second sees the first."""
    window = 4 if masks.has_window(name) else None
    mask, x = masks.get(name, window), normal((21, HIDDEN))
    attn = layer(precision="exact", mask_variant=mask)
    whole = attn(x)
    assert nmse(whole, want(attn, x, visible(mask, 21, 21))) < 1e-11
    if not mask.bounds(3, 99)[1] > 4:  # later keys don't count
        attn.reset()
        assert nmse(np.concatenate([attn(x[:13]), attn(x[13:])]), whole) < 1e-11
    if name in [variant.value for variant in MHAMaskVariant]:
        variant = layer(precision="exact", mask_variant=MHAMaskVariant(name), local_window_size=window)
        assert np.array_equal(variant(x), whole)


def test_a_mask_for_one_call():
    attn, x = layer(precision="exact"), normal((9, HIDDEN))
    hidden = np.random.default_rng(0).random((9, 9)) < 0.3
    assert nmse(attn(x, mask=~hidden), want(attn, x, reference.causal(9, 9) & ~hidden)) < 1e-11
    with pytest.raises(ValueError, match=r"mask has shape \(9, 9\); expected \(9, 18\) or \(9, 6, 18\)"):
        attn(x, mask=~hidden)


def test_scale_replaces_the_default():
    attn, x = layer(precision="exact", scale=0.05), normal((9, HIDDEN))
    assert attn.scale == 0.05
    assert nmse(attn(x), want(attn, x)) < 1e-11


def test_wqkv_is_the_fused_array():
    attn = layer(bias=True)
    assert isinstance(attn.wqkv, QuantArray) and attn.wqkv.shape == ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)
    assert attn.wqkv.format == "mixed"
    given = state(bias=True)
    assert np.array_equal(np.asarray(attn.wqkv[: HEADS * DIM]), np.asarray(given["q_proj.weight"]))
    assert np.array_equal(attn.wqkv_bias, np.concatenate([given[f"{n}_proj.bias"] for n in "qkv"]))
    assert layer().wqkv_bias is None
    assert attn.nbytes == PackedMatrix(attn.wqkv).nbytes + PackedMatrix(given["o_proj.weight"]).nbytes


def test_a_fused_tensor_is_the_same_layer():
    given = state(("Q4_0",) * 4)
    fused = {
        "qkv_proj.weight": np.concatenate([given[f"{n}_proj.weight"] for n in "qkv"]),
        "o_proj.weight": given["o_proj.weight"],
    }
    attn, x = layer(("Q4_0",) * 4), normal((7, HIDDEN))
    other = GGUFQAttentionWithRope(**parameters())
    other.load_state_dict(fused)
    assert np.array_equal(attn(x), other(x))


@pytest.mark.parametrize("limit", [100.0, 0.2, 0.01])
def test_clip_clamps_the_weights_and_keeps_what_it_can(limit):
    attn, plain = layer(clip_qkv=limit, precision="exact"), layer(precision="exact")
    values = np.asarray(plain.wqkv)
    clipped = np.clip(values, -limit, limit).astype(np.float32)
    assert np.array_equal(np.asarray(attn.wqkv), clipped)
    touched = (np.abs(values) > limit).any(axis=1)
    floats = sum(len(part) for part in attn.wqkv.parts if part.format == "F32")
    assert floats == touched.sum()
    x = normal((5, HIDDEN))
    assert nmse(attn(x), want(attn, x)) < 1e-11


def test_quantization_encoding_is_kept():
    attn = GGUFQAttentionWithRope(**parameters(quantization_encoding="Q4_0"))
    weights = state(("Q4_0",) * 4)
    attn.load_state_dict(weights)
    raw = {name: value.data for name, value in weights.items()}
    other = GGUFQAttentionWithRope(**parameters(quantization_encoding="Q4_0"))
    other.load_state_dict(raw)
    x = normal((3, HIDDEN))
    assert np.array_equal(attn(x), other(x))


def test_float_weights_have_their_own_class():
    attn = AttentionWithRope(**parameters())
    attn.load_state_dict(state((None,) * 4))
    x = normal((11, HIDDEN))
    assert nmse(attn(x), want(attn, x)) < 1e-11
    with pytest.raises(ValueError, match="dtype is uint8; AttentionWithRope takes float32 or float16 weights"):
        AttentionWithRope(**parameters(dtype=np.uint8))
    with pytest.raises(ValueError, match=r"q_proj.weight has dtype float64; expected float32"):
        attn.load_state_dict({n: v.astype(np.float64) for n, v in state((None,) * 4).items()})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": np.float32}, ValueError, "dtype is float32; quantized weights are uint8"),
        (
            {"num_attention_heads": 7},
            ValueError,
            "num_attention_heads is 7; expected a multiple of num_key_value_heads, 2",
        ),
        ({"num_key_value_heads": 3}, ValueError, "kv_params has 2 KV heads; num_key_value_heads is 3"),
        ({"hidden_size": 0}, ValueError, "hidden_size is 0; expected at least 1"),
        ({"hidden_size": 256.0}, TypeError, "hidden_size is 256.0; expected an integer"),
        ({"rope": RotaryEmbedding(64)}, ValueError, "rope turns 64 elements; kv_params has heads of 32"),
        ({"clip_qkv": -1.0}, ValueError, "clip_qkv is -1.0; expected a positive number"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"precision": "fp4"}, ValueError, "precision is 'fp4'; expected one of 'fast', 'int8', 'exact'"),
        ({"quantization_encoding": "Q9_0"}, qattn.FormatError, "Q9_0"),
        ({"devices": ["cuda:99"]}, qattn.DeviceError, "device 'cuda:99' can't be used: "),
        ({"devices": ["tpu"]}, qattn.DeviceError, "device is 'tpu'; expected 'cpu', 'cuda', 'cuda:0'"),
    ],
)
def test_wrong_parameters_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        GGUFQAttentionWithRope(**parameters(**changes))


def test_wrong_weights_are_named():
    attn, good = GGUFQAttentionWithRope(**parameters()), state()
    with pytest.raises(ValueError, match="the layer has no weights yet"):
        attn(normal((1, HIDDEN)))
    with pytest.raises(KeyError, match=r"k_proj.weight is missing"):
        attn.load_state_dict({k: v for k, v in good.items() if k != "k_proj.weight"})
    with pytest.raises(ValueError, match=r"v_proj.weight has shape \(63, 256\); expected \(64, 256\)"):
        attn.load_state_dict(good | {"v_proj.weight": good["v_proj.weight"][:63]})
    with pytest.raises(ValueError, match=r"the layer has no lora\.weight"):
        attn.load_state_dict(good | {"lora.weight": good["q_proj.weight"]})
    with pytest.raises(ValueError, match=r"q_proj\.weight has dtype float32; expected a QuantArray, or uint8 blocks"):
        attn.load_state_dict(good | {"q_proj.weight": normal((192, 256))})
    with pytest.raises(ValueError, match="say which format they have with quantization_encoding"):
        attn.load_state_dict(good | {"q_proj.weight": good["q_proj.weight"].data})
    with pytest.raises(ValueError, match=r"q_proj\.bias was given, but has_bias is False"):
        attn.load_state_dict(good | {"q_proj.bias": normal((192,))})
    encoded = GGUFQAttentionWithRope(**parameters(quantization_encoding="Q4_K"))
    with pytest.raises(ValueError, match=r"v_proj\.weight has format Q6_K; quantization_encoding is Q4_K"):
        encoded.load_state_dict(good)
    biased = GGUFQAttentionWithRope(**parameters(has_bias=True))
    with pytest.raises(KeyError, match=r"q_proj\.bias is missing from the state dictionary, and has_bias is True"):
        biased.load_state_dict(good)


def test_wrong_inputs_are_named_and_change_nothing():
    attn, x = layer(max=16), normal((9, HIDDEN))
    attn(x)
    bad = x.copy()
    bad[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"x\[3, 7\] is nan; attention needs finite numbers"):
        attn(bad)
    with pytest.raises(ValueError, match=r"x has shape \(9, 255\); expected \(tokens, 256\)"):
        attn(x[:, :255])
    with pytest.raises(CacheError, match="sequence 0 would have 18 tokens, but the cache holds at most 16"):
        attn(x)
    with pytest.raises(ValueError, match=r"row_offsets is \[0, 8\]; expected to rise from 0 to 9"):
        attn(x, row_offsets=[0, 8])
    with pytest.raises(ValueError, match=r"row_offsets has shape \(3,\); expected \(2,\)"):
        attn(x, row_offsets=[0, 4, 9])
    with pytest.raises(ValueError, match="kv_cache has 2 sequences; row_offsets must say"):
        attn(x, kv_cache=KVCache(attn.kv_params, sequences=2))
    with pytest.raises(CacheError, match="kv_cache is for"):
        attn(x, kv_cache=KVCache(KVCacheParams(3, DIM)))
    assert len(attn.kv_cache) == 9
    attn(x[:7])


def test_an_empty_batch_is_an_empty_result():
    attn = layer()
    assert attn(normal((0, HIDDEN))).shape == (0, HIDDEN)


def test_repr_tells_what_it_is():
    text = repr(layer())
    assert "heads=6/2" in text and "wqkv=mixed" in text


def test_random_formats_make_a_layer():
    for name in ("IQ2_XS", "TQ2_0", "MXFP4", "Q3_K"):
        given = state((None,) * 4)
        quantized = {key: random_weights(name, *v.shape, seed=3) for key, v in given.items() if v.shape[1] % 256 == 0}
        quantized["o_proj.weight"] = qattn.quantize(given["o_proj.weight"], "Q8_0")
        attn = GGUFQAttentionWithRope(**parameters())
        attn.load_state_dict(quantized)
        x = normal((3, HIDDEN)) * 1e-3
        assert np.isfinite(attn(x)).all()
