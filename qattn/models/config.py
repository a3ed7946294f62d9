"""What a decoder needs to know beside its weights, read out of a file's metadata."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from qattn.architectures import BESIDE
from qattn.architectures._metadata import Metadata
from qattn.errors import GGUFError
from qattn.gguf_file import GGUFFile
from qattn.models import architectures

# Metadata that changes what a decoder computes and that none here understands, with the values that say nothing:
# some writers fill in every key.
_UNSUPPORTED_KEYS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "num_loops": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
_SOFTCAP = "final_logit_softcapping"
_SOFTCAP_DEFAULT = 30.0  # what such writers put where no cap is meant


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Parameters
    ----------
    architecture : str
    layers, hidden_size, feed_forward_size, vocabulary_size : int
    context_length : int
        Tokens that the model was trained to see.
    norm_epsilon : float
        What the RMS norms add to the mean square.
    embedding_scale : float
        Factor of the embeddings.
    logit_softcap : float
        The logits x become cap · tanh(x / cap); 0: they stay.
    """

    architecture: str
    layers: int
    hidden_size: int
    feed_forward_size: int
    vocabulary_size: int
    context_length: int
    norm_epsilon: float
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0

    @classmethod
    def from_gguf(cls, model: GGUFFile) -> ModelConfig:
        """Read the configuration of an open file.

        Raises
        ------
        GGUFError
            Metadata or the embeddings are missing, or make no sense.
        NotImplementedError
            There is no decoder for the architecture, or not for what the file asks of it.
        """
        reasons = unsupported(model)
        if reasons:
            raise NotImplementedError(f"{model.path} can't be run: {'; '.join(reasons)}")
        metadata = Metadata(model)
        description = architectures.get(metadata.architecture)
        embeddings = model.tensors.get(description.embeddings)
        if embeddings is None:
            raise GGUFError(f"{model.path} has no tensor {description.embeddings}")
        hidden = metadata.integer("embedding_length")
        config = cls(
            architecture=metadata.architecture,
            layers=metadata.integer("block_count"),
            hidden_size=hidden,
            feed_forward_size=metadata.integer("feed_forward_length"),
            vocabulary_size=embeddings.shape[0],
            context_length=metadata.integer("context_length"),
            norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
            embedding_scale=math.sqrt(hidden) if description.scales_embeddings else 1.0,
            logit_softcap=metadata.number(_SOFTCAP, 0.0) if description.caps_logits else 0.0,
        )
        first_missing = next(
            (n for n in range(config.layers) if description.attention_norm.format(n) not in model), None
        )
        if first_missing is not None:
            raise GGUFError(
                f"{model.path} has no tensor {description.attention_norm.format(first_missing)}, "
                f"but {metadata.key('block_count')} is {config.layers}"
            )
        return config


def unsupported(model: GGUFFile) -> list[str]:
    """Return what stands against running a file's whole decoder, a phrase each; empty if nothing does.

    What its attention asks for is another matter: see `qattn.capabilities`.
    """
    metadata = Metadata(model)
    if metadata.architecture not in architectures.names():
        return [f"there is no decoder for architecture {metadata.architecture!r}"]
    description = architectures.get(metadata.architecture)
    neutral = dict(_UNSUPPORTED_KEYS)
    if not description.caps_logits:
        neutral[_SOFTCAP] = (0, _SOFTCAP_DEFAULT)
    keys = [key for key, values in neutral.items() if _says_something(metadata.get(key), values)]
    reasons = [f"{metadata.key(key)} is {metadata.get(key)}, which its decoder doesn't know" for key in keys]
    foreign = [name for name in model if not _is_known(name, description)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        reasons.append(f"its decoder doesn't know the tensors {shown}")
    return reasons


def _says_something(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is not None and (not np.isscalar(value) or value not in neutral)


def _is_known(name: str, description: architectures.Architecture) -> bool:
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None:
        return name in description.shared_tensors()
    # Those of the attention are its own business, and it refuses what it doesn't know; norms beside it are not.
    own = ".attn_" in name and name.split(".")[2] not in BESIDE
    return own or name in description.layer_tensors(int(layer[1]))
