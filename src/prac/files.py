"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, so that no reader ever sees half of it."""
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


def make_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then move it to ``path``; when two processes race, the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Where tokenizers and packed data are kept: ``$PRAC_CACHE``, or ``prac`` in the user's cache folder."""
    if folder := os.environ.get("PRAC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prac"
