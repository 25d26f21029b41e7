"""The logic of `benchmarks/paper`: options, the power law, what a claim amounts to, the summary. Nothing is trained."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from prac.config import Rank
from prac.lab.report import results
from prac.monitoring.readings import LayerStats, Reading

FOLDER = Path(__file__).parent.parent / "benchmarks" / "paper"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("claims", "common"))


@pytest.fixture
def load(monkeypatch):
    """A module of the folder by name; none stays behind."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in (*SCRIPTS, "claims", "common"):
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        load(script).main()
    assert ended.value.code == 0
    assert f"python benchmarks/paper/{script}.py" in capsys.readouterr().out


def test_every_script_is_in_the_summary(load):
    assert sorted(it.name for it in load("summary").EXPERIMENTS) == [name for name in SCRIPTS if name != "summary"]


def test_unknown_options_are_for_prac_train(load, monkeypatch):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["script.py", "--steps", "7", "--seeds", "1", "2", "--bf16", "--lr", "1e-3"])
    arguments = common.parse(common.trainer("what it does", methods=["plain", "paper"]))
    assert arguments.more == ["--bf16", "--lr", "1e-3"]
    jobs = common.jobs(arguments, {"plain": ["--method", "plain"]})
    assert list(jobs) == ["plain-seed1", "plain-seed2"]
    assert jobs["plain-seed2"][-2:] == ["--seed", "2"]
    assert {"--bf16", "7"} <= set(jobs["plain-seed1"])


def test_a_failed_run_is_left_out_and_the_rest_comes_through(load, monkeypatch, tmp_path, capsys):
    common = load("common")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(common.several.children, "launch", lambda argv, threads: int("bad" in argv))
    monkeypatch.setattr(common.several.page, "read_run", lambda folder: {"row": {"val_loss": 1.0}, "folder": folder})
    found = common.train({"a-seed0": ["bad"], "b-seed0": ["good"], "b-seed1": ["good"]}, tmp_path, 2)
    assert list(found) == ["b-seed0", "b-seed1"]
    assert "a-seed0: failed and is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run came through"):
        common.train({"a-seed0": ["bad"]}, tmp_path, 1)


def test_noise_is_the_last_reading_of_linear_layers(load):
    found = [("linear", 0.2), ("linear", 0.4), ("linear", None), ("norm", 9.0), ("-", 7.0)]
    early, last = (
        Reading(step, 0, 0, tuple(LayerStats("", kind, "", 0, 0, None, value) for kind, value in layers))
        for step, layers in ((1, [("linear", 5.0)]), (2, found))
    )
    runs = {"lean-seed0": {"row": {}, "layers": [early, last]}, "plain-seed0": {"row": {}, "layers": []}}
    lean, plain = load("common").rows_of(runs)
    assert lean == {"setting": "lean", "gradient_variance": pytest.approx(0.3)}
    assert plain == {"setting": "plain", "gradient_variance": None}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([-0.10, -0.11, -0.12], "confirmed"),
        ([0.10, 0.11, 0.12], "not confirmed"),
        ([-0.10, 0.05, -0.12], "within the spread"),
        ([-0.10], "within the spread"),
    ],
)
def test_verdict_of_a_difference(gaps, verdict, load):
    claims = load("claims")
    claim = claims.Claim("ours below theirs", claims.Gap.of(gaps))
    assert claim.verdict == verdict
    said = claims.sentence([claim])
    assert said.startswith(f"{verdict.capitalize()}: ours below theirs ({gaps and sum(gaps) / len(gaps):+.3f}")
    assert ("one seed" in said) == (len(gaps) == 1)
    assert ("±" in said) == (len(gaps) > 1)


def test_verdict_against_a_bound(load):
    claims = load("claims")
    gap = claims.Gap.between({0: 5.02, 1: 5.12, 2: 9.0}, {0: 5.0, 1: 5.1, 3: 1.0})  # two seeds in common
    assert gap.mean == pytest.approx(0.02)
    assert claims.Claim("", gap, 0.03).verdict == "confirmed"
    assert claims.Claim("", gap, 0.01).verdict == "not confirmed"
    assert claims.Gap.between({0: 1.0}, {1: 1.0}) is None
    assert claims.Claim("", claims.Gap.exact(1.0), 1.0).verdict == "not confirmed"


