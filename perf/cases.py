"""Random weights, caches and layers to measure with, and the operations and bytes that they cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import harness
import numpy as np

import qattn
from qattn import formats
from qattn.cpu.simd import LANES
from qattn.rope import shared

Array = np.ndarray[Any, Any]
BLOCK_FORMATS = tuple(name for name in formats.names() if not formats.get(name).is_float)
DRAWN, KEPT = 1 << 22, 1 << 7  # random weights, and the blocks of them that are kept: most have wild scales
VOCABULARY = FEED_FORWARD = 256  # as little as there can be: a block of a K-quant


class Shape(NamedTuple):
    """An attention layer.  The default is Llama 3 8B's."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def weights(self) -> int:
        """Of all four projections."""
        return self.hidden * (self.qkv_rows + self.heads * self.head_dim)

    def attention_ops(self, tokens: int, depth: int) -> int:
        """Multiplications and additions of attention: two products, for the keys that each token sees."""
        return 4 * self.head_dim * self.heads * pairs(tokens, depth)


def pairs(tokens: int, depth: int) -> int:
    """Query and key pairs that a causal mask leaves to new tokens behind `depth` others."""
    return tokens * depth + tokens * (tokens + 1) // 2


def random_weights(name: str, rows: int, columns: int, seed: int = 0) -> qattn.QuantArray:
    """A QuantArray of random codes and of scales that make a weight about 0.02.

    Blocks of random bytes have scales of any size, so those are kept whose values are nearest to the wanted, and rows
    are made of them at random.
    """
    fmt, rng = formats.get(name), np.random.default_rng(seed)
    if fmt.is_float:
        values = np.float32(0.02) * rng.standard_normal((rows, columns), np.float32)
        data = values.view(np.uint16)[:, 1::2].copy() if name == "BF16" else values.astype(fmt.dtype)
        return qattn.QuantArray(data.view(np.uint8), name)
    blocks = rng.integers(0, 256, (DRAWN // fmt.block, fmt.bytes), np.uint8)
    with np.errstate(all="ignore"):
        mean_square = np.square(qattn.dequantize(qattn.QuantArray(blocks, name))).mean(axis=1)
        wildness = np.abs(np.log(mean_square / 0.02**2))  # NaN where a scale is, and sorted last
    kept = blocks[np.argsort(wildness)[:KEPT]]
    chosen = rng.integers(0, KEPT, (rows, columns // fmt.block))
    return qattn.QuantArray(kept[chosen].reshape(rows, -1), name)


def gaussian(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_cache(params: qattn.KVCacheParams, depth: int, *, room: int = 0, sequences: int = 1) -> qattn.KVCache:
    """A cache with `depth` random tokens for each sequence, and memory for `room` more."""
    cache = qattn.KVCache(params, sequences)
    cache.reserve(np.full(sequences, depth + room))
    values = gaussian(1 << 16)
    if params.key_kind != "f32":
        values = values.astype(np.float16).view(np.uint16) if params.key_kind == "f16" else values.view(np.uint16)[1::2]
    view = cache.view()
    for tiles in (view.keys, view.values):
        tiles[:, :, : -(-depth // LANES)] = np.resize(values, tiles[0, 0, : -(-depth // LANES)].shape)
    cache.lengths[:] = depth
    return cache


def random_layer(
    name: str,
    shape: Shape = Shape(),  # noqa: B008
    *,
    cache_dtype: str = "bfloat16",
    device: str = "cpu",
) -> qattn.GGUFQAttentionWithRope:
    """An attention layer of random weights, all in one format."""
    layer = qattn.GGUFQAttentionWithRope(
        rope=shared(shape.head_dim, 500_000.0),  # as in a model: layers that grow a table each would time that
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        hidden_size=shape.hidden,
        kv_params=qattn.KVCacheParams(shape.kv_heads, shape.head_dim, dtype=cache_dtype),
        devices=[device],
    )
    layer.load_state_dict(
        {
            "qkv_proj.weight": random_weights(name, shape.qkv_rows, shape.hidden),
            "o_proj.weight": random_weights(name, shape.hidden, shape.heads * shape.head_dim, seed=1),
        }
    )
    return layer


class Layers:
    """Equal layers that together exceed the processor's caches, to be called in turn."""

    def __init__(self, name: str, shape: Shape = Shape()) -> None:  # noqa: B008
        first = random_layer(name, shape)
        self.bytes, self.params, self.shape = first.nbytes, first.kv_params, shape
        self.all = [first, *(random_layer(name, shape) for _ in range(harness.copies(self.bytes) - 1))]

    def step(self, tokens: int, depth: int, sequences: int = 1) -> Callable[[], object]:
        """A call with new tokens for each sequence, behind `depth` others."""
        caches = [random_cache(self.params, depth, room=tokens, sequences=sequences) for _ in self.all]
        x, offsets = gaussian(sequences * tokens, self.shape.hidden), np.arange(sequences + 1) * tokens

        def call(both: Any) -> None:
            layer, cache = both
            cache.lengths[:] = depth
            layer(x, kv_cache=cache, row_offsets=offsets)

        return harness.in_turn(zip(self.all, caches, strict=True), call)


def write_llama(path: Path, name: str, layers: int, shape: Shape = Shape()) -> Path:  # noqa: B008
    """Write a llama model of random weights in one format, nearly all of them in its attention, and no tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    seeds = itertools.count()

    def add(tensor: str, kind: str, rows: int, columns: int) -> None:
        data = random_weights(kind, rows, columns, seed=next(seeds)).data
        writer.add_tensor(f"{tensor}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])

    kv, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    add("token_embd", "Q8_0", VOCABULARY, shape.hidden)
    for n in range(layers):
        for tensor, rows, columns in (
            ("attn_q", heads, shape.hidden),
            ("attn_k", kv, shape.hidden),
            ("attn_v", kv, shape.hidden),
            ("attn_output", shape.hidden, heads),
            ("ffn_gate", FEED_FORWARD, shape.hidden),
            ("ffn_up", FEED_FORWARD, shape.hidden),
            ("ffn_down", shape.hidden, FEED_FORWARD),
        ):
            add(f"blk.{n}.{tensor}", name, rows, columns)
    norms = ["output_norm", *(f"blk.{n}.{norm}" for n in range(layers) for norm in ("attn_norm", "ffn_norm"))]
    for norm in norms:
        writer.add_tensor(f"{norm}.weight", np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
