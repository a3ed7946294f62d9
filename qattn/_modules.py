"""Packages whose modules make something known when they are imported."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def import_all(package: str) -> list[ModuleType]:
    """Import every module of a package, but those whose names begin with an underscore."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return [importlib.import_module(f"{package}.{module.name}") for module in found if module.name[0] != "_"]
