"""Packages whose modules make something known when they are imported."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def import_all(package: str) -> tuple[ModuleType, ...]:
    """Import every module of a package, but those whose names begin with an underscore; once, however often asked."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(importlib.import_module(f"{package}.{module.name}") for module in found if module.name[0] != "_")
