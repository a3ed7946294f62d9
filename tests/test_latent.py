"""Multi-head latent attention: with and without absorption, against float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qattn
from qattn import ops
from qattn.architectures import Latent
from qattn.packing import PackedMatrix
from tests import reference
from tests.reference import nmse
from tests.strategies import normal

HIDDEN = 64


def latent_layer(latent, heads, state, **changes):
    absorbed = latent.absorbed
    params = (1, latent.rank + latent.rope_dims, latent.rank) if absorbed else (heads, latent.key_dim, latent.value_dim)
    attn = qattn.AttentionWithRope(
        rope=qattn.RotaryEmbedding(latent.rope_dims),
        num_attention_heads=heads,
        num_key_value_heads=params[0],
        hidden_size=HIDDEN,
        kv_params=qattn.KVCacheParams(*params, dtype="float32"),
        scale=latent.key_dim**-0.5,
        precision="exact",
        latent=latent,
        **changes,
    )
    attn.load_state_dict(state)
    return attn


def weights(latent, heads, seed=0):
    """Weights with ``kv_b_proj``, and the same taken apart."""
    plain = latent.key_dim - latent.rope_dims
    shapes = {
        "q_a_proj": (latent.q_rank, HIDDEN),
        "q_b_proj": (heads * latent.key_dim, latent.q_rank),
        "kv_a_proj": (latent.rank + latent.rope_dims, HIDDEN),
        "kv_b_proj": (heads * (plain + latent.value_dim), latent.rank),
        "o_proj": (HIDDEN, heads * latent.value_dim),
    }
    if not latent.q_rank:
        shapes = {"q_proj": (heads * latent.key_dim, HIDDEN), **dict(list(shapes.items())[2:])}
    whole = {f"{name}.weight": normal(shape, seed + i) / 8 for i, (name, shape) in enumerate(shapes.items())}
    whole["kv_a_norm.weight"] = 1 + normal(latent.rank, seed + 8) / 4
    if latent.q_rank:
        whole["q_a_norm.weight"] = 1 + normal(latent.q_rank, seed + 9) / 4
    apart = dict(whole)
    both = apart.pop("kv_b_proj.weight").reshape(heads, plain + latent.value_dim, latent.rank)
    apart["k_b_proj.weight"] = np.ascontiguousarray(both[:, :plain].transpose(0, 2, 1))
    apart["v_b_proj.weight"] = np.ascontiguousarray(both[:, plain:])
    return whole, apart


def want(x, latent, heads, w, rope):
    """The layer in float64, without absorption."""
    x, w = x.astype(np.float64), {name.split(".")[0]: values.astype(np.float64) for name, values in w.items()}

    def norm(rows, weight):
        return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + latent.epsilon) * weight

    tokens, plain = len(x), latent.key_dim - latent.rope_dims
    q = norm(x @ w["q_a_proj"].T, w["q_a_norm"]) @ w["q_b_proj"].T if latent.q_rank else x @ w["q_proj"].T
    q = q.reshape(tokens, heads, -1)
    vector = x @ w["kv_a_proj"].T
    short, shared = norm(vector[:, : latent.rank], w["kv_a_norm"]), vector[:, None, latent.rank :]
    both = (short @ w["kv_b_proj"].T).reshape(tokens, heads, -1)
    places = np.arange(tokens)
    turned = np.repeat(reference.rotate(shared, places, rope), heads, axis=1)
    k = np.concatenate([both[..., :plain], turned], axis=2)
    q = np.concatenate([q[..., :plain], reference.rotate(q[..., plain:], places, rope)], axis=2)
    out, _ = reference.attention(q, k, both[..., plain:], latent.key_dim**-0.5, reference.causal(tokens, tokens))
    return out.reshape(tokens, -1) @ w["o_proj"].T


@settings(max_examples=25)
@given(
    heads=st.integers(1, 5),
    rank=st.integers(1, 40),
    rope_dims=st.integers(1, 4).map(lambda n: 2 * n),
    plain=st.integers(1, 20),
    value_dim=st.integers(1, 20),
    q_rank=st.sampled_from([0, 24]),
    tokens=st.integers(1, 20),
)
def test_both_forms_agree_with_float64(heads, rank, rope_dims, plain, value_dim, q_rank, tokens):
    forms = [
        Latent(rank, rope_dims, plain + rope_dims, value_dim, 1e-5, q_rank, absorbed) for absorbed in (False, True)
    ]
    x = normal((tokens, HIDDEN), 20)
    states = weights(forms[0], heads)
    for latent, state in zip(forms, states, strict=True):
        attn = latent_layer(latent, heads, state)
        first = max(1, tokens // 2)
        got = np.concatenate([attn(x[:first]), attn(x[first:])])
        right = want(x, latent, heads, states[0], attn.rope)
        assert ((got - right) ** 2).mean() < 1e-10 * max((right**2).mean(), 1e-2)  # few numbers may all be small


@pytest.mark.parametrize(
    ("name", "tokens", "precision"),
    [("Q8_0", 1, "int8"), ("Q8_0", 30, "exact"), ("Q4_K", 5, "int8"), ("F16", 30, "int8"), ("F32", 2, "exact")],
)
def test_matrices_of_heads_are_multiplied_at_once(name, tokens, precision):
    """With the bits of one product for each head; activations have outliers."""
    heads, rows, columns = 3, 32, 256
    weights, x = normal((heads * rows, columns)), normal((tokens, heads, columns), 1)
    x[0, 1, 7] *= 40
    w = weights.astype(name.replace("F", "float")) if name[0] == "F" else qattn.quantize(weights, name)
    matrix = PackedMatrix(w)
    assert matrix.divisible(heads) and not matrix.divisible(4)
    got = ops.affine_each(x, matrix, precision=precision)
    for head in range(heads):
        part = w[head * rows : (head + 1) * rows]
        alone = ops.affine(x[:, head], PackedMatrix(part), None, precision=precision)
        assert np.array_equal(got[:, head], alone)
        assert nmse(alone, x[:, head].astype(np.float64) @ np.asarray(part, np.float64).T) < 1e-4


def test_no_tokens_times_matrices_of_heads():
    matrix = PackedMatrix(qattn.quantize(normal((96, 256)), "Q8_0"))
    assert ops.affine_each(np.empty((0, 3, 256), np.float32), matrix).shape == (0, 3, 32)


def test_the_vector_is_all_that_is_cached():
    latent = Latent(32, 8, 24, 16, 1e-5, 0)
    state = weights(latent, 4)[1]
    attn = latent_layer(latent, 4, state)
    given = sum(values.nbytes for values in state.values() if values.ndim > 1)
    assert given <= attn.nbytes < 1.1 * given  # rows are padded
    attn(normal((10, HIDDEN)))
    keys, values = attn.kv_cache.read()
    assert keys.shape == (10, 1, 40) and values.shape == (10, 1, 32)
    assert np.array_equal(keys[..., 8:], values)


def test_mistakes_are_named():
    latent = Latent(32, 8, 24, 16, 1e-5, 0)
    _, apart = weights(latent, 4)
    with pytest.raises(ValueError, match=r"k_b_proj.weight has 3 matrices; expected 4"):
        latent_layer(latent, 4, apart | {"k_b_proj.weight": apart["k_b_proj.weight"][:3]})
    with pytest.raises(NotImplementedError, match="clip_qkv in multi-head latent attention"):
        latent_layer(latent, 4, apart, clip_qkv=1.0)
    with pytest.raises(NotImplementedError, match="clamp_qkv in multi-head latent attention"):
        latent_layer(latent, 4, apart, clamp_qkv=1.0)
    with pytest.raises(NotImplementedError, match="multi-head latent attention has no fused weights"):
        _ = latent_layer(latent, 4, apart).wqkv
