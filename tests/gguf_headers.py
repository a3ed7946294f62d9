"""GGUF files of metadata and tensors without values, of any architecture."""

from __future__ import annotations

import gguf
import numpy as np

import qattn

SIZES = {
    "block_count": 8,
    "context_length": 4096,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
# What some architectures can't do without.
MORE = {
    "attention.sliding_window": 24,
    "attention.sliding_window_pattern": [True, False] * 4,
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.kv_lora_rank_swa": 32,
    "attention.key_length_mla_swa": 24,
    "attention.value_length_mla_swa": 16,
    "attention.indexer.top_k": 4096,
    "attention.indexer.block_size": 1,
    "rope.dimension_count": 8,
    "rope.freq_base_swa": 20000.0,
}


class Headers:
    """Writes files into a folder, and opens them until it is left."""

    def __init__(self, folder):
        self._folder, self._opened = folder, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for model in self._opened:
            model.close()

    def __call__(self, architecture, metadata=(), tensors=()):
        """A file of `SIZES` changed by `metadata`, and of tensors: names, or a dictionary of values."""
        path = self._folder / f"{len(self._opened)}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (SIZES | dict(metadata)).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
        given = tensors if isinstance(tensors, dict) else dict.fromkeys(tensors, np.ones(1))
        for name, value in (given or {"token_embd.weight": np.ones(1)}).items():
            writer.add_tensor(name, value.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._opened.append(qattn.open(path))
        return self._opened[-1]
