"""Notices when objects change that a recording of kernels depends on."""

from typing import Any


class Watched:
    """An object whose attributes' assignments are counted, those of all such objects together.

    So whoever depends on many of them looks at one number, as long as nothing happens to any of them.
    """

    assignments = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Watched.assignments += 1
