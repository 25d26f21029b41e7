"""The two runners that try prac on others' models: architectures of transformers, and transformers' own tests."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prac.layers import Compressed

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A module of the folder by name; none stays behind."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(FOLDER):
            del sys.modules[name]


def run(module, monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
    return module.main()


@pytest.mark.parametrize("script", ["architectures", "transformers_tests"])
def test_help_has_examples(script, load, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(load(script), monkeypatch, "--help")
    assert ended.value.code == 0
    assert f"python benchmarks/{script}.py --" in capsys.readouterr().out


# --- architectures -------------------------------------------------------------------------------


@pytest.mark.long
def test_two_architectures(load, monkeypatch, tmp_path, capsys):
    module, out = load("architectures"), tmp_path / "rows.json"
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert run(module, monkeypatch, "--only", "llama", "whisper", "--json", str(out)) == 0, capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["faults"] for row in rows] == [[]] * 14
    assert "whisper" in capsys.readouterr().out
    for row in rows:
        assert row["saved_bytes"] == row["kept_bytes"], "track_kept and hooks from outside"
        assert row["largest_error"] == 0 if row["setting"] == "plain" else row["largest_error"] > 0
        if row["setting"] == "exact":
            assert row["largest_error"] < 1e-4 and row["none_differs"] == []
        if row["setting"] == "small":
            assert row["live_bytes"] < 0.6 * rows[0 if row["architecture"] == "llama" else 7]["live_bytes"]


def test_one_that_fails_is_a_row(load, monkeypatch, tmp_path):
    module, out = load("architectures"), tmp_path / "rows.json"

    def fails(model):
        raise RuntimeError("no batch today")

    broken = dataclasses.replace(module.ARCHITECTURES["llama"], batch=fails)
    monkeypatch.setitem(module.ARCHITECTURES, "llama", broken)
    assert run(module, monkeypatch, "--only", "llama", "--json", str(out)) == 1
    assert {row["error"] for row in json.loads(out.read_text())["rows"]} == {"RuntimeError: no batch today"}


def test_an_unknown_architecture_is_named(load, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(load("architectures"), monkeypatch, "--only", "lama")
    assert ended.value.code == 2
    assert "unknown architecture lama" in capsys.readouterr().err


def test_architectures_are_many_and_of_every_kind(load):
    architectures = load("zoo").ARCHITECTURES
    kinds = {architecture.kind for architecture in architectures.values()}
    assert len(architectures) >= 44
    assert kinds >= {"vision-language", "audio", "mixture of experts", "hybrid", "encoder-decoder", "two towers"}


def test_living_sees_what_hooks_do_not(load):
    """A tensor that an attribute holds is saved by no node of autograd."""
    outside = load("outside")
    x, held = torch.randn(8, 8, requires_grad=True), []
    with outside.Living([x]) as living, outside.saved([x]) as hooks:
        y = x.exp()
        held.append(x.detach() + 1)
        loss = y.sum()
    assert hooks.bytes == 8 * 8 * 4
    assert living.bytes(without=[loss]) == 2 * 8 * 8 * 4
    held.clear()
    assert living.bytes(without=[loss]) == 8 * 8 * 4


def test_what_a_module_alone_saves_is_told_from_what_others_save_too(load):
    outside = load("outside")
    x, running = torch.randn(8, 8, requires_grad=True), [""]
    with outside.saved([x], running) as hooks:
        y = x * 1
        for name in ("first", "second"):
            running.append(name)
            y.sin().sum()  # both save y
            if name == "second":
                y.exp()  # and this one its own output
            running.pop()
    size = 8 * 8 * 4
    assert hooks.of("first") == (0, size)
    assert hooks.of("second") == (size, 2 * size)


def test_faults_are_told(load):
    faults = load("faults").faults
    nothing = ("largest_error", "whole_error", "alive_at_once", "alive", "batch_alive_at_once", "bytes_alive")
    good = dict.fromkeys(nothing, 0) | dict(error="", setting="plain", none_differs=[], parameters=5)
    good |= dict(live_bytes=1000, kept_bytes=1000)
    lean = good | dict(setting="lean", live_bytes=500, kept_bytes=500, promise_broken={})
    assert faults(lean, good, None) == []
    for change, word in (
        (dict(error="ValueError: no"), "ValueError"),
        (dict(kept_bytes=400), "track_kept says 400"),
        (dict(live_bytes=1100, kept_bytes=1100), "more than plain's"),
        (dict(promise_broken={"norm": (0, 96, 128)}), "norm: 0, kept 96 to 128"),
        (dict(setting="exact", largest_error=0.1), "in 32 bits"),
        (dict(none_differs=["bias"]), "None differs: bias"),
        (dict(alive_at_once=5), "5 of 5 parameters alive before"),
        (dict(alive=5), "5 of 5 parameters alive after"),
        (dict(bytes_alive=64), "bytes alive: 64"),
    ):
        assert any(word in fault for fault in faults(lean | change, good, None)), change
    assert "without an example 600 bytes" in faults(lean, good, lean | dict(live_bytes=600))[0]


# --- transformers' own tests -------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.part = Part(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.linear(self.part.norm(x))


class Part(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)


def test_models_are_compressed_when_they_are_put_in_training_mode(load):
    plugin, original = load("compressed_training"), nn.Module.train
    toy, called, other, empty = Toy(), Toy(), Part(64), Toy()
    empty.part = nn.Identity()
    with plugin.compressed_when_trained(Toy) as compressed:
        toy.eval(), toy.part.train(), other.train(), empty.train()
        assert compressed == [] and not isinstance(toy.part.linear, Compressed)
        assert toy.train() is toy and toy.part.training
        assert compressed == ["Toy"] and isinstance(toy.part.linear, Compressed)
        toy.eval(), toy.train()
        assert compressed == ["Toy"]
        called.eval()(torch.zeros(2, 64))
        assert compressed == ["Toy"]
        called.training = True  # as one is that was made so
        called(torch.zeros(2, 64)).sum().backward()
        assert compressed == ["Toy", "Toy"]
    assert nn.Module.train is original and "__call__" not in vars(Toy) and not isinstance(other.linear, Compressed)


def test_what_prac_breaks_is_named(load, monkeypatch, tmp_path, capsys):
    """A folder with a test that passes both ways, one that fails both ways, and one that fails with prac alone."""
    folder = tmp_path / "tests" / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "test_modeling_toy.py").write_text(
        "from transformers import LlamaConfig, LlamaModel\n"
        "def model():\n"
        "    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "    return LlamaModel(LlamaConfig(vocab_size=9, **sizes)).train()\n"
        "def test_passes(): assert model().training\n"
        "def test_fails(): assert not model().training\n"
        "def test_breaks(): assert type(model().norm).__name__ == 'LlamaRMSNorm'\n"
    )
    (tmp_path / "setup.py").write_text('setup(\n    name="transformers",\n    version="5.99.0",\n)\n')
    module, out = load("transformers_tests"), tmp_path / "rows.json"
    assert run(module, monkeypatch, "--source", str(tmp_path), "--models", "toy", "--json", str(out)) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["plain"] == {"passed": 2, "failed": 1, "skipped": 0}
    assert row["prac"] == {"passed": 1, "failed": 2, "skipped": 0}
    assert row["with_compressed_models"] == 3 and row["tests_of_transformers"] == "5.99.0"
    ((name, error),) = row["broken"].items()
    assert name.endswith("::test_breaks") and "assert 'PracLlamaRMSNorm' == 'LlamaRMSNorm'" in error
    assert "test_breaks" in capsys.readouterr().out


def test_what_was_not_reached_is_counted(load):
    module = load("transformers_tests")
    line = {"outcome": "passed", "compressed": 0, "error": ""}
    row = module.compared("toy", ({"a": line, "b": line}, ""), ({"a": line | {"compressed": 1}}, "stopped after 9 s"))
    assert row["not_reached"] == ["b"] and row["broken"] == {}
    assert row["stopped_with_prac"] == "stopped after 9 s"


def test_a_folder_without_tests_is_refused(load, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(load("transformers_tests"), monkeypatch, "--source", str(tmp_path), "--models", "toy")
    assert ended.value.code == 2
    assert "--source must be a checkout" in capsys.readouterr().err
