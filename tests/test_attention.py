"""The functional attention, against float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import masks
from tests import reference
from tests.reference import nmse
from tests.strategies import heads, normal

EXACT_NMSE = 1e-11


def qkv(shape, tokens, keys, seed=0):
    q = normal((tokens, shape.heads, shape.head_dim), seed)
    k = normal((keys, shape.kv_heads, shape.head_dim), seed + 1)
    return q, k, normal((keys, shape.kv_heads, shape.value_dim), seed + 2)


def visible(mask, tokens, keys):
    bounds = [mask.bounds(keys - tokens + i, keys) for i in range(tokens)]
    return np.array([[first <= key < end for key in range(keys)] for first, end in bounds])


@settings(max_examples=60)
@given(shape=heads(), tokens=st.integers(1, 40), before=st.integers(0, 300), name=st.sampled_from(masks.names()))
def test_attention_agrees_with_float64(shape, tokens, before, name):
    q, k, v = qkv(shape, tokens, tokens + before)
    out, lse = qattn.attention(q, k, v, mask=name, return_lse=True)
    seen = visible(masks.get(name), tokens, tokens + before)
    want, want_lse = reference.attention(q, k, v, shape.head_dim**-0.5, seen)
    assert nmse(out, want) < EXACT_NMSE
    assert np.abs(lse - want_lse).max() < 1e-5


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


def test_masks_without_a_kernel_say_so():
    q = normal((4, 2, 16))
    with pytest.raises(NotImplementedError, match="CHUNKED_CAUSAL_MASK is not implemented; there are: causal, null"):
        qattn.attention(q, q, q, mask=qattn.MHAMaskVariant.CHUNKED_CAUSAL_MASK)
    with pytest.raises(ValueError, match="there is no mask named 'casual'; there are: causal, null"):
        qattn.attention(q, q, q, mask="casual")


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
