"""The command ``qattn``: one module for each subcommand, with ``add_arguments(parser)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from qattn.errors import QattnError

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended: 128 + SIGINT
FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Errors are one line on standard error and exit code 2; with ``QATTN_DEBUG=1`` they come with their traceback.
    """
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return FAILED
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone.  Python would complain about it once more while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (QattnError, OSError, ValueError, NotImplementedError) as error:
        if os.environ.get("QATTN_DEBUG"):
            raise
        sys.stderr.write(f"qattn {args.command}: {_one_line(error)}\n")
        return FAILED
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qattn", description="Run and inspect GGUF-quantized language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        command = importlib.import_module(f"{__name__}.{module.name}")
        summary = (command.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(module.name, help=summary, description=summary)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
