"""The ``prac`` command: parse, run, and say in one line what went wrong."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from prac import __version__
from prac.lab.commands import bench as bench_command
from prac.lab.commands import compare as compare_command
from prac.lab.commands import layers as layers_command
from prac.lab.commands import memory as memory_command
from prac.lab.commands import streams
from prac.lab.commands import train as command
from prac.lab.runs import children

# What to do where a file cannot be written or read.
REMEDIES = {
    errno.ENOSPC: "make room on that disk, or choose another one",
    errno.EDQUOT: "make room on that disk, or choose another one",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "a file is in the place of a folder; choose another name",
    errno.EEXIST: "something else has that name; choose another one",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of ``prac``; subcommands get one too."""

    def __init__(self, **how: Any) -> None:
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)  # examples keep their lines
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"prac: error: {message.rstrip('.')}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; each sets ``run``, a function of the parsed arguments and the raw ones."""
    top = Parser(
        prog="prac",
        description="Train transformers with a fraction of the activation memory.",
        epilog="`prac COMMAND --help` shows examples. PRAC_DEBUG=1 shows tracebacks.",
    )
    top.add_argument("--version", action="version", version=f"prac {__version__}")
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
    children.end_with_parent()
    streams.never_fail()
    # Where it is installed transformers imports it, and it says at once which kernels it misses; none is used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments, argv)
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for what Python flushes in the end
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "prac":
            raise
        return _fail(f"{error.name} is not installed: pip install 'prac-torch[lab]'", 2)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(_told(error), 2)


def _told(error: Exception) -> str:
    """One line: what is wrong with which file, and what to do."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        remedy = REMEDIES.get(error.errno or 0)
        return f"{error.filename}: {error.strerror}" + (f"; {remedy}." if remedy else "")
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    if os.environ.get("PRAC_DEBUG"):
        traceback.print_exc()
    print(f"prac: error: {message}", file=sys.stderr)
    return code