def test_students_interval(load):
    """The textbook's: 1, 2, 3 has the mean 2 ± 4.303 / √3."""
    gap = load("claims").Gap.of([1.0, 2.0, 3.0])
    assert (gap.mean, gap.spread) == (2.0, 1.0)
    assert gap.half == pytest.approx(4.303 / math.sqrt(3))
    assert results.t95(30) == pytest.approx(2.042, abs=0.01)
    assert results.t95(0) == math.inf


def test_sentence_of_several_claims(load):
    claims = load("claims")
    yes, no = (claims.Claim(name, claims.Gap.exact(value)) for name, value in (("a", -1.0), ("b", 1.0)))
    missing = claims.below("c", {"paper": {0: 1.0}}, "paper", "rso")
    assert claims.sentence([yes, yes]).startswith("Confirmed: a")
    assert claims.sentence([yes, no, missing]).startswith("Confirmed in 1 of 3 parts: a")
    assert claims.sentence([no, missing]).startswith("Not confirmed: b")
    assert "c (not measured)" in claims.sentence([missing])


def test_power_law_recovers_exponent_and_error(load):
    """Of 500 fits to noisy data, some 95% have the true exponent in their interval, and the error is the spread."""
    figure4 = load("figure4")
    sizes = [2e5, 5e5, 1e6, 2e6] * 3
    exact = figure4.fit(sizes, [12.0 * n**-0.07 for n in sizes])
    assert (exact.a, exact.b, exact.freedom) == (pytest.approx(12.0), pytest.approx(0.07), 10)
    assert exact.error < 1e-8
    generator = torch.Generator().manual_seed(0)
    fits = []
    for _ in range(500):
        noise = (0.02 * torch.randn(len(sizes), generator=generator)).exp().tolist()
        fits.append(figure4.fit(sizes, [12.0 * n**-0.07 * z for n, z in zip(sizes, noise, strict=True)]))
    slopes = torch.tensor([law.b for law in fits])
    assert slopes.mean().item() == pytest.approx(0.07, abs=4 * slopes.std().item() / 500**0.5)
    assert sum(law.error for law in fits) / 500 == pytest.approx(slopes.std().item(), rel=0.15)
    covered = sum(abs(law.b - 0.07) <= law.gap().half for law in fits) / 500
    assert 0.92 <= covered <= 0.98
    assert figure4.fit([1.0, 2.0], [2.0, 1.0]).error == math.inf
    with pytest.raises(ValueError, match="two sizes, got 1"):
        figure4.fit([1e6, 1e6], [3.0, 3.1])


def test_monte_carlo_finds_bias_where_there_is_some(load):
    """PAC's bias is its tail; PRAC's interval holds zero, and both variances are those of the theorems."""
    table1 = load("table1")
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (20, 7))
    pac, prac = (table1.monte_carlo(x, dy, rank, 400) for rank in (Rank(12, 0), Rank(6, 6)))
    for what in ("x", "dw"):
        assert pac[what]["squared_bias"]["mean"] == pytest.approx(pac[what]["squared_bias_theory"])
        gap = prac[what]["squared_bias"]
        assert abs(gap["mean"]) <= 1.5 * gap["half"]
        assert prac[what]["variance"]["mean"] == pytest.approx(prac[what]["variance_theory"], rel=0.1)


def test_summary_reads_what_was_saved(load, tmp_path, capsys):
    common, summary, claims = load("common"), load("summary"), load("claims")
    said = [claims.Claim("a below b", claims.Gap.exact(-1.0))]
    common.save(
        "figure3", tmp_path, [], paper="theirs | here", ours="1.0", claims=said, table=common.table("title", "x")
    )
    assert json.loads((tmp_path / "figure3.json").read_text())["claims"][0]["verdict"] == "confirmed"
    assert "Confirmed: a below b (-1.000: confirmed)." in capsys.readouterr().out
    made = summary.table(tmp_path, tmp_path)
    (line,) = [line for line in made.splitlines() if "Figure 3" in line]
    assert "theirs \\| here | 1.0 | Confirmed: a below b" in line
    assert "[JSON](figure3.json)" in line
    assert made.count("not run yet") == len(summary.EXPERIMENTS) - 1
    page = f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n"
    again = summary.rewritten(page, made)
    assert again == f"before\n{summary.BEGIN}\n{made}\n{summary.END}\nafter\n"
    assert summary.rewritten(again, made) == again
    with pytest.raises(ValueError, match="needs the lines"):
        summary.rewritten("nothing", made)


def test_the_readme_has_a_place_for_the_table(load):
    summary = load("summary")
    assert summary.rewritten(summary.README.read_text(), "x")
