"""What of a file qattn supports, told before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qattn import architectures, formats
from qattn.gguf_file import GGUFFile, opened


def unsupported_tensors(model: GGUFFile) -> dict[str, str]:
    """Return the tensors of formats that qattn doesn't know, ``{tensor name: format name}``."""
    known = formats.names()
    return {name: tensor.type_name for name, tensor in model.tensors.items() if tensor.type_name not in known}


@dataclass(frozen=True)
class Capabilities:
    """What `capabilities` found out about a file; ``print`` it to read it.

    Attributes
    ----------
    architecture : str
        The file's ``general.architecture``.
    layers : int
        How many layers have attention tensors.
    formats : dict of str to bool
        The formats of the file's tensors, and whether qattn can read them.
    unsupported_tensors : dict of str to str
        The tensors that can't be read, each with the name of its format.
    unsupported_attention : tuple of str
        What the attention of this file needs and qattn doesn't have, or what is wrong with its metadata; a phrase each.
    """

    architecture: str
    layers: int
    formats: dict[str, bool]
    unsupported_tensors: dict[str, str]
    unsupported_attention: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether every tensor can be read and every attention layer computed."""
        return not self.unsupported_tensors and not self.unsupported_attention

    def __str__(self) -> str:
        names = ", ".join(name for name, known in self.formats.items() if known) or "none"
        lines = [f"tensors: supported ({names})"]
        if self.unsupported_tensors:
            shown = [f"{name} is {kind}" for name, kind in list(self.unsupported_tensors.items())[:3]]
            more = [f"and {len(self.unsupported_tensors) - 3} more"] if len(self.unsupported_tensors) > 3 else []
            lines = [f"tensors: {len(self.unsupported_tensors)} NOT supported: {', '.join(shown + more)}"]
        lines.append(f"attention: supported ({self.architecture}, {self.layers} layers)")
        if self.unsupported_attention:
            lines[-1] = f"attention: NOT supported: {'; '.join(self.unsupported_attention)}"
        return "\n".join(lines)


def capabilities(model: GGUFFile | str | os.PathLike[str]) -> Capabilities:
    """Tell whether every tensor and every attention feature of a GGUF file is supported, from its header alone.

    Parameters
    ----------
    model : GGUFFile or path

    Raises
    ------
    OSError, GGUFError
        The file can't be read, or is no valid GGUF file.

    Examples
    --------
    >>> print(qattn.capabilities("model.gguf"))
    tensors: supported (F32, Q4_1, Q8_0)
    attention: supported (llama, 30 layers)
    """
    with opened(model) as file:
        missing = unsupported_tensors(file)
        kinds = sorted({tensor.type_name for tensor in file.tensors.values()})
        layers, attention = _attention(file)
        architecture = str(file.metadata.get("general.architecture", "unknown"))
    return Capabilities(
        architecture=architecture,
        layers=layers,
        formats={kind: kind not in missing.values() for kind in kinds},
        unsupported_tensors=missing,
        unsupported_attention=tuple(attention),
    )


def _attention(model: GGUFFile) -> tuple[int, list[str]]:
    """Count the layers, and say what stands against computing their attention."""
    # Counted by their tensors: a damaged file may claim 2^31 layers, and a cut one fewer than its metadata says.
    layers: list[int] = []
    try:
        layers = architectures.attention_layers(model)
        reasons = architectures.unsupported(model)
        if not reasons:
            for layer in layers:
                architectures.describe(model, layer)
    except (ValueError, NotImplementedError) as error:  # a GGUFError is a ValueError
        reasons = [str(error)]
    return len(layers), reasons
