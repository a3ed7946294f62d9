"""The attention of GGUF files: layers over quantized weights, loaded by the description of their architecture."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from qattn import _check, formats, ops
from qattn._backend import as_numpy
from qattn.architectures import AttentionConfig, describe
from qattn.array import QuantArray
from qattn.attention import AttentionWithRope
from qattn.errors import GGUFError, of_file
from qattn.gguf_file import GGUFFile, opened
from qattn.state import of_layer


class GGUFQAttentionWithRope(AttentionWithRope):
    """Self-attention with rotary embedding over GGUF-quantized weights.

    Parameters
    ----------
    dtype
        Always uint8: quantized weights are bytes.
    quantization_encoding : str, optional
        The format that all weights have, such as "Q4_K".  Without it, each may have its own.
    others
        As in `AttentionWithRope`.
    """

    def __init__(self, *, dtype: Any = np.uint8, quantization_encoding: str | None = None, **parameters: Any) -> None:
        self.quantization_encoding = None
        if quantization_encoding is not None:
            self.quantization_encoding = formats.get(quantization_encoding).name
        super().__init__(dtype=dtype, **parameters)

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        if dtype != np.uint8:
            raise ValueError(f"dtype is {dtype}; quantized weights are uint8 (for floats there is AttentionWithRope)")

    def _weight(self, name: str, value: Any, shape: tuple[int, int]) -> QuantArray:
        encoding = self.quantization_encoding
        if not isinstance(value, QuantArray):
            value = as_numpy(value, name)
            if value.dtype != np.uint8:
                raise ValueError(f"{name} has dtype {value.dtype}; expected a QuantArray, or uint8 blocks")
            if encoding is None:
                raise ValueError(f"{name} is plain bytes; say which format they have with quantization_encoding")
            value = QuantArray(value, encoding)
        if encoding is not None and value.format != encoding:
            raise ValueError(f"{name} has format {value.format}; quantization_encoding is {encoding}")
        _check.shape(name, value, shape)
        return value

    @classmethod
    def from_gguf(
        cls,
        model: GGUFFile | str | os.PathLike[str],
        layer: int = 0,
        *,
        part: Literal["encoder", "decoder", "cross"] | None = None,
        precision: ops.Precision = "fast",
        cache_dtype: str = "bfloat16",
        max_length: int | None = None,
        hadamard: bool = False,
        device: str | None = None,
    ) -> GGUFQAttentionWithRope:
        """The attention of one layer of a GGUF file.

        Parameters
        ----------
        model : an open file, or a path
        layer : int
        part : "encoder", "decoder" or "cross", optional
            Which block of the layer, in a model with an encoder and a decoder; the last attends from one to the other.
        cache_dtype, max_length, hadamard
            Of the layer's own cache: see `KVCacheParams`.
        device : str, optional
            Where the layer computes; that of the file, unless said otherwise.

        Raises
        ------
        DeviceError
            If the device can't be used.
        GGUFError
            If tensors or metadata are missing.
        NotImplementedError
            If the architecture is not supported.
        """
        with opened(model) as file:
            config = describe(file, layer, part=part, context=max_length)
            with of_file(file.path, layer):
                weights = _layer_weights(file, config)
            attention = cls.from_config(
                config,
                cache_dtype=cache_dtype,
                max_length=max_length,
                hadamard=hadamard,
                devices=[device or file.device],
                has_bias=any(name.endswith("_proj.bias") for name in weights),
                precision=precision,
            )
            with of_file(file.path, layer):
                attention.load_state_dict(weights)
        return attention


def _layer_weights(model: GGUFFile, config: AttentionConfig) -> dict[str, Any]:
    """The tensors of a layer's attention by the names of a state dictionary, zeros for biases that some have not."""
    weights = of_layer(model, config)
    if "o_proj.weight" not in weights:
        raise GGUFError(f"{model.path} has no tensor {config.prefix}{config.output}.weight")
    if any(f"{name}.bias" in weights for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")):
        for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
            if f"{name}.weight" in weights and f"{name}.bias" not in weights:
                weights[f"{name}.bias"] = np.zeros(weights[f"{name}.weight"].shape[0], np.float32)
    return weights
