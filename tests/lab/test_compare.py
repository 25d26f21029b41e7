"""`prac compare`: methods × seeds, the failure of one, going on where it stopped, and what it shows."""

import json
import re
import socket
import threading
from types import SimpleNamespace

import pytest

from prac.lab.commands.main import main
from prac.lab.report import overview, page, results, table
from prac.lab.runs import children, turns
from prac.lab.runs.callbacks import Metrics

METHODS = ("plain", "checkpoint", "galore", "lean")


@pytest.fixture(scope="module")
def argv(corpus_file):
    common = ["compare", "--data", str(corpus_file), "--tokenizer", "bpe:300", "--steps", "3", "--batch-size", "4"]
    return [*common, "--seq-len", "32", "--eval-every", "1", "--save-every", "0", "--seed", "0", "1", "--quiet"]


@pytest.fixture(scope="module")
def compared(argv, tmp_path_factory):
    """Two seeds of four methods, one after the other in this process: tests/lab/test_cli.py runs some in their own."""
    out = tmp_path_factory.mktemp("compare")
    command = [*argv, "--methods", ",".join(METHODS), "--out", str(out), "--json", str(out / "rows.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "run_all", lambda commands, workers: [main(list(each)) for each in commands])
        assert main([*command, "--workers", "2"]) == 0
    return out, command


def test_rows_carry_the_contract(compared):
    out, _ = compared
    document = json.loads((out / "rows.json").read_text())
    assert document["command"] == "compare"
    rows = document["rows"]
    assert [(row["seed"], row["method"]) for row in rows] == [(seed, m) for seed in (0, 1) for m in METHODS]
    for row in rows:
        assert {"method", "seed", "val_loss", "peak_bytes", "kept_bytes", "tokens_per_s", "time_ratio"} <= row.keys()
        assert row["peak_bytes"] == row["peak_step_bytes"] > row["kept_bytes"] > 0
        assert (row["time_ratio"] == 1) == (row["method"] == "plain")
    by_method = {row["method"]: row for row in rows if row["seed"] == 0}
    assert by_method["checkpoint"]["kept_bytes"] < by_method["lean"]["kept_bytes"] < by_method["plain"]["kept_bytes"]
    assert by_method["checkpoint"]["val_loss"] == pytest.approx(by_method["plain"]["val_loss"], abs=1e-4)
    # GaLore's optimizer state is what it saves; nothing that is kept for backward.
    assert by_method["galore"]["kept_bytes"] == by_method["plain"]["kept_bytes"]
    assert by_method["galore"]["peak_bytes"] < by_method["plain"]["peak_bytes"]


def test_the_page_answers_first(compared):
    out, _ = compared
    text = (out / "report.html").read_text()
    assert text.index("Least memory, no loss seen") < text.index("Side by side")
    assert text.count("<svg") == 4  # frontier, differences, losses, kept
    assert "prac compare" in text and all(method in text for method in METHODS)
    assert not re.search(r"(src|href)=\"http", text)
    answers = dict(page.answers(results.against_plain(json.loads((out / "rows.json").read_text())["rows"])))
    assert answers["Least memory at all"].split(":")[0] in METHODS


def test_it_goes_on_where_it_stopped(compared, monkeypatch, capsys):
    """A run that is missing is run, those that are there are not; and without --resume nothing is overwritten."""
    out, command = compared
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    (out / "lean-seed1" / "result.json").unlink()
    launched = []

    def run_all(commands, workers):
        launched.extend(commands)
        return [3 for _ in commands]

    monkeypatch.setattr(children, "run_all", run_all)
    assert main([*command, "--resume"]) == 1
    (argv,) = launched
    assert argv[0] == "train" and "--methods" not in argv and "--json" not in argv
    assert argv[argv.index("--method") + 1] == "lean" and argv[-5:-3] == ["--seed", "1"]
    assert "lean seed 1 failed (exit code 3)" in capsys.readouterr().err
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert len(rows) == 7  # what is complete is shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "plain,papier"], "unknown method 'papier'"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--turns", "0"], "--turns must be at least 1 step"),
        (["--turns", "5", "--workers", "2"], "--turns has one run at work at a time"),
        (["--methods", "plain,plain+lora", "--model", "no/such"], "unknown model"),
    ],
)
def test_bad_input_is_one_line(more, message, argv, tmp_path, capsys):
    assert main([*argv, "--out", str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


@pytest.mark.long
def test_runs_take_turns(argv, compared, tmp_path, monkeypatch, capsys):
    """A step each, round after round, until one fails, which takes no other with it; and to the same losses."""
    order = []
    turn = turns._turn

    def watched(ours, process):
        method = process.args[process.args.index("--method") + 1]
        if method == "rso" and "rso" in order:  # at its second turn it is gone
            process.kill()
        order.append(method)
        return turn(ours, process)

    monkeypatch.setattr(turns, "_turn", watched)
    command = [*argv[: argv.index("--seed")], "--seed", "1", "--methods", "plain,rso,checkpoint", "--turns", "1"]
    assert main([*command, "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 1
    assert order == ["plain", "rso", "checkpoint"] * 2 + ["plain", "checkpoint"]
    assert "rso seed 1 failed (exit code -9)" in capsys.readouterr().err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    losses = {row["method"]: row["val_loss"] for row in rows}
    assert [row["time_ratio"] is not None for row in rows] == [True, True] and list(losses) == ["plain", "checkpoint"]
    before = json.loads((compared[0] / "rows.json").read_text())["rows"]
    for row in before:
        if row["seed"] == 1 and row["method"] in losses:
            assert losses[row["method"]] == pytest.approx(row["val_loss"], abs=1e-5)


def test_waiting_for_a_turn_is_off_the_clock(tmp_path):
    """And a run whose command has ended says so, and ends too."""
    ours, theirs = socket.socketpair()
    metrics = Metrics(tmp_path / "metrics.jsonl")
    ours.sendall(b"\n")
    callback = turns.Turns(theirs, 2, metrics)
    metrics._since = 100.0

    def step(number):
        callback.on_step_end(None, SimpleNamespace(global_step=number, max_steps=6), None)

    step(1)  # not its turn's last
    step(6)  # nothing left to do in another turn
    giver = threading.Timer(0.2, ours.sendall, [b"\n"])
    giver.start()
    step(2)
    giver.join()
    assert ours.recv(10) == b"\n"
    assert 100.1 <= metrics._since < 110
    ours.close()
    with pytest.raises(RuntimeError, match="has ended: go on with --resume"):
        step(4)


def rows_of(**methods):
    """Rows of two seeds each: loss, tokens per second, peak."""
    found = []
    for method, (losses, speed, peak) in methods.items():
        for seed, loss in enumerate(losses):
            row = {"method": method, "seed": seed, "val_loss": loss, "val_ppl": 1.0, "tokens_per_s": speed}
            found.append(row | {"peak_bytes": peak, "kept_bytes": peak // 2})
    return found


def test_differences_are_paired_by_seed():
    """Seeds that differ by 1.0 say nothing of methods that differ by 0.1 on each."""
    rows = rows_of(plain=((3.0, 4.0), 100, 1000), lean=((3.1, 4.1), 50, 500), other=((3.0, 4.4), 200, 2000))
    lines = {line[0]: line for line in table.cells(rows)}
    assert lines["lean"][1:3] == ("3.600 ± 0.707", "+0.100 ± 0.000")
    assert lines["other"][2] == "+0.200 ± 0.283" and lines["plain"][2] == "–"
    assert lines["lean"].speed == "0.50×"
    rows = results.against_plain(rows)
    assert [row["time_ratio"] for row in rows] == [1, 1, 2, 2, 0.5, 0.5]
    plain = [row for row in rows if row["method"] == "plain"]
    lean, other = ([row for row in rows if row["method"] == name] for name in ("lean", "other"))
    assert not overview.point(lean, plain)["harmless"]  # 0.1 on each seed is seen
    assert not overview.point(other, plain)["harmless"]  # 0.2 ± 0.28 may be nothing, or a run in two that failed
    noisy = results.against_plain(rows_of(plain=((3.0, 4.0), 100, 1000), lean=((2.98, 4.06), 100, 1000)))
    assert overview.point(noisy[2:], noisy[:2])["harmless"]  # 0.02 ± 0.06 is within the noise, and small


def test_without_plain_its_first_variant_is_what_others_are_compared_with():
    runs = {
        "lean+lora": ((3.1, 4.1), 50, 500),
        "plain+lora": ((3.0, 4.0), 100, 1000),
        "plain+muon": ((2.0, 3.0), 10, 9),
    }
    rows = results.against_plain(rows_of(**runs))
    assert results.baseline(rows) == "plain+lora" and table.headings(rows)[2] == "above plain+lora"
    assert [row["time_ratio"] for row in rows] == [2, 2, 1, 1, 10, 10]
    assert table.cells(rows)[0][2] == "+0.100 ± 0.000" and table.cells(rows)[1][2] == "–"
    assert results.baseline(rows_of(lean=((3.1, 4.1), 50, 500))) is None
    assert results.baseline(rows_of(**runs, plain=((3.0, 4.0), 1, 1))) == "plain"


def test_labels_keep_their_distance():
    places = overview._apart([0.0, 0.01, 0.02, 5.0], 1.0)
    assert places == pytest.approx([-0.99, 0.01, 1.01, 5.0])
    assert overview._apart([1.0, 3.0], 1.0) == [1.0, 3.0]
    assert overview._apart([0.0, 0.1, 0.2, 4.9], 1.0, 0.0, 5.0) == pytest.approx([0.0, 1.0, 2.0, 4.9])
