"""Every query sees every key."""

from __future__ import annotations

from typing import NamedTuple

from qattn.masks._registry import register


@register("null")
class Null(NamedTuple):
    """A query sees all keys of its sequence, later ones too."""

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return 0, keys
