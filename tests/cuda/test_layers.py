"""Whole layers on a GPU, and the functional API there: what the kernels' own tests can't see."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qattn
from qattn import masks
from qattn.architectures import Gate, Norm, Temperature
from qattn.introspect import ablated
from qattn.models import Decoder
from tests import tiny_model
from tests.block_reference import block
from tests.reference import nmse
from tests.strategies import normal
from tests.test_features import HIDDEN, Tensors, layers, loaded, plain
from tests.test_latent import Latent, latent_layer, weights


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(described=layers(), tokens=st.integers(1, 12))
def test_any_features_agree_with_float64(cupy, described, tokens):
    config, tensors = described
    attn, x = loaded(config, tensors, devices=["cuda:0"]), normal((tokens, HIDDEN), 50)
    assert nmse(attn(cupy.asarray(x)).get(), config.output_scale * block(config, tensors, x)[1]) < 1e-9


def test_gates_and_values_that_lie_elsewhere(cupy):
    x = normal((9, HIDDEN), 1)
    config, tensors = plain(gate=Gate("sigmoid", interleaved=True))
    tensors["attn_q.weight"] = normal((64, HIDDEN)) / 4
    attn = loaded(config, tensors, devices=["cuda:0"])
    assert nmse(attn(cupy.asarray(x)).get(), block(config, tensors, x)[1]) < 1e-10
    config, tensors = plain(value_from_key=True, v_norm=Norm("rms", 1e-5, weighted=False))
    del tensors["attn_v.weight"]
    attn = loaded(config, tensors, devices=["cuda:0"])
    assert nmse(attn(cupy.asarray(x)).get(), block(config, tensors, x)[1]) < 1e-10


def test_the_cache_of_another_layer_and_of_another_sequence(cupy):
    (owner, its), (reader, mine) = plain(), plain(shares_cache_of=0, prefix="blk.1.")
    both = Tensors(its | {f"blk.1.{name}": values for name, values in mine.items()})
    first, second = (loaded(*each, devices=["cuda:0"]) for each in ((owner, its), (reader, both)))
    x, y = normal((9, HIDDEN), 1), normal((9, HIDDEN), 2)
    first(cupy.asarray(x))
    got = second(cupy.asarray(y), kv_cache=first.kv_cache).get()
    assert nmse(got, block(reader, both, y, other=(owner, x))[1]) < 1e-10
    norm = Norm("rms", 1e-5, weighted=False)
    config, tensors = plain(cross=True, mask=masks.Null(), k_norm=norm, v_norm=norm, temperature=Temperature(4, 0.5))
    attn = loaded(config, tensors, devices=["cuda:0"])
    attn.remember(cupy.asarray(y))
    assert nmse(attn(cupy.asarray(x), positions=range(9)).get(), block(config, tensors, x, other=y)[1]) < 1e-10


def test_positions_in_sections(cupy):
    rope = qattn.RotaryEmbedding(8, pairing="neox", sections=(2, 1, 1))
    config, tensors = plain(rope=rope, q_norm=Norm("rms", 1e-5, weighted=False))
    attn, x = loaded(config, tensors, devices=["cuda:0"]), normal((7, HIDDEN), 1)
    positions = np.array([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])
    want = block(config, tensors, x, positions=positions)[1]
    assert nmse(attn(cupy.asarray(x), positions=positions).get(), want) < 1e-10


@pytest.mark.parametrize("absorbed", [True, False])
def test_latent_attention(cupy, absorbed):
    latent = Latent(32, 8, 24, 16, 1e-5, 24, absorbed)
    state, x = weights(latent, 4)[absorbed], normal((6, 64))
    here, there = latent_layer(latent, 4, state), latent_layer(latent, 4, state, devices=["cuda:0"])
    assert nmse(there(cupy.asarray(x)).get(), here(x)) < 1e-10


def test_a_tree(cupy):
    for feature in ({}, {"alibi": 8.0, "mask": masks.SlidingWindow(4)}):
        config, tensors = plain(**feature)
        here, there = loaded(config, tensors), loaded(config, tensors, devices=["cuda:0"])
        mask, x, drafts = np.tril(np.ones((5, 8), bool), 3), normal((3, HIDDEN)), normal((5, HIDDEN), 2)
        mask[4, 6] = False
        here(x)
        there(cupy.asarray(x))
        got = there(cupy.asarray(drafts), mask=cupy.asarray(mask), positions=[3, 3, 4, 4, 5])
        assert nmse(got.get(), here(drafts, mask=mask, positions=[3, 3, 4, 4, 5])) < 1e-10


def test_a_window_and_a_prefix(cupy):
    config, tensors = plain(mask=masks.SlidingWindow(100))
    here, there = loaded(config, tensors), loaded(config, tensors, devices=["cuda:0"])
    paged = qattn.PagedKVCache(there.kv_params, 2, pages=8, window=100, device="cuda:0")
    flat = qattn.KVCache(here.kv_params, 2)
    for i in range(4):
        x = normal((90, HIDDEN), i)
        got = there(cupy.asarray(x), kv_cache=paged, row_offsets=[0, 80, 90]).get()
        assert nmse(got, here(x, kv_cache=flat, row_offsets=[0, 80, 90])) < 1e-10
    paged.release(0, np.arange(320))
    assert paged.begin(1, np.arange(320)) == 256


def test_functions(cupy):
    q, k, v = normal((30, 4, 16)), normal((40, 2, 16), 1), normal((40, 2, 16), 2)
    given = {"alibi": qattn.alibi_slopes(4), "sinks": normal(4, 3), "distances": normal((4, 9), 4)}
    for options in (
        {**given, "bias": normal((30, 40), 5), "softcap": 3.0},
        {"row_offsets": [0, 10, 30], "key_offsets": [0, 15, 40]},
        {"mask": np.tri(30, 40, 10, dtype=bool)},
        *({"mask": name, "window": 7 if masks.has_window(name) else None} for name in masks.names()),
    ):
        there = {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        got = qattn.attention(*map(cupy.asarray, (q, k, v)), **there)
        assert nmse(got.get(), qattn.attention(q, k, v, **options)) < 1e-10
    caches = [qattn.KVCache(qattn.KVCacheParams(2, 16, dtype="q8_0"), device=device) for device in ("cpu", "cuda:0")]
    for cache in caches:
        cache.append(k, v)
    assert nmse(qattn.attention(cupy.asarray(q), caches[1]).get(), qattn.attention(q, caches[0])) < 1e-10


def test_looking_inside(cupy, tmp_path):
    path = tiny_model.write(tmp_path / "tiny.gguf")
    here, there = (Decoder.from_gguf(path, precision="exact", device=device) for device in ("cpu", "cuda:0"))
    found = [each.capture([1, 2, 3, 4], {"weights", "statistics"}, layers=[1])[1] for each in (here, there)]
    assert nmse(cupy.asnumpy(found[1]["weights"]), found[0]["weights"]) < 1e-9
    assert nmse(cupy.asnumpy(found[1]["statistics"].entropy), found[0]["statistics"].entropy) < 1e-9
    outs = []
    for each in (here, there):
        each.reset()
        with ablated(each, 0, [2]):
            outs.append(cupy.asnumpy(each.forward([1, 2, 3])))
    assert nmse(outs[1], outs[0]) < 1e-9
