"""Multi-head latent attention: DeepSeek 2 and 3 and their kin."""

from __future__ import annotations

from typing import Any

from qattn.architectures import _rope
from qattn.architectures._config import AttentionConfig, Latent, Temperature
from qattn.architectures._layer import Layer
from qattn.architectures._registry import refuse, register
from qattn.rope import yarn_magnitude

_INDEXER = frozenset({"indexer.k_norm", "indexer.proj", "indexer.attn_k", "indexer.attn_q_b"})
_POOLS = frozenset({"indexer_compressor_gate", "indexer_compressor_ape"})


def _latent(
    a: Layer, *, kind: str = "", shared_norm: bool = False, dims: int | None = None, **given: Any
) -> AttentionConfig:
    """A layer with a latent vector.  `kind` is "_swa" where layers with a window have keys of their own."""
    rank = a.m.integer(f"attention.kv_lora_rank{kind}")
    split = a.has("attn_k_b.weight")
    key, value = a.head_dims()
    if split or a.m.get("attention.key_length_mla"):
        key = a.m.integer(f"attention.key_length_mla{kind}", None if split else key)
        value = a.m.integer(f"attention.value_length_mla{kind}", None if split else value)
    rope_dims = a.rope_dims() if dims is None else dims
    fields: dict[str, Any] = {
        "num_key_value_heads": 1 if split else a.heads,
        "head_dim": rank + rope_dims if split else key,
        "value_dim": rank if split else value,
        "scale": key**-0.5,
        "latent": Latent(
            rank=rank,
            rope_dims=rope_dims,
            key_dim=key,
            value_dim=value,
            epsilon=a.norm().epsilon,
            q_rank=a.m.integer("attention.q_lora_rank", 0) if a.has("attn_q_a.weight") else 0,
            absorbed=split,
            shared_norm=shared_norm,
        ),
        "unused": frozenset({"attn_q.scale", "attn_q.bias"}),
    }
    return a.attention(**(fields | given))


def _yarn(a: Layer, log_multiplier: float = 0.0) -> tuple[_rope.Scaling, float]:
    """DeepSeek's scaling of positions, and the factor of the scores that belongs to it."""
    same = a.m.architecture == "deepseek2"
    scaling = _rope.model_scaling(a.m, log_multiplier=log_multiplier, same_multiplier=same)
    magnitude = scaling.attention * yarn_magnitude(scaling.factor) * yarn_magnitude(scaling.factor, log_multiplier)
    return scaling, magnitude**2


def _log_multiplier(a: Layer) -> float:
    """Files hold a tenth of it."""
    return 10 * a.m.number("rope.scaling.yarn_log_multiplier", 0.0)


@register("deepseek2", "mistral4")
def deepseek2(a: Layer) -> AttentionConfig:
    """DeepSeek 2 and 3, Kimi K2, GLM 4.7 Flash, Mistral 4."""
    scaling, factor = _yarn(a, _log_multiplier(a))
    growth = a.m.number("attention.temperature_scale", 0.0)
    config = _latent(
        a,
        rope=a.rope("interleaved", scaling=scaling),
        temperature=Temperature(a.m.integer("attention.temperature_length"), growth) if growth else None,
    )
    return config.scaled(factor)


@register("deepseek2-ocr")
def deepseek2_ocr(a: Layer) -> AttentionConfig:
    """DeepSeek-OCR's decoder: heads as in Llama, NeoX pairs, unscaled."""
    config = a.attention(num_key_value_heads=a.heads, rope=a.unscaled_rope("neox", dims=a.head_dims()[0]))
    return config.scaled(_yarn(a)[1])


@register("minicpm3")
def minicpm3(a: Layer) -> AttentionConfig:
    """MiniCPM 3: NeoX pairs, LongRoPE."""
    return _latent(a, rope=a.rope("neox", factors="long"))


@register("plm")
def plm(a: Layer) -> AttentionConfig:
    """PLM: queries are not compressed."""
    return _latent(a, rope=a.rope("interleaved"))


