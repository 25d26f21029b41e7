"""Whose a folder is: what prac did not make is never touched, and one run is at work in a folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prac.lab.commands.main import main
from prac.lab.runs import ownership, run_folder
from prac.lab.runs.options import Options


@pytest.fixture
def refused(capsys, corpus_file):
    """Runs a command that must refuse its folder; returns its one line."""

    def run(out, *argv, command="train"):
        method = ["--method", "plain"] if command == "train" else ["--methods", "plain,lean"]
        given = [command, *method, "--model", "llama-32x1", "--data", str(corpus_file), "--tokenizer", "bpe:300"]
        assert main([*given, "--steps", "1", "--batch-size", "2", "--seq-len", "32", "--out", str(out), *argv]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    return run


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "model/w.bin", "config.json", "result.json", "x"])
def test_a_folder_without_the_mark_is_left_alone(name, more, command, refused, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    before = tree(tmp_path)
    assert "lacks its mark, prac-run.json: nothing there is touched" in refused(tmp_path, *more, command=command)
    assert tree(tmp_path) == before


def test_a_file_is_no_folder(refused, corpus_file, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert "notes.txt is a file: name a folder" in refused(path)
    assert path.read_text() == "mine"


def test_only_what_a_run_wrote_is_cleared(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    out = tmp_path / "run"
    theirs = ["notes.txt", "checkpoint-4 copy/a", "checkpoint-best/a", "old-checkpoint-4/a"]
    for name in (
        "run/prac-run.json",
        "run/checkpoint-4/a",
        "run/metrics.jsonl",
        "elsewhere/precious",
        *(f"run/{n}" for n in theirs),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (out / "model").symlink_to(elsewhere)
    run_folder.clear(out)
    assert sorted(tree(out)) == sorted(Path(name) for name in ["prac-run.json", *theirs])
    assert not (out / "model").is_symlink() and (elsewhere / "precious").exists()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder ``m`` with a model in ``m/inside``, and a link to it, seen from a working directory."""
    (tmp_path / "m" / "inside").mkdir(parents=True)
    for folder in ("m", "m/inside"):
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "m" / "corpus.txt").write_text("mine")
    (tmp_path / "link").symlink_to("m")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", ["--model", "--data", "--tokenizer"])
@pytest.mark.parametrize(
    ("read", "out"),
    [
        ("m", "m"),
        ("m/inside", "m"),
        ("m", "m/run"),
        ("m", "link"),
        ("link", "m"),
        ("link/inside", "m"),
        ("m", "link/run"),
        ("m", "./m/inside/../new"),
        ("m", "."),
    ],
)
def test_what_is_read_is_not_written_to(option, read, out, refused, place):
    before = tree(place)
    assert f"--out {Path(out)} and {option} {read} are one and the same" in refused(out, option, read)
    assert tree(place) == before


def test_neither_is_the_file_of_rows(refused, place):
    line = refused("run", "--data", "m/corpus.txt", "--json", "m/corpus.txt", "--overwrite")
    assert "--json m/corpus.txt and --data" in line
    (place / "rows.json").write_text('{"mine": 1}')
    assert "rows.json exists" in refused("run", "--json", "rows.json")
    assert "rows.json exists" in refused("run", "--json", "rows.json", "--resume")  # no rows of prac
    assert "m is a folder: name a file" in refused("run", "--json", "m", "--overwrite")
    assert json.loads((place / "rows.json").read_text()) == {"mine": 1}


def test_folders_that_look_alike_are_apart(place):
    (place / "m2").mkdir()
    options = {"method": "plain", "config": None, "tokenizer": "bpe:300", "steps": 1, "batch_size": 1, "seq_len": 32}
    options |= {"lr": 1e-3, "warmup": 0.0}
    ownership.check_apart(Options(model="m", data="sotu", **options), Path("m2"))
    ownership.check_apart(Options(model="llama-tiny", data="m/corpus.txt", **options), Path("m/inside"))


HOLDER = """
import os, sys, time
from pathlib import Path
from prac.lab.runs import ownership
with ownership.held(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that loads data, it inherits what is open
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_one_run_a_folder_until_it_ends_however_that_is(refused, tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"held\n"
        for command in ("train", "compare"):
            for more in ([], ["--overwrite"], ["--resume"]):
                line = refused(out, *more, command=command)
                assert f"is in use by process {holder.pid} on " in line and "choose another --out" in line
        holder.kill()
        holder.wait()
        with ownership.held(out):
            mark = json.loads((out / ownership.MARK).read_text())
            assert mark["process"] == os.getpid()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_where_nothing_was_written_nothing_is_left(tmp_path):
    with pytest.raises(KeyError), ownership.held(tmp_path / "new"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), ownership.held(tmp_path / "there"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_folder_of_run_folders_may_be_compared_in(tmp_path):
    with ownership.held(tmp_path / "plain-seed0"):
        (tmp_path / "plain-seed0" / "result.json").touch()
    with ownership.held(tmp_path):
        pass
