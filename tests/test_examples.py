"""The scripts in examples/ as a user runs them, on a small model in a folder in place of one of the hub's."""

from __future__ import annotations

import json
import math
import random
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = ["the", "of", "a", "memory", "gradient", "basis", "token", "layer", "keeps", "random", "norm", "step", "and"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(vocabulary)
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    rows = [{"text": " ".join(draw.choices(WORDS, k=60))} for _ in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No way to the hub; whatever is written lies in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(name: str, *argv: object):
    return runpy.run_path(str(EXAMPLES / name))["main"]([str(each) for each in argv])


def small(model: Path, data: Path, *more: object) -> list[object]:
    return ["--model", model, "--data", data, "--steps", 3, "--batch-size", 4, "--seq-len", 32, "--out", "out", *more]


@pytest.mark.parametrize("more", [(), ("--budget", "1GiB"), ("--budget", "2.2MiB")])
def test_trainer(model: Path, data: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    loss = run("trainer.py", *small(model, data, *more))
    shown = capsys.readouterr().out
    assert math.isfinite(loss) and 0 < loss < math.log(16) + 1
    assert ("fits" in shown) == bool(more) and (Path("out") / "model.safetensors").exists()
    assert ("plain fits 1.00 GiB" in shown) == ("1GiB" in more)
    assert ("layers compressed" in shown and "0 layers compressed" not in shown) == ("1GiB" not in more)


def test_lora_with_trl(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    loss = run("lora_trl.py", *small(model, data))
    assert math.isfinite(loss) and 0 < loss < math.log(16) + 1
    assert "lora_A" in capsys.readouterr().out and (Path("out") / "adapter_model.safetensors").exists()


def test_plain_loop() -> None:
    size = ["--hidden", 64, "--layers", 1, "--batch-size", 4, "--seq-len", 64, "--steps", 4]
    losses = run("plain_loop.py", *size)
    assert list(losses) == ["plain", "lean"]
    assert abs(losses["plain"] - losses["lean"]) < 0.1 and losses["plain"] < math.log(256) + 0.2
