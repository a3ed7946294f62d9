"""Measure how well a model predicts a text: its perplexity."""

from __future__ import annotations

import argparse
import sys

from qattn.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the text."""
    parser.add_argument("file", help="GGUF file")
    parser.add_argument("text", help="text, @FILE for what is in a file, or - for standard input")
    parser.add_argument(
        "--context",
        type=int,
        default=2048,
        metavar="N",
        help="tokens seen at once, at most (default: 2048, or the model's)",
    )
    _common.add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the perplexity with its standard error, and the speed to standard error."""
    from qattn.models.perplexity import perplexity

    text = _common.text_or_file(args.text)
    result = perplexity(_common.load(args.file, args, window_caches=True), text, context=args.context)
    sys.stdout.write(f"perplexity {result.value:.4f} ± {result.error:.4f} over {result.tokens} tokens\n")
    _common.say(_common.rate(result.tokens, result.seconds))
