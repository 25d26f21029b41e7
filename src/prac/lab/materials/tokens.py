"""Tokenizers and packing: documents in, blocks of ``seq_len`` token ids out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prac.lab.materials.data import Corpus
from prac.runtime import files

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
PARTS = {"train": "training", "validation": "validation"}
FACTS = "facts.json"  # how many blocks each part has, and their entropy


@dataclass(frozen=True)
class Blocks:
    """Packed tokens; both data sets have one column, ``input_ids`` of ``seq_len`` int32 each."""

    train: Dataset
    validation: Dataset
    unigram_entropy: float  # of the validation tokens, in nats: what the best model without context would reach
    read: dict[str, str]  # digests of the text and of the tokenizer that they were made from


def load_tokenizer(name: str, corpus: Corpus, cache: Path) -> PreTrainedTokenizerBase:
    """``bpe:SIZE`` trained on the corpus (or taken from the cache), or a pretrained one by folder or hub name.

    Raises:
        ValueError: for a size that is not one, or a name that is no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    if name.startswith("bpe:"):
        file = _trained(name.removeprefix("bpe:"), corpus, cache)
        with _reading(file):
            return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END, bos_token=END)
    logging.set_verbosity_error()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a folder without a tokenizer raises whatever it trips over
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no tokenizer {name!r}: give bpe:SIZE, a folder, or a hub name ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end-of-text token to join documents with.")
    return tokenizer


def _trained(size: str, corpus: Corpus, cache: Path) -> Path:
    """The file of a byte-level BPE of ``size`` entries, trained on ``corpus.train`` unless it is in the cache."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not size.isdecimal() or int(size) <= len(alphabet):
        raise ValueError(f"tokenizer bpe:{size}: give a number of entries above {len(alphabet)}, such as bpe:4096.")
    file = cache / f"bpe-{size}-{corpus.digest()[:16]}.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=int(size), special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus.train, trainer)
        with _writing(file):
            files.write(file, tokenizer.to_str())
    return file


def load_blocks(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int | None, cache: Path
) -> Blocks:
    """Tokenize and pack both parts of a corpus, or take them from the cache.

    Raises:
        ValueError: if a part has less than one block of text.
    """
    from datasets import Dataset, load_from_disk

    read = {"text": corpus.digest(), "tokenizer": _fingerprint(tokenizer)}
    key = f"{read['text']} {read['tokenizer']} {seq_len} {max_tokens}"
    folder = cache / f"packed-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        parts = {
            "train": pack(corpus.train, tokenizer, seq_len, max_tokens),
            "validation": pack(corpus.validation, tokenizer, seq_len),
        }
        for part, blocks in parts.items():
            if len(blocks) == 0:
                raise ValueError(
                    f"too little text: the {PARTS[part]} part has less than {seq_len} tokens (one --seq-len)."
                )
        facts = {part: len(blocks) for part, blocks in parts.items()}

        def fill(target: Path) -> None:
            for part, blocks in parts.items():
                Dataset.from_dict({"input_ids": blocks}).save_to_disk(target / part)
            files.write_json(target / FACTS, facts | {"unigram_entropy": unigram_entropy(parts["validation"])})

        with _writing(folder):
            files.make_folder(folder, fill)
    with _reading(folder):
        known = json.loads((folder / FACTS).read_text())
        train, validation = (load_from_disk(folder / part).with_format("torch") for part in PARTS)
        if [len(train), len(validation)] != [known[part] for part in PARTS]:
            raise ValueError("blocks are missing")
    return Blocks(train, validation, known["unigram_entropy"], read)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what to do where a file of the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} in the cache: {error.strerror or error}. Make room there, or set PRAC_CACHE to another folder."
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what to do where a file of the cache is not what was written there."""
    try:
        yield
    except Exception as error:  # of a tokenizer or a table that was cut off, each library has its own kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} in the cache is cut off or damaged ({reason}): delete it, it is made again."
        ) from error


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int | None = None
) -> npt.NDArray[np.int32]:
    """Token ids of all documents, an end-of-text after each, cut into rows of ``seq_len``; the rest is dropped."""
    stream: list[npt.NDArray[np.int32]] = []
    count = 0
    for ids in _encoded(documents, tokenizer):
        stream.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
        count += len(ids) + 1
        if max_tokens is not None and count >= max_tokens:
            break
    tokens = np.concatenate(stream)[:max_tokens] if stream else np.empty(0, dtype=np.int32)
    rows = len(tokens) // seq_len
    return tokens[: rows * seq_len].reshape(rows, seq_len)


def unigram_entropy(tokens: npt.NDArray[np.int32]) -> float:
    """Entropy in nats of the token frequencies: a lower bound for any model that ignores context."""
    counts = np.bincount(tokens.reshape(-1))
    p = counts[counts > 0] / tokens.size
    return float(-(p * np.log(p)).sum())


def _encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, 1000)):
        encoded: Any = tokenizer(batch, add_special_tokens=False, verbose=False)
        yield from encoded["input_ids"]


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text} {tokenizer.eos_token_id}".encode()).hexdigest()
