"""`benchmarks/gpu`: every stage at toy size, resuming, rows that fail, a bare machine, what is committed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER, RESULTS = ROOT / "benchmarks" / "gpu", ROOT / "benchmarks" / "results" / "gpu"
OURS = ("block", "loss", "models", "pretraining", "rows", "run", "shapes", "show", "stall", "suite", "training")
STAGES = ("tests", "block", "block4096", "models", "loss", "rates", "pretraining", "stall")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of the folder by name; none stays behind, and those of the tests that have its name come back."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = {name: sys.modules.pop(name) for name in OURS if name in sys.modules}
    yield importlib.import_module
    for name in OURS:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def run(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls the script in this process, on toys in a folder."""

    def call(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "--toy", "--out", str(tmp_path), *argv])
        return load("run").main()

    return call


def script(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Calls the script as people do."""
    command = [sys.executable, str(FOLDER / "run.py"), *argv]
    path = os.pathsep.join(filter(None, (env.pop("front", ""), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=300
    )


def rows(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The rows of a file by name; of the stage `models`, those of its first model."""
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads((folder / f"{stage}.json").read_text())["rows"]:
        found.setdefault(row["name"], row)
    return found


# --- all of it ---------------------------------------------------------------------------------------


def test_every_stage_at_toy_size(run: Any, tmp_path: Path, capfd: Any) -> None:
    """One test: several would be several runs where two processes share the tests."""
    folder = tmp_path
    ended = script("--toy", "--out", str(folder))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{stage}.json" for stage in STAGES)
    for stage in STAGES:
        for row in json.loads((folder / f"{stage}.json").read_text())["rows"]:
            assert row["device"] and row["torch"] == torch.__version__
            assert row["made_by"] == f"python benchmarks/gpu/run.py --stage {stage} --toy"
            left = "compile" in row["name"] or row["name"].startswith("liger")
            assert row["outcome"] == ("left out" if left else "measured"), row
            assert bool(row["reason"]) == left
    (tests,) = rows(folder, "tests").values()
    assert tests["failed"] == [] and tests["passed"] + tests["skipped"] > 20
    check_block(folder, "block")
    check_block(folder, "block4096")
    check_models(folder)
    check_losses(folder)
    check_pretraining(folder)
    check_stall(folder)

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    capfd.readouterr()
    assert run() == 0
    said = capfd.readouterr().out
    assert "measured in" not in said and all(f"{stage}.json" in said for stage in STAGES)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def check_block(folder: Path, stage: str) -> None:
    found = {name: row for name, row in rows(folder, stage).items() if row["outcome"] == "measured"}
    assert {"plain", "checkpoint", "selective", "paper", "lean", "fast", "small", "lean+attention8"} == set(found)
    assert found["plain"]["time_ratio"] == 1 and found["checkpoint"]["kept_units"] == 1
    kept = [found[name]["kept_units"] for name in ("plain", "lean", "lean+attention8", "small")]
    assert kept == sorted(kept, reverse=True)
    for name, row in found.items():
        low, high = row["time_spread"]
        assert low <= row["time_ratio"] <= high and row["plain_ms"] > 0
        assert (row["weight_grad_error"] > 0.01) == (name not in ("plain", "checkpoint", "selective"))


def check_models(folder: Path) -> None:
    found = [row for row in json.loads((folder / "models.json").read_text())["rows"] if row["outcome"] == "measured"]
    assert len({row["setting"]["model"] for row in found}) == 2 and len(found) == 14
    for row in found:
        assert row["loss"] < row["first_loss"] and row["ms"] > 0 and row["first_s"] > 0
        assert row["peak_gib"] > row["held_gib"] > 0
    first = rows(folder, "models")
    held = [first[name]["held_gib"] for name in ("plain", "plain, no logits", "lean", "small")]
    assert held == sorted(held, reverse=True)


def check_losses(folder: Path) -> None:
    found = rows(folder, "loss")
    assert list(found) == ["plain 0", "lean 0", "small 0", "paper 0"]
    for row in found.values():
        (at, early), (end, late) = row["validation"]
        assert (at, end) == (10, 20) and late < early < 6
        assert abs(late - found["plain 0"]["validation"][1][1]) < 0.05
    assert len({row["validation"][1][1] for row in found.values()}) == 4, "each method trained in its own way"


def check_pretraining(folder: Path) -> None:
    found = rows(folder, "pretraining")
    assert [name.removesuffix(" 0") for name in found][:4] == ["plain", "paper", "paper-as-printed", "lean"]
    assert {"pac 0", "rac 0", "rso 0", "galore 0"} <= set(found)
    for name, row in found.items():
        (_, early), (_, late) = row["validation"]
        assert late < early < 6, name
        keeps_subspaces = name.startswith(("p", "rac", "rso")) and name != "plain 0"
        assert (row.get("refreshes", 0) > 0) == keeps_subspaces and (row.get("refresh_s", 0) > 0) == keeps_subspaces
    assert found["paper 0"]["refreshes"] > found["paper-as-printed 0"]["refreshes"]
    assert {name.partition(" ")[0] for name in rows(folder, "rates")} == {name.partition(" ")[0] for name in found}


def check_stall(folder: Path) -> None:
    found = rows(folder, "stall")
    assert {"plain 0", "as printed 0", "paper 0"} <= set(found)
    configs = [json.dumps(row["setting"]["config"]) for row in found.values()]
    assert len(set(configs)) >= len(configs) - 3, "all but those that change the code are configs of their own"
    for name, row in found.items():
        first, last = row["norms"]
        assert len(first) == len(last) == 5, name  # two of each of two blocks, and the last
        assert all(rms > 0 for rms, _ in last.values())
        missed = [share for _, share in last.values() if share is not None]
        without = name in ("plain 0", "lean 0", "loract 0") or ("alone" in name and "norms" not in name)
        assert bool(missed) != without, name
        assert all(0 <= share < 1 for share in missed)


# --- one by one --------------------------------------------------------------------------------------


def test_what_is_there_is_measured_again_when_asked(run: Any, tmp_path: Path, capfd: Any) -> None:
    asked = ("--stage", "block", "--only", "plain", "checkpoint")
    assert run(*asked) == 0
    first = rows(tmp_path, "block")
    # Of another machine, and of another version: others' rows stay, and are no reason to measure nothing.
    document = json.loads((tmp_path / "block.json").read_text())
    document["rows"] += [row | {"device": "another"} for row in document["rows"]]
    document["rows"][0]["torch"] = "1.0"
    (tmp_path / "block.json").write_text(json.dumps(document))
    capfd.readouterr()
    assert run(*asked) == 0
    said = capfd.readouterr().out
    assert "plain: measured in" in said and "checkpoint: measured in" not in said
    assert run(*asked, "--again") == 0
    found = json.loads((tmp_path / "block.json").read_text())["rows"]
    assert [(row["name"], row["torch"] == "1.0", row["device"] == "another") for row in found] == [
        ("plain", True, False), ("checkpoint", False, False), ("plain", False, True), ("checkpoint", False, True),
        ("plain", False, False),
    ]  # fmt: skip
    assert (
        found[1]["time_ms"] != first["checkpoint"]["time_ms"] and found[3]["time_ms"] == document["rows"][3]["time_ms"]
    )


LIGER = """
from transformers.models.llama import modeling_llama

def apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=True):
    {does}

class Norm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return 1.01 * super().forward(x)

def norm():
    modeling_llama.LlamaRMSNorm = Norm

def rotary():
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, *more, **others: (q, k)
"""


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Liger of ours, which does as it is told."""
    folder = tmp_path / "somewhere"
    package = folder / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda does: (package / "transformers.py").write_text(LIGER.format(does=does))


def test_a_row_that_fails_is_a_row(run: Any, liger: Any, tmp_path: Path, capfd: Any) -> None:
    """By an error, by the end of its process, for want of memory: the others are measured all the same."""
    asked = ("--stage", "block", "--only", "liger", "plain")
    liger("raise RuntimeError('no kernel today')")
    assert run(*asked) == 1
    found = rows(tmp_path, "block")
    assert (found["liger"]["outcome"], found["liger"]["reason"]) == ("failed", "RuntimeError: liger: no kernel today")
    assert found["plain"]["outcome"] == "measured" and found["liger"]["made_by"]
    assert "liger: failed in" in capfd.readouterr().out
    assert run(*asked) == 1, "it is there, and it failed"
    liger("import os; os._exit(9)")
    assert run(*asked, "--again", "failed") == 1
    assert rows(tmp_path, "block")["liger"]["reason"] == "its process ended with 9"
    liger("import torch; raise torch.OutOfMemoryError('all 80 GiB are taken')")
    assert run(*asked, "--again", "failed") == 0, "what does not fit was to be found out"
    memory = rows(tmp_path, "block")["liger"]
    assert (memory["outcome"], memory["reason"]) == ("out of memory", "liger: all 80 GiB are taken")
    assert rows(tmp_path, "block")["plain"] == found["plain"]


@pytest.mark.parametrize("part", ["norm", "rotary"])
def test_liger_is_in_its_own_block_alone(run: Any, liger: Any, tmp_path: Path, part: str) -> None:
    """A part of this Liger computes something else: who runs it has other gradients, where it is recomputed too."""
    liger(f"{part}()")
    names = ("liger", "liger+checkpoint", "liger+lean", "checkpoint")
    assert run("--stage", "block", "--only", *names) == 0
    found = rows(tmp_path, "block")
    assert found["checkpoint"]["weight_grad_error"] == 0
    assert found["liger"]["weight_grad_error"] > 1e-3
    assert found["liger+checkpoint"]["weight_grad_error"] == pytest.approx(found["liger"]["weight_grad_error"])
    assert found["liger+checkpoint"]["kept_units"] == 1
    assert 1 < found["liger+lean"]["kept_units"] < found["liger"]["kept_units"]


def test_liger_is_in_its_own_models_alone(run: Any, liger: Any, tmp_path: Path) -> None:
    liger("norm()")
    assert run("--stage", "models", "--only", "liger", "liger+checkpoint", "checkpoint") == 0
    models = rows(tmp_path, "models")
    assert models["liger"]["first_loss"] == pytest.approx(models["liger+checkpoint"]["first_loss"])
    assert abs(models["liger"]["first_loss"] - models["checkpoint"]["first_loss"]) > 1e-5


def test_llama_is_as_before_without_liger(load: Any, liger: Any) -> None:
    """Else plain training, timed in turn with Liger's block, would be half Liger's."""
    from transformers.models.llama import modeling_llama

    liger("norm(); rotary()")
    before = dict(vars(modeling_llama))
    try:
        with pytest.raises(RuntimeError, match="on its way"), load("block").ligers_llama():
            assert modeling_llama.LlamaRMSNorm is not before["LlamaRMSNorm"]
            assert modeling_llama.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
            raise RuntimeError("on its way")
        assert dict(vars(modeling_llama)) == before
    finally:
        vars(modeling_llama).update(before)
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            del sys.modules[name]


def test_a_limit_leaves_rows_for_the_next_call(run: Any, tmp_path: Path, capfd: Any) -> None:
    asked = ("--stage", "block", "--only", "plain", "checkpoint", "--limit-s", "25")
    assert run(*asked) == 3  # a row is estimated at 30 s, and the first one begins in any case
    assert list(rows(tmp_path, "block")) == ["plain"]
    assert "1 rows of block are left" in capfd.readouterr().out
    assert run(*asked) == 0
    assert list(rows(tmp_path, "block")) == ["plain", "checkpoint"]


def test_a_row_that_does_not_end_is_stopped(run: Any, liger: Any, tmp_path: Path) -> None:
    liger("import time; time.sleep(600)")
    assert run("--stage", "block", "--only", "liger", "--limit-s", "3") == 1
    row = rows(tmp_path, "block")["liger"]
    assert row["outcome"] == "stopped" and "not over after 3 s" in row["reason"] and row["wall_s"] < 60


def test_tokens_of_a_file(run: Any, load: Any, tmp_path: Path, capsys: Any) -> None:
    torch.save(torch.arange(4000) % 70, tmp_path / "few.pt")
    assert run("--stage", "loss", "--only", "plain", "--tokens", str(tmp_path / "few.pt")) == 0
    (row,) = rows(tmp_path, "loss").values()
    assert (row["setting"]["text"], row["setting"]["tokens"], row["setting"]["vocab_size"]) == ("few.pt", 4000, 128)
    torch.save(torch.rand(4000), tmp_path / "bad.pt")
    torch.save(torch.arange(40), tmp_path / "short.pt")
    for name, said in (("bad.pt", "no whole numbers"), ("short.pt", "40 tokens"), ("no.txt", ".npy file")):
        with pytest.raises(SystemExit) as ended:
            run("--stage", "loss", "--tokens", str(tmp_path / name))
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_bad_input_is_refused(run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tests.json").write_text("[]")
    for argv, said in (
        (["--limit-s", "0"], "--limit-s must be above 0, got 0"),
        (["--only", "leen"], "--only 'leen': there is no such row"),
        (["--stage", "tests"], "tests.json has no rows of benchmarks/gpu"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*argv)
        assert ended.value.code == 2 and said in capsys.readouterr().err


# --- machines ------------------------------------------------------------------------------------------


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
