"""Files and folders that are written whole or not at all; where that fails, the error names them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, so that no reader ever sees half of it.

    Raises:
        OSError: with the name of ``path``, if it cannot be written.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON. A loss that is not a number is written as ``NaN``."""
    write(path, json.dumps(data, indent=2) + "\n")


def read_lines(path: Path) -> tuple[list[Any], str]:
    """The rows of a JSON-lines file, and what is left of a last line that a crash cut short, or "".

    Raises:
        ValueError: with the name of the file, if another line is damaged.
    """
    rows: list[Any] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is damaged ({error}): restore the file from a copy, or delete it."
                ) from error
            return rows, line.decode(errors="replace")
    return rows, ""


def make_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then move it to ``path``; when two processes race, the first wins."""
    with _filled(path, fill) as temporary:
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then put it in the place of ``path``, which is there until the new one is whole."""
    with _filled(path, fill) as temporary:
        old = Path(f"{temporary}.old")
        if path.exists() or path.is_symlink():
            path.rename(old)
        temporary.rename(path)
        remove(old)


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link and not what it points to; what is not there is none of them."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_new(path: Path | None, overwrite: bool) -> None:
    """Refuse early to write a file that exists or that cannot be.

    Raises:
        ValueError: if it is a folder, or exists and is not to be replaced.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give --overwrite to replace it.")


@contextmanager
def _filled(path: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A folder beside ``path`` that has been filled; what is left of it in the end goes."""
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            fill(temporary)
            temporary.chmod(0o755)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name into errors of a full disk, which have none, in place of that of a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
