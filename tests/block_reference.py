"""An attention block in plain float64 NumPy, driven by its description alone: what descriptions are checked with."""

from __future__ import annotations

import numpy as np


def block(config, tensors, x, *, positions=None, other=None):
    """The block's heads and output for a whole sequence from an empty cache.

    config : AttentionConfig
    tensors : mapping of a file's tensor names to arrays
    x : (tokens, hidden_size)
    positions : (tokens,) or (sections, tokens), 0, 1, … by default
    other : for a layer that reads another's keys and values (its config, its x), for cross attention the encoder's
        output

    Returns the heads' output after gate and norm, (tokens, heads · value_dim), and its product with the weight of the
    output projection, before the description's factor of that, and the file's scale and bias.
    """
    t = _Tensors(config, tensors, np.arange(len(x)) if positions is None else np.asarray(positions, np.int64))
    x = np.asarray(x, np.float64)
    heads = _latent_heads(config, t, x) if config.latent else _heads(config, t, x, other)
    heads = heads.reshape(len(x), -1)
    if config.gate:
        heads = heads * _gate(config, t, x, heads.shape[1])
    if config.output_norm:
        heads = _norm(heads, config.output_norm, t("attn_sub_norm.weight"), t("attn_sub_norm.bias"))
    return config.value_scale * heads, config.value_scale * heads @ t(f"{config.output}.weight").T


class _Tensors:
    """A layer's tensors in float64, None for those that are not there or not applied; and where its tokens are."""

    def __init__(self, config, tensors, positions):
        self.config, self.tensors, self.positions = config, tensors, positions

    def __call__(self, name):
        full = self.config.prefix + name
        if full not in self.tensors or name in self.config.unused:
            return None
        return np.asarray(self.tensors[full], np.float64)

    def linear(self, name, x):
        """x @ weight.T · scale + bias."""
        y = x @ self(f"{name}.weight").reshape(-1, x.shape[1]).T  # files leave out that there is one row
        scale, bias = self(f"{name}.scale"), self(f"{name}.bias")
        return (y if scale is None else y * scale.item()) + (0 if bias is None else bias)


def _query(c, t, x):
    """Projected queries, (tokens, heads, elements); a gate may follow in each head."""
    q = _fused(t, x)[:, : _query_width(c)] if t("attn_qkv.weight") is not None else t.linear("attn_q", x)
    return q.reshape(len(x), c.num_attention_heads, -1)


def _query_width(c):
    return c.num_attention_heads * c.head_dim * (2 if c.gate and c.gate.interleaved else 1)


def _fused(t, x):
    biases = [t(f"attn_{name}.bias") for name in "qkv"]
    return t.linear("attn_qkv", x) + (0 if any(bias is None for bias in biases) else np.concatenate(biases))


def _clamped(c, part):
    return part if c.clamp_qkv is None else np.clip(part, -c.clamp_qkv, c.clamp_qkv)


def _keys_and_values(c, t, x):
    """Keys, normalized and turned, and values: (tokens, kv_heads, elements) each."""
    x = np.asarray(x, np.float64)
    keys, values = c.num_key_value_heads * c.head_dim, c.num_key_value_heads * c.value_dim
    if t("attn_qkv.weight") is not None:
        k, v = np.split(_fused(t, x)[:, _query_width(c) :][:, : keys + values], [keys], axis=1)
    else:
        k = t.linear("attn_k", x)
        v = k if c.value_from_key else t.linear("attn_v", x)
    k, v = (_clamped(c, part).reshape(len(x), c.num_key_value_heads, -1) for part in (k, v))
    return _prepared(c, t, k, "k"), v if c.v_norm is None else _norm(v, c.v_norm)


def _heads(c, t, x, other):
    """(tokens, heads, value_dim)."""
    q = _clamped(c, _query(c, t, x)[..., : c.head_dim])
    if c.shares_cache_of is not None:
        owner, inputs = other
        k, v = _keys_and_values(owner, _Tensors(owner, t.tensors, t.positions), inputs)
    else:
        t_of_k = _Tensors(c, t.tensors, np.arange(len(other))) if c.cross else t
        k, v = _keys_and_values(c, t_of_k, other if c.cross else x)
    return _attend(c, t, _prepared(c, t, q, "q"), k, v)


def _prepared(c, t, heads, name):
    """Norm and rotation of queries or keys, in the layer's order; queries grow with their temperature."""
    norm = getattr(c, f"{name}_norm")
    weights = t(f"attn_{name}_norm.weight"), t(f"attn_{name}_norm.bias")
    if norm and not c.norm_after_rope:
        heads = _norm(heads, norm, *weights)
    if c.rope:
        heads = rotate(heads, c.rope, t.positions)
    if norm and c.norm_after_rope:
        heads = _norm(heads, norm, *weights)
    if name == "q" and c.temperature:
        heads = heads * _temperature(c.temperature, t.positions)[:, None, None]
    return heads


def _temperature(temperature, positions):
    length, scale, offset = temperature
    first = positions if positions.ndim == 1 else positions[0]
    return 1 + scale * np.log(1 + np.floor((first + offset) / length))


def _norm(x, norm, weight=None, bias=None):
    """RMS norm or LayerNorm of (tokens, …): over all of a token if the weight spans that, else over the last axis."""
    weight = weight if norm.weighted else None
    flat = x
    if weight is not None and weight.ndim == 1 and weight.size != x.shape[-1]:
        flat = x.reshape(len(x), -1)
    mean = flat.mean(-1, keepdims=True) if norm.kind == "layer" else 0.0
    y = (flat - mean) / np.sqrt(((flat - mean) ** 2).mean(-1, keepdims=True) + norm.epsilon)
    y = y if weight is None else y * weight
    return (y if weight is None or bias is None else y + bias).reshape(x.shape)


