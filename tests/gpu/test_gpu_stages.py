"""`benchmarks/gpu`: every stage at toy size, resuming, limits, tokens, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_scripts import STAGES, rows, script

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


def test_a_limit_leaves_rows_for_the_next_call(run: Any, tmp_path: Path, capfd: Any) -> None:
    asked = ("--stage", "block", "--only", "plain", "checkpoint", "--limit-s", "25")
    assert run(*asked) == 3  # a row is estimated at 30 s, and the first one begins in any case
    assert list(rows(tmp_path, "block")) == ["plain"]
    assert "1 rows of block are left" in capfd.readouterr().out
    assert run(*asked) == 0
    assert list(rows(tmp_path, "block")) == ["plain", "checkpoint"]


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
