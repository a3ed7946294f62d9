"""What a decoder needs to know beside its weights, read out of a file's metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qattn.architectures._registry import Metadata
from qattn.errors import GGUFError
from qattn.gguf_file import GGUFFile
from qattn.models import architectures

# Metadata that changes what a decoder computes and that none here understands, so it must say nothing.
_UNSUPPORTED_KEYS = (
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)


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
    """

    architecture: str
    layers: int
    hidden_size: int
    feed_forward_size: int
    vocabulary_size: int
    context_length: int
    norm_epsilon: float

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
        config = cls(
            architecture=metadata.architecture,
            layers=metadata.integer("block_count"),
            hidden_size=metadata.integer("embedding_length"),
            feed_forward_size=metadata.integer("feed_forward_length"),
            vocabulary_size=embeddings.shape[0],
            context_length=metadata.integer("context_length"),
            norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
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
    keys = [key for key in _UNSUPPORTED_KEYS if metadata.get(key)]
    reasons = [f"{metadata.key(key)} is {metadata.get(key)}, which its decoder doesn't know" for key in keys]
    foreign = [name for name in model if not _is_known(name, description)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        reasons.append(f"its decoder doesn't know the tensors {shown}")
    return reasons


def _is_known(name: str, description: architectures.Architecture) -> bool:
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None:
        return name in description.shared_tensors()
    # Those of the attention are its own business; it refuses what it doesn't know.
    return ".attn_" in name or name in description.layer_tensors(int(layer[1]))