def rotate(x, rope, positions):
    """x (tokens, heads, elements): the first `rope_dims` elements of each head turned by the token's position."""
    half = rope.rope_dims // 2
    a = np.arange(half) if rope.neox else 2 * np.arange(half)
    b = a + (half if rope.neox else 1)
    rotation, rows = rope.rotation_at(positions)
    cos, sin = (np.asarray(table[rows][:, None], np.float64) for table in (rotation.cos, rotation.sin))
    y = x.copy()
    y[..., a], y[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return y


def _attend(c, t, q, k, v):
    """Softmax attention: (tokens, heads, d), (keys, kv_heads, d), (keys, kv_heads, e) → (tokens, heads, e)."""
    heads, tokens, keys = q.shape[1], len(q), len(k)
    group = heads // k.shape[1]
    scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, axis=1)) * c.scale
    if c.softcap:
        scores = c.softcap * np.tanh(scores / c.softcap)
    distance = np.arange(keys) - np.arange(tokens)[:, None]
    if c.alibi:
        scores = scores - _slopes(heads, c.alibi)[:, None, None] * np.abs(distance)
    if c.distances:
        table = np.asarray(t.tensors[c.distance_table], np.float64)
        scores = scores + table[_bucket(distance, len(table), c.distances == "two-sided")].transpose(2, 0, 1)
    scores = np.where(_seen(c, t.positions, tokens, keys), scores, -np.inf)
    if c.sinks:
        sinks = np.broadcast_to(t("attn_sinks.weight")[:, None, None], (heads, tokens, 1))
        scores = np.concatenate([scores, sinks], axis=2)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(peak > -np.inf, peak, 0))
    weights = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300))[..., :keys]  # who sees nothing, gets 0
    return np.einsum("hqk,khe->qhe", weights, np.repeat(v, group, axis=1))


def _seen(c, positions, tokens, keys):
    """(tokens, keys) bool: what the mask shows, which goes by positions where these don't begin at 0."""
    first = positions.ravel()[0]
    bounds = np.array([c.mask.bounds(first + query, first + keys) for query in range(tokens)]) - first
    return (np.arange(keys) >= bounds[:, :1]) & (np.arange(keys) < bounds[:, 1:])


def _slopes(heads, largest):
    """ALiBi: powers of 2^(-largest / n), n the largest power of two among the heads, and those between for the rest."""
    power = 2 ** int(np.log2(heads))
    first = 2.0 ** (-largest / power * np.arange(1, power + 1))
    rest = 2.0 ** (-largest / 2 / power * (2 * np.arange(heads - power) + 1))
    return np.concatenate([first, rest])


def _bucket(distance, buckets, both_sides):
    """T5: a bucket for each near distance, then for ranges that grow by a factor, up to 128."""
    side = 0
    if both_sides:
        buckets //= 2
        side, distance = buckets * (distance > 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    far = exact + np.floor(np.log(np.maximum(distance, 1) / exact) / np.log(128 / exact) * (buckets - exact))
    return side + np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(int)


def _gate(c, t, x, columns):
    """(tokens, columns)."""
    inside = c.gate.interleaved
    logits = _query(c, t, x)[..., c.head_dim :].reshape(len(x), -1) if inside else t.linear("attn_gate", x)
    logits = np.repeat(logits, columns // logits.shape[1], axis=1)
    sigmoid = 1 / (1 + np.exp(-logits))
    functions = {"sigmoid": sigmoid, "softplus": np.logaddexp(0, logits)}
    return functions[c.gate.function]


def _latent_heads(c, t, x):
    """Multi-head latent attention, with each head's own keys and values: (tokens, heads, latent.value_dim)."""
    m, heads = c.latent, c.num_attention_heads
    plain = m.key_dim - m.rope_dims
    if m.q_rank:
        q = _rms(t.linear("attn_q_a", x), m.epsilon, t("attn_q_a_norm.weight"))
        q = t.linear("attn_q_b", q)
    else:
        q = t.linear("attn_q", x)
    q = q.reshape(len(x), heads, m.key_dim)
    vector = t.linear("attn_kv_a_mqa", x)
    short, shared = _rms(vector[:, : m.rank], m.epsilon, t("attn_kv_a_norm.weight")), vector[:, None, m.rank :]
    if m.shared_norm:
        shared = _rms(shared, m.epsilon, t("attn_k_norm.weight"))
    if m.absorbed:
        k_b = t("attn_k_b.weight").reshape(heads, m.rank, plain)
        v_b = t("attn_v_b.weight").reshape(heads, m.value_dim, m.rank)
        k, v = np.einsum("tr,hrp->thp", short, k_b), np.einsum("tr,hvr->thv", short, v_b)
    else:
        both = t.linear("attn_kv_b", short).reshape(len(x), heads, plain + m.value_dim)
        k, v = both[..., :plain], both[..., plain:]
    turning = q[..., plain:]
    if c.rope:
        turning, shared = (rotate(part, c.rope, t.positions) for part in (turning, shared))
    q = np.concatenate([q[..., :plain], turning], axis=2)
    k = np.concatenate([k, np.repeat(shared, heads, axis=1)], axis=2)
    if c.temperature:
        q = q * _temperature(c.temperature, t.positions)[:, None, None]
    return _attend(c, t, q, k, v)


def _rms(x, epsilon, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def file_tensors(model):
    """The tensors of an open file by name, as float32 arrays."""
    return {name: np.asarray(model.mapped(name)) for name in model}