@register("deepseek32", "glm-dsa")
def deepseek32(a: Layer) -> AttentionConfig:
    """DeepSeek 3.2, GLM 5: an indexer selects keys, but not in the layers that predict further tokens."""
    if a.index < a.layers:
        a.sees_all_it_selects(a.m.integer("attention.indexer.top_k"))
    scaling, factor = _yarn(a, _log_multiplier(a) if a.m.architecture == "deepseek32" else 0.0)
    return _latent(a, rope=a.rope("interleaved", scaling=scaling), tensors=_INDEXER).scaled(factor)


@register("dots3note")
def dots3note(a: Layer) -> AttentionConfig:
    """dots.3 note: layers with a window have keys of their own; in the others an indexer selects keys."""
    windowed = a.windowed() or a.index >= a.layers
    if not windowed:
        a.sees_all_it_selects(a.m.integer("attention.indexer.top_k"))
    return _latent(
        a,
        kind="_swa" if windowed else "",
        shared_norm=True,
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("interleaved", base=a.m.number("rope.freq_base_swa") if windowed else None),
        tensors=_INDEXER,
        **a.gate("sigmoid"),
    )


@register("hy_v4")
def hy_v4(a: Layer) -> AttentionConfig:
    """Hunyuan 4: sinks, and a gate for each element; in some an indexer selects keys."""
    selected = a.m.integer("attention.indexer.top_k", 0)
    if selected:
        a.sees_all_it_selects(selected)
    gate = a.gate("sigmoid") | {"unused": frozenset({"attn_gate.scale", "attn_output.scale"})}
    return _latent(a, rope=a.rope("interleaved"), sinks=True, tensors=_INDEXER, **gate)


@register("bailingmoe3")
def bailingmoe3(a: Layer) -> AttentionConfig:
    """Ling 3: layers without KV heads are recurrent; a gate for each head."""
    a.not_recurrent(a.index < a.layers and a.without_kv_heads())
    rope = a.rope("neox", sections="blocks") if _rope.use_sections(a.m) else a.rope("interleaved")
    unused = frozenset({"attn_gate.scale", "attn_output.scale", "attn_q.scale"})
    return _latent(a, rope=rope, **(a.gate("sigmoid") | {"unused": unused}))


@register("kimi-linear")
def kimi_linear(a: Layer) -> AttentionConfig:
    """Kimi Linear: layers without KV heads are recurrent; nothing turns."""
    a.not_recurrent(a.without_kv_heads())
    _split_only(a)
    return _latent(a, rope=None)


@register("kimi-k3")
def kimi_k3(a: Layer) -> AttentionConfig:
    """Kimi K3: the same, with a gate for each element."""
    a.not_recurrent(a.without_kv_heads())
    _split_only(a)
    gate = a.gate("sigmoid") if a.has("attn_gate.weight") else {}
    unused = frozenset({"attn_gate.scale", "attn_output.scale", "attn_q.scale"})
    return _latent(a, rope=None, **(gate | {"unused": unused}))


def _split_only(a: Layer) -> None:
    """Refuse keys whose parts lie in another order than those of queries."""
    if a.has("attn_kv_b.weight"):
        raise a.refuse("has attn_kv_b.weight, its parts in another order than those of queries")


@register("glm5-next")
def glm5_next(a: Layer) -> AttentionConfig:
    """GLM 5's successor: layers without KV heads are recurrent; in the others an indexer selects pools of keys."""
    a.not_recurrent(a.without_kv_heads())
    if not a.causal or not a.m.get("attention.indexer.kpool_select_tail", True):
        raise a.refuse("does not select all keys by its indexer")
    a.sees_all_it_selects(a.m.integer("attention.indexer.top_k"))
    unused = frozenset({"attn_output.scale"})
    return _latent(
        a, rope=None, dims=a.m.integer("rope.dimension_count", least=0), tensors=_INDEXER | _POOLS, unused=unused
    )


refuse("it compresses keys and values of many tokens", "deepseek4")
