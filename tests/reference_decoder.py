"""Whole decoders in float64 NumPy, read from a GGUF file with what is known of each architecture written out."""

from __future__ import annotations

import numpy as np

import qattn
from qattn import RotaryEmbedding
from tests import reference


def logits(path, tokens):
    """The logits behind each of the tokens, (tokens, vocabulary) float64."""
    with qattn.open(path) as model:
        w, metadata = {name: np.asarray(model[name], np.float64) for name in model}, dict(model.metadata)
    architecture = metadata["general.architecture"]
    m = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    epsilon = np.float32(m["attention.layer_norm_rms_epsilon"])
    x = w["token_embd.weight"][tokens]
    if architecture == "gemma3":
        x = x * np.sqrt(m["embedding_length"])
    for n in range(m["block_count"]):
        b = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blk.{n}.")}
        rope, visible = positions(architecture, m, w, n, len(tokens))
        y = attention(rms_norm(x, b["attn_norm.weight"], epsilon), b, m, rope, visible, epsilon)
        x = x + rms_norm(y, b.get("post_attention_norm.weight"), epsilon)
        y = feed_forward(rms_norm(x, b["ffn_norm.weight"], epsilon), b, gelu if architecture == "gemma3" else silu)
        x = x + rms_norm(y, b.get("post_ffw_norm.weight"), epsilon)
    x = rms_norm(x, w["output_norm.weight"], epsilon)
    out = x @ w.get("output.weight", w["token_embd.weight"]).T + w.get("output.bias", 0)
    cap = m.get("final_logit_softcapping", 0) if architecture == "gemma3" else 0
    return cap * np.tanh(out / cap) if cap else out


def rms_norm(x, weight, epsilon):
    return x if weight is None else x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def positions(architecture, m, w, layer, tokens):
    """The rotary embedding of a layer, and which keys each token sees."""
    dim = m.get("attention.key_length", m["embedding_length"] // m["attention.head_count"])
    base, window, factors = m["rope.freq_base"], 0, None
    if architecture == "gemma3":
        pattern = m.get("attention.sliding_window_pattern")
        if layer % 6 < 5 if pattern is None else pattern[layer]:
            base, window = m.get("rope.freq_base_swa", 10000.0), m["attention.sliding_window"]
    if architecture == "phi3":
        long = m["context_length"] > m["rope.scaling.original_context_length"]
        factors = w[f"rope_factors_{'long' if long else 'short'}.weight"]
    pairing = "interleaved" if architecture == "llama" else "neox"
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    visible = (distance >= 0) & ((distance < window) if window else True)
    return RotaryEmbedding(dim, base, pairing=pairing, factors=factors), visible


def attention(x, b, m, rope, visible, epsilon):
    heads, kv_heads, dim = m["attention.head_count"], m["attention.head_count_kv"], rope.rope_dims
    if "attn_qkv.weight" in b:
        q, k, v = np.split(x @ b["attn_qkv.weight"].T, [heads * dim, (heads + kv_heads) * dim], axis=1)
    else:
        q, k, v = (x @ b[f"attn_{name}.weight"].T + b.get(f"attn_{name}.bias", 0) for name in "qkv")
    q, k, v = (a.reshape(len(x), -1, dim) for a in (q, k, v))
    # of LongRoPE, a factor of cosines and sines
    length = m.get("rope.scaling.attn_factor", 1)
    q, k = (
        length * reference.rotate(rms_norm(a, b.get(f"attn_{name}_norm.weight"), epsilon), np.arange(len(x)), rope)
        for a, name in ((q, "q"), (k, "k"))
    )
    out, _ = reference.attention(q, k, v, dim**-0.5, visible)
    return out.reshape(len(x), -1) @ b["attn_output.weight"].T


def feed_forward(x, b, activation):
    up = x @ b["ffn_up.weight"].T + b.get("ffn_up.bias", 0)
    if "ffn_gate.weight" in b:
        gate = x @ b["ffn_gate.weight"].T + b.get("ffn_gate.bias", 0)
    else:
        gate, up = np.split(up, 2, axis=1)
    return (activation(gate) * up) @ b["ffn_down.weight"].T + b.get("ffn_down.bias", 0)
