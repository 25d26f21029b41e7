"""A small text, and no way to the hub or to the user's cache."""

import random
from pathlib import Path

import pytest

WORDS = ["the", "of", "a", "memory", "gradient", "basis", "token", "layer", "keeps", "random", "norm", "step", "and"]


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("PRAC_DEBUG", raising=False)


@pytest.fixture(scope="session")
def text() -> str:
    draw = random.Random(0)
    return "".join(" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(900))


@pytest.fixture(scope="session")
def corpus_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(text)
    return path
