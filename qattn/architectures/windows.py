"""Models in which some layers have a sliding window, of many makers."""

from __future__ import annotations

from qattn.architectures import _rope
from qattn.architectures._config import AttentionConfig
from qattn.architectures._layer import Layer
from qattn.architectures._registry import register
from qattn.architectures.gemma import window_rope


@register("gpt-oss")
def gpt_oss(a: Layer) -> AttentionConfig:
    """OpenAI's gpt-oss: sinks; every other layer has a window."""
    windowed = a.windowed(2)
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("neox", base=a.freq_base_swa() if windowed else None),
        sinks=True,
    )


@register("exaone", "seed_oss", "pangu-embedded")
def exaone(a: Layer) -> AttentionConfig:
    """EXAONE 3 with its factors of the frequencies; Seed-OSS and openPangu, which have none."""
    return a.attention(rope=a.rope("neox", factors="freqs" if a.m.architecture == "exaone" else ""))


@register("exaone4")
def exaone4(a: Layer) -> AttentionConfig:
    """EXAONE 4: in the model of 64 layers three of four have a window, and the others do not rotate."""
    windowed = a.layers == 64 and a.windowed(4)
    rotates = windowed or a.layers != 64
    return a.attention(
        mask=a.mask(a.window(4096) if windowed else 0),
        rope=a.rope("neox", factors="freqs") if rotates else None,
        **a.qk_norms(),
    )


@register("exaone-moe")
def exaone_moe(a: Layer) -> AttentionConfig:
    """EXAONE with experts: three of four layers have a window, the others do not rotate."""
    windowed = a.windowed(4)
    return a.attention(
        mask=a.mask(a.window(128) if windowed else 0),
        rope=a.rope("neox", factors="freqs") if windowed else None,
        **a.qk_norms(),
    )


@register("smallthinker")
def smallthinker(a: Layer) -> AttentionConfig:
    """SmallThinker: each fourth layer, from the first on, sees everything and does not rotate."""
    any_window = bool(a.window(0))
    windowed = any_window and a.windowed(4, dense_first=True)
    rotates = not any_window or a.index % 4 != 0
    base = a.freq_base_swa() if windowed else None
    return a.attention(mask=a.mask(4096 if windowed else 0), rope=a.rope("neox", base=base) if rotates else None)


@register("afmoe")
def afmoe(a: Layer) -> AttentionConfig:
    """Arcee's Trinity: each fourth layer sees everything and does not rotate; a gate for each element."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(4)
    base = a.freq_base_swa() if windowed else None
    return a.attention(
        mask=a.mask(window if windowed else 0),
        rope=a.rope("neox", base=base) if (a.index + 1) % 4 else None,
        **a.qk_norms(),
        **a.gate("sigmoid"),
    )


@register("muse-glimmer")
def muse_glimmer(a: Layer) -> AttentionConfig:
    """Muse Glimmer: layers that see everything do not rotate; a gate for each element."""
    windowed = a.windowed(4)
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("interleaved", base=a.freq_base_swa(), factor=1.0) if windowed else None,
        **a.qk_norms(),
        **a.gate("sigmoid"),
    )


@register("laguna")
def laguna(a: Layer) -> AttentionConfig:
    """Laguna: a gate of softplus, for each head or each element; windows know no scaling of positions."""
    window = a.window(0)
    windowed = bool(window) and a.windowed(4, dense_first=True)
    rope = (
        a.unscaled_rope("neox", base=a.freq_base_swa(), dims=a.rope_dims(window=True)) if windowed else a.rope("neox")
    )
    return a.attention(mask=a.mask(window if windowed else 0), rope=rope, **a.qk_norms(), **a.gate("softplus"))


@register("spark2_5")
def spark(a: Layer) -> AttentionConfig:
    """Spark 2.5: a gate for each head."""
    windowed = a.windowed()
    base = a.freq_base_swa() if windowed else None
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("neox", base=base, dims=a.rope_dims(windowed)),
        **a.gate("sigmoid"),
    )


@register("maple")
def maple(a: Layer) -> AttentionConfig:
    """Maple: layers that see everything do not rotate."""
    windowed = a.windowed()
    dims = a.rope_dims(windowed)
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        rope=a.rope("neox", base=a.freq_base_swa(), dims=dims) if windowed else None,
        **a.qk_norms(),
    )


@register("step35")
def step35(a: Layer) -> AttentionConfig:
    """Step 3.5: a gate for each head; layers that see everything turn half as many elements."""
    windowed = a.windowed()
    given = (
        {"dims": a.rope_dims(window=True)}
        if windowed
        else {"dims": a.rope_dims(window=False) // 2, "factors": "either"}
    )
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        **window_rope(a, windowed, **given),
        **a.qk_norms(optional=True),
        **(a.gate("sigmoid") if a.has("attn_gate.weight") else {}),
    )


@register("mimo2")
def mimo2(a: Layer) -> AttentionConfig:
    """Xiaomi's MiMo-V2: sinks in some layers, and a factor of the output.

    Projections have no bias, and no scale but in the layers that predict further tokens.
    """
    windowed = a.windowed()
    kinds = ("bias",) if a.index >= a.layers else ("bias", "scale")
    return a.attention(
        mask=a.mask(a.window() if windowed else 0),
        **window_rope(a, windowed),
        sinks=a.has("attn_sinks.weight"),
        output_scale=a.m.number("attention.value_scale", 1.0),
        unused=frozenset({f"attn_{name}.{kind}" for name in ("q", "k", "v", "qkv") for kind in kinds}),
    )


@register("grok")
def grok(a: Layer) -> AttentionConfig:
    """xAI's Grok: a scale of its own, and scores that are capped."""
    scaling = _rope.model_scaling(
        a.m,
        yarn=float(a.m.get("rope.scaling.yarn_ext_factor", -1.0)),
        attention=a.m.number("rope.scaling.yarn_attn_factor", 1.0),
        beta_fast=a.m.number("rope.scaling.yarn_beta_fast", 8.0),
        beta_slow=a.m.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    return a.attention(
        rope=a.rope("neox", scaling=scaling),
        scale=a.m.number("attention.output_scale", 0.08838834764831845),
        softcap=a.m.number("attn_logit_softcapping", 30.0),
    )
