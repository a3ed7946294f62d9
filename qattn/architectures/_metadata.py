"""A file's metadata, read with errors that name the key."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from qattn.errors import GGUFError
from qattn.gguf_file import GGUFFile


class Metadata:
    """A file's metadata under the prefix of its architecture.

    Where a default is given, 0 means that the key is not set, as writers of GGUF files mean it.
    """

    def __init__(self, model: GGUFFile, context: int | None = None) -> None:
        self.model, self.all = model, model.metadata
        self.context = sys.maxsize if context is None else context
        """Tokens that a sequence may have."""
        self.architecture = architecture(self.all)

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str, default: Any = None) -> Any:
        return self.all.get(self.key(name), default)

    def array(self, name: str) -> list[Any] | None:
        """A list of values, or None if the key is missing or has a single one."""
        value = self.get(name)
        return list(value) if isinstance(value, (list, tuple, np.ndarray)) else None

    def integer(self, name: str, default: int | None = None, *, layer: int = 0, least: int = 1) -> int:
        """An integer of at least `least`; some files give one for each layer."""
        value = self._value(name, default, layer)
        try:
            number = int(value) if isinstance(value, np.bool_) else operator.index(value)  # lists of flags are both
        except TypeError:
            raise GGUFError(f"metadata {self.key(name)} is {value!r}; expected an integer") from None
        if number == 0 and default is not None:
            return default
        if number < least:
            raise GGUFError(f"metadata {self.key(name)} is {number}; expected at least {least}")
        return number

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, default, 0)
        scalar = np.isscalar(value) and not isinstance(value, (str, bool))
        if scalar and value == 0 and default is not None:
            return default
        if not scalar or not np.isfinite(value) or value <= 0:
            raise GGUFError(f"metadata {self.key(name)} is {value!r}; expected a positive number")
        return float(value)

    def _value(self, name: str, default: Any, layer: int) -> Any:
        value = self.get(name, default)
        if value is None:
            raise GGUFError(f"metadata {self.key(name)} is missing")
        if isinstance(value, (list, tuple, np.ndarray)):
            if layer >= len(value):
                raise GGUFError(f"metadata {self.key(name)} has {len(value)} entries; layer {layer} has none")
            return value[layer]
        return value


def architecture(metadata: Mapping[str, Any]) -> str:
    """The name of a file's architecture."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise GGUFError(f"metadata general.architecture is {name!r}; expected a name")
    return name
