"""Text files, packed or not: a file is read whole, and what is not text is refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".rst", ".text")
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# How files begin that are often given by another name, and what they are.
BEGINNINGS = {
    b"PAR1": "Parquet: name it .parquet",
    b"\x1f\x8b": "packed by gzip: name it .gz",
    b"BZh": "packed by bzip2: name it .bz2",
    b"\xfd7zXZ": "packed by xz: name it .xz",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"(\xb5/\xfd": "packed by zstd: unpack it",
}


def suffix(path: Path) -> str:
    """What kind of file it is by its name, packed or not.

    >>> suffix(Path("notes/a.TXT.gz")), suffix(Path("rows.jsonl"))
    ('.txt', '.jsonl')
    """
    *_, last = ["", *path.suffixes]
    return (Path(path.stem) if last.lower() in PACKED else path).suffix.lower()


def read(path: Path) -> str:
    """The text of one file.

    Raises:
        ValueError: if it is not UTF-8 text, or holds JSON.
        OSError: if it cannot be read.
    """
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as stream:
            content: bytes = stream.read()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): it is cut off, or has the wrong name.") from error
    for beginning, what in BEGINNINGS.items():
        if content.startswith(beginning):
            raise ValueError(f"{path} is not text but {what}.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out.") from error
    if (zero := text.find("\0")) >= 0:
        raise ValueError(f"{path} is not text (character {zero} is zero): convert it, or leave it out.")
    if _is_json(text):
        raise ValueError(f"{path} is not text but JSON: name it .jsonl, and its --text-field is read.")
    return text


def _is_json(text: str) -> bool:
    """Whether it is records rather than text: its first line, or all of it, is a JSON object or a list of them."""
    begin = text.lstrip()
    if not begin.startswith(("{", "[")):
        return False
    for part in (begin.partition("\n")[0], text):
        try:
            found = json.loads(part)
        except ValueError:
            continue
        if isinstance(found, dict) or (isinstance(found, list) and any(isinstance(row, dict) for row in found)):
            return True
    return False
