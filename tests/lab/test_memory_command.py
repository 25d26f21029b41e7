"""`prac memory` on the command line."""

import json
from pathlib import Path

import pytest
import torch

from prac.lab.commands.main import main
from prac.lab.materials import models
from prac.lab.measured import footprint
from prac.memory import predict

SMALL = ["memory", "--model", "llama-tiny", "--micro-batch", "8", "--seq-len", "64"]


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    methods = ["plain", "checkpoint", "selective", "galore", "paper", "lean+attention8"]
    assert main([*SMALL, "--methods", *methods, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)
    document = json.loads(out.read_text())
    rows = {(row["method"], row["loss"]): row for row in document["rows"]}
    assert set(rows) == {(method, loss) for method in methods for loss in ("plain", "chunked")}
    plain = rows["plain", "plain"]
    for (_, loss), row in rows.items():
        assert row["reduction"] == pytest.approx(1 - row["peak_gib"] / plain["peak_gib"])
        assert sum(row["at_peak"].values()) == pytest.approx(row["peak_gib"] * 2**30)
        assert row["activation_gib"] <= plain["activation_gib"]
        assert loss == "plain" or row["peak_gib"] < rows[row["method"], "plain"]["peak_gib"]
    assert rows["galore", "plain"]["at_peak"]["optimizer"] < plain["at_peak"]["optimizer"]
    assert rows["checkpoint", "plain"]["activation_gib"] < rows["selective", "plain"]["activation_gib"]
    assert document["setting"]["command"].startswith("prac memory")
    assert plot.read_text().startswith("<") and "lean+attention8" in plot.read_text()
    assert main([*SMALL, "--json", str(out)]) == 2  # it exists


SHORT = ["memory", "--model", "llama-tiny", "--micro-batch", "1", "--seq-len", "16", "--loss", "plain"]


def test_a_row_that_refuses_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen tokens cannot span the paper's subspaces."""
    out, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    assert main([*SHORT, "--methods", "plain", "paper", "lean", "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    line, reason = [line for line in printed.splitlines() if line.strip().startswith("paper")]
    assert line.count("–") == 3
    assert reason.startswith("paper: model.layers.0") and "16 tokens cannot span" in reason
    plain, paper, lean = json.loads(out.read_text())["rows"]
    assert "cannot span" in paper["why_not"] and paper["peak_gib"] is None and paper["reduction"] is None
    assert (plain["why_not"], lean["why_not"]) == ("", "") and lean["peak_gib"] > 0
    assert "lean" in plot.read_text() and "paper" not in plot.read_text()


def test_without_the_first_row_there_is_nothing_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--methods", "paper", "plain"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("plain")]
    assert line.count("–") == 1
    assert main([*SHORT, "--methods", "paper", "pac"]) == 2  # none worked
    assert "cannot span" in capsys.readouterr().err


def test_what_is_small_is_shown_in_mib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--methods", "plain"]) == 0
    printed = capsys.readouterr().out
    assert "MiB" in printed and "0.00" not in printed and "0.0 " not in printed


def test_a_row_is_what_the_library_predicts() -> None:
    setting = footprint.Setting("gpt2-124m", 2, 64, "amp")
    (row,) = footprint.rows(setting, ["lean"], ["plain"])
    model = models.without_weights("gpt2-124m", 64, torch.float32)
    model.config.use_cache = False
    ids = torch.empty(2, 64, dtype=torch.long, device="meta")
    found = predict(model, {"input_ids": ids, "labels": ids}, "lean", autocast=torch.bfloat16)
    assert row.peak_gib == found.peak / 2**30
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.01)


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2.0), ("adam-mini", 1.0), ("muon", 1.0)])
def test_states_of_optimizers(optimizer: str, states: float) -> None:
    setting = footprint.Setting("llama-tiny", 1, 16, "fp32")
    (row,) = footprint.rows(setting, ["plain"], ["chunked"], [optimizer])
    model = models.without_weights("llama-tiny", 16, torch.float32)
    head = 2 * model.get_output_embeddings().weight.numel()  # embedding and head
    inside = sum(p.numel() for p in model.parameters()) - head
    least = states * inside + (2 if optimizer != "adam-mini" else 1) * head
    assert row.at_peak["optimizer"] / 4 == pytest.approx(least, rel=0.01)


