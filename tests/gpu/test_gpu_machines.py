"""`benchmarks/gpu` without a GPU, on a bare machine; and what is committed of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_scripts import RESULTS, STAGES, rows, script


def test_without_a_gpu_one_line_says_so(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out")])
    assert load("run").main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no CUDA GPU" in err and "--toy" in err
    assert not (tmp_path / "out").exists()


def blocked(folder: Path, *names: str) -> str:
    """A folder that, in front of all others, makes Python find none of these modules, in every process."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n")
    return str(folder)


BARE = ("rich", "matplotlib", "datasets", "accelerate", "liger_kernel", "pytest")


def test_on_a_bare_machine(tmp_path: Path) -> None:
    front = blocked(tmp_path, *BARE)
    out = tmp_path / "out"
    asked = ("--toy", "--stage", "tests", "block", "--only", "plain", "lean", "liger", "tests/test_cuda.py")
    ended = script(*asked, "--out", str(out), front=front)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "left out, pytest is not installed" in ended.stdout and "left out, liger_kernel is not" in ended.stdout
    assert {name: row["outcome"] for name, row in rows(out, "block").items()} == {
        "plain": "measured", "lean": "measured", "liger": "left out"
    }  # fmt: skip
    assert json.loads((out / "block.json").read_text())["versions"]["torch"] != "none"


def test_help_needs_nothing_at_all(tmp_path: Path) -> None:
    """Not even what transformers cannot do without."""
    front = blocked(tmp_path, *BARE, "torch", "transformers", "safetensors", "numpy")
    ended = script("--help", front=front)
    assert ended.returncode == 0 and "python benchmarks/gpu/run.py --stage block" in ended.stdout
    ended = script("--toy", front=front)
    assert ended.returncode == 2 and "no torch, transformers here" in ended.stderr


# --- what is committed ----------------------------------------------------------------------------------


def test_committed_results(load: Any) -> None:
    outcomes = load("rows").OUTCOMES
    files = sorted(RESULTS.glob("*.json"))
    assert {path.stem for path in files} >= {"block", "block4096", "models", "loss", "pretraining", "stall"}
    for path in files:
        assert path.stem in STAGES
        for row in json.loads(path.read_text())["rows"]:
            assert row["device"] and row["torch"] and row["made_by"] and row["name"], row
            assert row["outcome"] in outcomes and bool(row["reason"]) == (row["outcome"] != "measured"), row


def test_committed_rows_are_those_that_would_be_measured(load: Any) -> None:
    """The same words for the same things, and no row that another one hides."""
    for stage in (stage for stage in STAGES[1:] if (RESULTS / f"{stage}.json").exists()):
        jobs = load("run").planned(load("run").parser().parse_args(["--stage", stage]))[stage]
        settings = [json.dumps(job.setting, sort_keys=True) for job in jobs]
        assert len(set(settings)) == len(jobs)
        committed = json.loads((RESULTS / f"{stage}.json").read_text())["rows"]
        assert {tuple(sorted(row["setting"])) for row in committed} == {tuple(sorted(jobs[0].setting))}
        if load("run").STAGES[stage] in ("block", "models"):  # what is trained has another text there
            there = {json.dumps(row["setting"], sort_keys=True) for row in committed}
            assert len(there & set(settings)) >= 8


def test_they_are_printed(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["show.py"])
    assert load("show").main() == 0
    said = capsys.readouterr().out
    for cell in ("NVIDIA H100 80GB HBM3", "19.05", "20.15", "304.3", "3.390", "failed: DataDependentOutputException"):
        assert cell in said
    monkeypatch.setattr(sys, "argv", ["show.py", "nothing.json"])
    with pytest.raises(SystemExit) as ended:
        load("show").main()
    assert ended.value.code == 2 and "nothing.json" in capsys.readouterr().err
