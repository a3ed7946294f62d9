"""A whole model of 100 kB: a Llama of two layers with random weights, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qattn.models.byte_bpe import _byte_of

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, CONTEXT = 2, 64, 4, 2, 96, 64

_BYTES = sorted(_byte_of(), key=_byte_of().__getitem__)
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©"]
TOKENS = [*_BYTES, *(merge.replace(" ", "") for merge in _MERGES), "<|start|>", "<|im_end|>", "<tool>"]
START, END, TOOL = len(TOKENS) - 3, len(TOKENS) - 2, len(TOKENS) - 1
TYPES = [gguf.TokenType.NORMAL] * START + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def metadata(**changes: Any) -> dict[str, Any]:
    """Every key of the tiny model; a change to None leaves a key out, dots in keys are written as ``__``."""
    given = {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
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


def weights(*, tied: bool = True, biases: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by their names in the file."""
    rng = np.random.default_rng(seed)
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        inside = {"attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        inside |= {"attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), "ffn_gate": (INNER, HIDDEN)}
        inside |= {"ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in inside.items()}
        if biases:
            shapes |= {f"blk.{n}.ffn_{name}.bias": (INNER,) for name in ("gate", "up")} | {
                f"blk.{n}.ffn_down.bias": (HIDDEN,)
            }
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    return {
        name: (1 + rng.standard_normal(shape) / 8 if "norm" in name else rng.standard_normal(shape) / 8).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def write(
    path: Path, tensors: dict[str, np.ndarray] | None = None, architecture: str = "llama", **changes: Any
) -> Path:
    """Write the model to a file and return its path: matrices as Q8_0, the rest as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata(**changes).items():
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
    for name, value in (weights() if tensors is None else tensors).items():
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