@pytest.mark.long
def test_every_method_has_its_memory() -> None:
    """What each saves, and what it does not touch."""
    setting = footprint.Setting("llama-tiny", 64, 128, "bf16")
    names = ["plain", "checkpoint", "checkpoint2", "offload", "galore", "rso", "compact", "co-compression", "loract"]
    names += ["paper+muon", "lean+checkpoint2", "loract+lora"]
    rows = {row.method: row for row in footprint.rows(setting, names, ["chunked"])}
    plain = rows["plain"]
    assert rows["checkpoint"].activation_gib < rows["checkpoint2"].activation_gib < plain.activation_gib
    assert rows["offload"].activation_gib < 1e-6 * plain.activation_gib
    assert rows["galore"].activation_gib == plain.activation_gib
    for name in ("rso", "compact", "co-compression", "loract"):
        assert rows[name].activation_gib < plain.activation_gib
    # Both moments of the blocks' matrices at a quarter of their width, those of the embedding and head in full.
    inside = 4 * (4 * 192 * 192 + 3 * 192 * 512)
    for name in ("rso", "compact"):
        saved = plain.at_peak["optimizer"] - rows[name].at_peak["optimizer"]
        assert saved == pytest.approx(0.75 * inside * 2 * 2, rel=0.01)
    assert rows["co-compression"].at_peak["optimizer"] == plain.at_peak["optimizer"]
    assert rows["paper+muon"].at_peak["optimizer"] < plain.at_peak["optimizer"]
    assert rows["loract+lora"].at_peak["optimizer"] < 0.1 * plain.at_peak["optimizer"]
    assert rows["lean+checkpoint2"].peak_gib < plain.peak_gib


def test_predicted_as_measured_with_gradients_in_factors() -> None:
    """The tracker follows the factors: what is predicted is what a real step keeps."""
    import prac
    from prac.memory import track_kept

    setting = footprint.Setting("llama-tiny", 4, 64, "fp32")
    (row,) = footprint.rows(setting, ["compact"], ["plain"])
    model = models.without_weights("llama-tiny", 64, torch.float32).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    prac.compress(model.train(), "compact")
    ids = torch.randint(1000, (4, 64))
    with track_kept(model, {"ids": ids}) as kept:
        model(input_ids=ids, labels=ids, use_cache=False)
    assert row.activation_gib * 2**30 == pytest.approx(kept.total, rel=0.02)


@pytest.mark.parametrize(
    ("model", "method", "loss", "published", "off"),
    [
        ("llama-130m", "plain", "half", 21.26, 0.05),
        ("llama-130m", "paper", "half", 15.65, 0.05),
        ("llama-130m", "galore", "half", 21.08, 0.05),
        ("gpt2-355m", "plain", "plain", 55.94, 0.05),
        ("gpt2-355m", "paper", "plain", 44.21, 0.07),
    ],
)
def test_table_2(model: str, method: str, loss: str, published: float, off: float) -> None:
    """As the paper trained; all of it is in benchmarks/paper/table2.py."""
    batch, length, dtype = (128, 256, "bf16") if model.startswith("llama") else (32, 1024, "amp")
    setting = footprint.Setting(model, batch, length, dtype)
    found = footprint.one(setting, method, loss, "galore" if method == "galore" else "adamw")
    assert found.peak / 1e9 == pytest.approx(published, rel=off)


def test_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, methods = footprint.Setting("llama-tiny", 2, 16, "bf16"), ["plain", "lean", "galore"]
    expected = footprint.rows(setting, methods)
    monkeypatch.setattr(footprint, "WORTH_PROCESSES", 0)
    assert footprint.rows(setting, methods) == expected


def test_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--budget", "100GiB"]) == 0
    assert "plain fits 100.00 GiB" in capsys.readouterr().out
    assert main([*SMALL, "--budget", "150MiB"]) == 2
    assert "is not enough: small, which takes least, would take" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no-such-model"], "unknown model"),
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1"),
        (["--budget", "plenty"], "a budget is"),
        (["--methods", "lean", "--exclude", "*"], "nothing to compress"),
        (["--methods", "compile"], "torch.compile decides what to keep when it compiles"),
        (["--methods", "velora"], "peft's VeLoRA looks at numbers"),
    ],
)
def test_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err
