"""The functional attention, against float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import masks
from qattn._meaning import digest, mask_key
from tests import reference
from tests.reference import nmse
from tests.strategies import Heads, heads, normal, visible, windows

EXACT_NMSE = 1e-11


def qkv(shape, tokens, keys, seed=0):
    q = normal((tokens, shape.heads, shape.head_dim), seed)
    k = normal((keys, shape.kv_heads, shape.head_dim), seed + 1)
    return q, k, normal((keys, shape.kv_heads, shape.value_dim), seed + 2)


@settings(max_examples=80)
@given(data=st.data(), shape=heads(), tokens=st.integers(1, 40), before=st.integers(0, 300))
def test_attention_agrees_with_float64(data, shape, tokens, before):
    name = data.draw(st.sampled_from(masks.names()))
    window = data.draw(windows(name))
    q, k, v = qkv(shape, tokens, tokens + before)
    out, lse = qattn.attention(q, k, v, mask=name, window=window, return_lse=True)
    seen = visible(masks.get(name, window), tokens, tokens + before)
    want, want_lse = reference.attention(q, k, v, shape.head_dim**-0.5, seen)
    assert nmse(out, want) < EXACT_NMSE
    assert np.abs(lse - want_lse).max() < 1e-5


@settings(max_examples=60)
@given(data=st.data(), shape=heads(), tokens=st.integers(1, 20), before=st.sampled_from([0, 7, 130, 1200]))
def test_what_happens_to_scores(data, shape, tokens, before):
    """Soft cap, ALiBi, sinks and biases, alone and together, on one path and, for a single token, in parts."""
    q, k, v = qkv(shape, tokens, tokens + before)
    asked = data.draw(st.sets(st.sampled_from(["softcap", "alibi", "sinks", "bias", "bias for each head"])))
    values = {
        "softcap": 1.5,
        "alibi": qattn.alibi_slopes(shape.heads),
        "sinks": normal(shape.heads, 4),
        "bias": normal((tokens, tokens + before), 5),
        "bias for each head": normal((tokens, shape.heads, tokens + before), 6),
    }
    given_bias = values["bias for each head"].transpose(1, 0, 2) if "bias for each head" in asked else values["bias"]
    arguments = {name.split()[0]: values[name] for name in sorted(asked)}
    out, lse = qattn.attention(q, k, v, return_lse=True, **arguments)
    want, want_lse = reference.attention(
        q, k, v, shape.head_dim**-0.5, reference.causal(tokens, tokens + before),
        cap=arguments.get("softcap", 0), slopes=arguments.get("alibi"), sinks=arguments.get("sinks"),
        bias=given_bias if "bias" in arguments else 0.0,
    )  # fmt: skip
    assert nmse(out, want) < EXACT_NMSE
    assert np.abs(lse - want_lse).max() < 1e-4


@settings(max_examples=20)
@given(shape=heads(), tokens=st.integers(1, 9), before=st.integers(0, 200), seed=st.integers(0, 99))
def test_a_mask_may_be_an_array(shape, tokens, before, seed):
    q, k, v = qkv(shape, tokens, tokens + before)
    seen = np.random.default_rng(seed).random((tokens, tokens + before)) < 0.4
    want, _ = reference.attention(q, k, v, shape.head_dim**-0.5, seen)
    assert nmse(qattn.attention(q, k, v, mask=seen), want) < EXACT_NMSE
    added = np.where(seen, 0, -np.inf).astype(np.float32)
    assert np.array_equal(qattn.attention(q, k, v, mask=added), qattn.attention(q, k, v, mask=seen))


def test_a_mask_may_be_a_function():
    q, k, v = qkv(Heads(4, 2, 16, 16), 30, 700)
    strided = masks.from_function(lambda query, key: key <= query and (query - key) % 3 == 0)
    seen = np.array([[strided.sees(query, key) for key in range(700)] for query in range(670, 700)])
    want, _ = reference.attention(q, k, v, 0.25, seen)
    assert nmse(qattn.attention(q, k, v, mask=strided), want) < EXACT_NMSE
    bounded = masks.from_function(lambda query, key: key % 2 == 0, lambda query, keys: (query - 9, query + 1))
    near = np.array([[key % 2 == 0 and query - 9 <= key <= query for key in range(700)] for query in range(670, 700)])
    want, _ = reference.attention(q, k, v, 0.25, near)
    assert nmse(qattn.attention(q, k, v, mask=bounded), want) < EXACT_NMSE


def test_masks_that_differ_in_a_default_or_in_a_module_are_two():
    """Kernels are told apart by what masks do."""
    known, made, sees = [], [], lambda query, key: (query - key) % reference.STEP == 0
    places = np.arange(6)
    for n in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "STEP", n, raising=False)
            known.append(digest(sees))
        made.append(masks.from_function(lambda query, key, n=n: (query - key) % n == 0))
        seen = masks.visible(made[-1], places, places)
        assert np.array_equal(seen, (places[:, None] - places) % n == 0)
    assert known[0] != known[1] and mask_key(type(made[0])) != mask_key(type(made[1]))


@settings(max_examples=25)
@given(shape=heads(), news=st.lists(st.integers(0, 9), min_size=1, max_size=4), data=st.data())
def test_packed_sequences_do_not_see_each_other(shape, news, data):
    before = [data.draw(st.integers(0, 150)) for _ in news]
    rows, columns = (np.cumsum([0, *counts]) for counts in (news, [n + b for n, b in zip(news, before, strict=True)]))
    q, k, v = qkv(shape, rows[-1], columns[-1])
    got, lse = qattn.attention(q, k, v, row_offsets=rows, key_offsets=columns, return_lse=True)
    for s in range(len(news)):
        mine, its = slice(rows[s], rows[s + 1]), slice(columns[s], columns[s + 1])
        want, want_lse = qattn.attention(q[mine], k[its], v[its], return_lse=True)
        assert np.array_equal(got[mine], want) and np.array_equal(lse[mine], want_lse)


def test_more_queries_than_keys_cross_attend():
    q, k, v = qkv(Heads(4, 2, 16, 16), 30, 7)
    want, _ = reference.attention(q, k, v, 0.25, np.ones((30, 7), bool))
    assert nmse(qattn.attention(q, k, v, mask="null"), want) < EXACT_NMSE


@pytest.mark.parametrize("keys", [511, 512, 513, 1024, 1500])
def test_a_single_token_attends_in_parts(keys):
    """Its keys are cut where there are more than 512, and the parts merged."""
    shape = (8, 2, 32, 32)
    q, k, v = normal((1, 8, 32)), normal((keys, 2, 32), 1), normal((keys, 2, 32), 2)
    out, lse = qattn.attention(q, k, v, return_lse=True)
    want, want_lse = reference.attention(q, k, v, shape[2] ** -0.5, np.ones((1, keys), bool))
    assert nmse(out, want) < EXACT_NMSE
    assert np.abs(lse - want_lse).max() < 1e-5


@pytest.mark.parametrize("head_dim", [40, 64, 65, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_head_sizes_and_groups(head_dim, group):
    q, k, v = normal((5, 2 * group, head_dim)), normal((150, 2, head_dim), 1), normal((150, 2, head_dim), 2)
    want, _ = reference.attention(q, k, v, head_dim**-0.5, reference.causal(5, 150))
    assert nmse(qattn.attention(q, k, v), want) < EXACT_NMSE


def test_half_precision_keys_are_used_as_they_are():
    q, k, v = normal((5, 4, 64)), normal((50, 2, 64), 1).astype(np.float16), normal((50, 2, 64), 2).astype(np.float16)
    want, _ = reference.attention(q, k, v, 1 / 8, reference.causal(5, 50))
    assert nmse(qattn.attention(q, k, v), want) < EXACT_NMSE


def test_large_scores_do_not_overflow():
    q, k, v = 300 * normal((4, 2, 16)), 300 * normal((40, 2, 16), 1), normal((40, 2, 16), 2)
    want, _ = reference.attention(q, k, v, 0.25, reference.causal(4, 40))
    assert nmse(qattn.attention(q, k, v), want) < 1e-4  # a score of 1e5 has an ulp of 8e-3
    assert np.isfinite(qattn.attention(q, k, v)).all()


def test_out_and_scale():
    q, k, v = normal((4, 2, 16)), normal((4, 2, 16), 1), normal((4, 2, 16), 2)
    out = np.empty((4, 2, 16), np.float32)
    assert qattn.attention(q, k, v, scale=0.5, out=out) is out
    want, _ = reference.attention(q, k, v, 0.5, reference.causal(4, 4))
    assert nmse(out, want) < EXACT_NMSE


def test_every_variant_of_the_masks_is_there():
    q = normal((4, 2, 16))
    for variant in qattn.MHAMaskVariant:
        window = 3 if masks.has_window(variant.value) else None
        got = qattn.attention(q, q, q, mask=variant, window=window)
        assert np.array_equal(got, qattn.attention(q, q, q, mask=masks.get(variant.value, window)))


def test_masks_that_do_not_fit_say_so():
    q = normal((4, 2, 16))
    with pytest.raises(ValueError, match="window is None; the mask 'chunked_causal' needs one"):
        qattn.attention(q, q, q, mask=qattn.MHAMaskVariant.CHUNKED_CAUSAL_MASK)
    with pytest.raises(ValueError, match="window is 3; the mask 'causal' has no window"):
        qattn.attention(q, q, q, window=3)
    with pytest.raises(ValueError, match="there is no mask named 'casual'; there are: causal, chunked_causal"):
        qattn.attention(q, q, q, mask="casual")
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\); expected \(4, 4\) or \(4, 2, 4\)"):
        qattn.attention(q, q, q, mask=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"sinks has shape \(3,\); expected \(2,\)"):
        qattn.attention(q, q, q, sinks=np.ones(3))


def test_errors_name_the_argument():
    q, k = normal((4, 4, 16)), normal((4, 2, 16))
    with pytest.raises(ValueError, match=r"k has shape \(4, 2, 15\); expected \(keys, kv_heads, 16\)"):
        qattn.attention(q, k[..., :15], k)
    with pytest.raises(ValueError, match=r"v has shape \(3, 2, 16\)"):
        qattn.attention(q, k, k[:3])
    with pytest.raises(ValueError, match="q has 4 heads, k has 3; expected a multiple"):
        qattn.attention(q, normal((4, 3, 16)), normal((4, 3, 16)))
    with pytest.raises(ValueError, match="q has 4 tokens, k has 2"):
        qattn.attention(q, k[:2], k[:2])
