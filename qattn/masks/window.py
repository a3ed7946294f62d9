"""A query sees keys within a window.  Mistral, Gemma, gpt-oss and others have them in some of their layers."""

from __future__ import annotations

from typing import NamedTuple

from qattn.masks._registry import register


@register("sliding_window_causal")
class SlidingWindow(NamedTuple):
    """A query at position q sees itself and the ``window - 1`` keys before it."""

    window: int

    @property
    def span(self) -> int:
        return self.window

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return max(0, query - self.window + 1), query + 1


@register("sliding_window_noncausal")
class SlidingWindowNoncausal(NamedTuple):
    """A query at position q sees itself, the ``window - 1`` keys before it, and all later ones."""

    window: int

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return max(0, query - self.window + 1), keys


@register("symmetric_window")
class SymmetricWindow(NamedTuple):
    """A query at position q sees the keys that are at most ``window // 2`` away, on both sides."""

    window: int

    def bounds(self, query: int, keys: int) -> tuple[int, int]:
        return max(0, query - self.window // 2), query + self.window // 2 + 1
