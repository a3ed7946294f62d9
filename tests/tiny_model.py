"""A whole model of 100 kB: two layers of any architecture with random weights, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qattn.models.byte_bpe import _byte_of

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, CONTEXT = 2, 64, 4, 2, 96, 64
HEAD_DIM = {"llama": 16, "qwen2": 16, "phi3": 16, "qwen3": 32, "gemma3": 32}  # 32: not the heads' share of a row
ARCHITECTURES = tuple(HEAD_DIM)
WINDOW, WINDOW_BASE = 7, 100.0  # of Gemma's first layer; a small base, so that few tokens show it
ORIGINAL_CONTEXT, LONG_FACTOR = 32, 1.19  # of Phi, shorter than its context: its long factors are in use

_BYTES = sorted(_byte_of(), key=_byte_of().__getitem__)
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©"]
TOKENS = [*_BYTES, *(merge.replace(" ", "") for merge in _MERGES), "<|start|>", "<|im_end|>", "<tool>"]
START, END, TOOL = len(TOKENS) - 3, len(TOKENS) - 2, len(TOKENS) - 1
TYPES = [gguf.TokenType.NORMAL] * START + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Every key of the tiny model; a change to None leaves a key out, dots in keys are written as ``__``."""
    own = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    if HEAD_DIM.get(architecture) != HIDDEN // HEADS:
        own |= dict.fromkeys(("attention.key_length", "attention.value_length"), HEAD_DIM.get(architecture))
    if architecture == "gemma3":
        own |= {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, False]}
        own |= {"rope.freq_base_swa": WINDOW_BASE, "final_logit_softcapping": 20.0}
    if architecture == "phi3":
        own |= {"rope.dimension_count": HEAD_DIM["phi3"], "rope.scaling.attn_factor": LONG_FACTOR}
        own |= {"rope.scaling.original_context_length": ORIGINAL_CONTEXT}
    given = {f"{architecture}.{key}": value for key, value in own.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": np.array(TYPES, np.int32),
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in given.items() if value is not None}


def _layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, without biases that may be missing."""
    q, kv = HEADS * HEAD_DIM[architecture], KV_HEADS * HEAD_DIM[architecture]
    fused = architecture == "phi3"
    rows = {"attn_qkv": q + 2 * kv} if fused else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (HIDDEN,)}
    shapes |= {f"{name}.weight": (count, HIDDEN) for name, count in rows.items()}
    shapes |= {"attn_output.weight": (HIDDEN, q), "ffn_norm.weight": (HIDDEN,)}
    rows = {"ffn_up": 2 * INNER} if fused else {"ffn_gate": INNER, "ffn_up": INNER}
    shapes |= {f"{name}.weight": (count, HIDDEN) for name, count in rows.items()}
    shapes["ffn_down.weight"] = (HIDDEN, INNER)
    if architecture == "qwen2":
        shapes |= {f"attn_{name}.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    if architecture in ("qwen3", "gemma3"):
        shapes |= {f"attn_{name}_norm.weight": (HEAD_DIM[architecture],) for name in "qk"}
    if architecture == "gemma3":
        shapes |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
    return shapes


def weights(
    architecture: str = "llama", *, tied: bool = True, biases: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Float32 weights by their names in the file."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        inside = _layer_shapes(architecture)
        if biases:
            inside |= {"ffn_gate.bias": (INNER,), "ffn_up.bias": (INNER,), "ffn_down.bias": (HIDDEN,)}
        shapes |= {f"blk.{n}.{name}": shape for name, shape in inside.items()}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    if architecture == "phi3":
        shapes |= {f"rope_factors_{name}.weight": (HEAD_DIM[architecture] // 2,) for name in ("short", "long")}
    near_one = ("norm", "rope_factors")
    values = {name: rng.standard_normal(shape) / 8 + any(x in name for x in near_one) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in values.items()}


def write(
    path: Path, tensors: dict[str, np.ndarray] | None = None, architecture: str = "llama", **changes: Any
) -> Path:
    """Write the model to a file and return its path: matrices as Q8_0, the rest as they are.

    An architecture that is not one of `ARCHITECTURES` gets the metadata and tensors of Llama, under its own name.
    """
    if tensors is None:
        tensors = weights(architecture if architecture in ARCHITECTURES else "llama")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata(architecture, **changes).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for name, value in tensors.items():
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
