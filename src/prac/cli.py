"""The ``prac`` command: parse, run, and say in one line what went wrong."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from prac.lab import bench_command, command, compare_command, layers_command, memory_command


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of ``prac``; subcommands get one too."""

    def __init__(self, **how: Any) -> None:
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)  # examples keep their lines
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"prac: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; each sets ``run``, a function of the parsed arguments and the raw ones."""
    top = Parser(
        prog="prac",
        description="Train transformers with a fraction of the activation memory.",
        epilog="`prac COMMAND --help` shows examples. PRAC_DEBUG=1 shows tracebacks.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command.add_parser(commands)
    compare_command.add_parser(commands)
    bench_command.add_parser(commands)
    memory_command.add_parser(commands)
    layers_command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if some of its runs failed, 2 for an error, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Where it is installed transformers imports it, and it says at once which kernels it misses; none is used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments, argv)
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "prac":
            raise
        return _fail(f"{error.name} is not installed: pip install 'prac-torch[lab]'", 2)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 2)


def _fail(message: str, code: int) -> int:
    if os.environ.get("PRAC_DEBUG"):
        traceback.print_exc()
    print(f"prac: error: {message}", file=sys.stderr)
    return code
