"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from qattn.errors import MissingExtraError


def require(module: str) -> Any:
    """Import a module of the extra ``models``.

    Raises
    ------
    MissingExtraError
        It is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # it is there, and something that it needs isn't
        raise MissingExtraError("models", package) from error
