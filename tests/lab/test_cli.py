"""The command as a user meets it."""

import io
import json
import os
import resource
import subprocess
import sys

import pytest

import prac
from prac.config import Rank
from prac.lab.commands import layers as layers_command
from prac.lab.commands import streams
from prac.lab.commands import train as command
from prac.lab.commands.main import main
from prac.lab.materials import models
from prac.lab.report import results
from prac.lab.runs import train
from prac.lab.runs.options import options
from prac.presets import PRESETS
from prac.runtime import files


@pytest.fixture
def error(capsys):
    """Runs a command that must fail; returns its one line."""

    def run(*argv):
        try:
            code = main(["train", *argv])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in err
        assert err.count("\n") == 1
        assert err.startswith("prac: error: ")
        assert out == ""
        return err

    return run


def test_bad_input_is_one_line(error, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = ("--out", str(tmp_path / "run"))
    assert "unknown model 'llama-7t': choose llama-tiny" in error("--model", "llama-7t", *out)
    assert "unknown method 'papier'; choose from plain" in error("--method", "papier", *out)
    assert "no file or folder missing.txt" in error("--data", "missing.txt", *out)
    assert "holds no text" in error("--data", str(empty), *out)
    assert "must be at most 1" in error("--linear", "1.5,0.2", *out)
    assert "not R1,R2 or R1,R2,K" in error("--linear", "lots", *out)
    assert "T1 must be a whole number" in error("--T1", "0", *out)
    assert "unrecognized arguments: --stepz" in error("--stepz", "3", *out)
    assert "steps must be at least 1" in error("--steps", "0", *out)


def test_a_rank_beyond_the_width_is_one_line(error, tmp_path, corpus_file):
    line = error(
        "--method", "paper", "--linear", "200,100", "--data", str(corpus_file), "--tokenizer", "bpe:300",
        "--steps", "1", "--batch-size", "8", "--seq-len", "32", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert f"exceeds the width {models.SIZES['llama-tiny'].hidden}" in line


def test_debug_shows_the_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PRAC_DEBUG", "1")
    assert main(["train", "--data", "missing.txt", "--out", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "pip install 'prac-torch[lab]'" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys; from prac.lab.commands.main import parser; parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"transformers", "datasets", "matplotlib", "rich", "jinja2"}.isdisjoint(loaded)


def parse(*argv):
    from prac.lab.commands.main import parser

    return parser().parse_args(["train", *argv])


def test_every_knob_reaches_the_config():
    arguments = parse(
        "--linear", "64,0.2,1.5", "--norm", "none", "--T1", "7", "--T2", "9",
        "--growth", "0.25", "--config-seed", "5", "--min-width", "99", "--product", "--last-norm", "--no-renormalise",
        "--activation", "0.2,0.1/hidden",
    )  # fmt: skip
    config = command.options_of(arguments, "paper", seed=3).config
    assert config == PRESETS["paper"].replace(
        linear=Rank(64, 0.2, 1.5), norm=None, activation=Rank(0.2, 0.1, of="hidden"), T1=7, T2=9, growth=0.25, seed=5,
        min_width=99, product=True, last_norm=True, renormalise=False,
    )  # fmt: skip
    assert command.options_of(arguments, "plain", seed=3).config is None


def test_defaults_are_those_of_the_method_and_the_model():
    config = options("rac", seed=3).config
    assert config == PRESETS["rac"].replace(seed=3)
    large = options("paper", model="llama-130m")
    assert (large.steps, large.batch_size, large.grad_accum, large.seq_len) == (20_000, 128, 4, 256)
    assert (large.warmup_steps, large.config.T1, large.tokenizer) == (2_000, 500, "bpe:4096")
    tuned = options("finetune", model="some/model")
    assert (tuned.tokenizer, tuned.config.T1) == ("some/model", 200)


def test_methods_side_by_side_survive_the_failure_of_one(capsys, tmp_path, corpus_file):
    """The rank fits no width, so paper fails in its process and plain's row is kept."""
    argv = [
        "train", "--method", "plain", "paper", "--linear", "200,100", "--data", str(corpus_file),
        "--tokenizer", "bpe:300", "--steps", "2", "--batch-size", "8", "--seq-len", "32",
        "--out", str(tmp_path / "run"), "--json", str(tmp_path / "rows.json"),
    ]  # fmt: skip
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert "paper seed 0 failed (exit code 2)" in err
    assert "plain" in out and "unigram entropy" in out
    document = results.read(tmp_path / "rows.json")
    assert document.keys() == {"command", "versions", "rows"}
    assert [row["method"] for row in document["rows"]] == ["plain"]
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "plain-seed0" / "report.html").exists()

    # What is complete is used again; the failed one is tried again.
    before = (tmp_path / "run" / "plain-seed0" / "result.json").stat().st_mtime_ns
    assert main(argv) == 2
    assert "already holds a run" in capsys.readouterr().err
    fixed = ["0.3,0.3" if word == "200,100" else word for word in argv]
    assert main([*fixed, "--resume"]) == 0
    assert [row["method"] for row in results.read(tmp_path / "rows.json")["rows"]] == ["plain", "paper"]
    assert (tmp_path / "run" / "plain-seed0" / "result.json").stat().st_mtime_ns == before


def test_json_of_a_single_run(capsys, tmp_path, corpus_file):
    path = tmp_path / "rows.json"
    code = main([
        "train", "--method", "plain", "--data", str(corpus_file), "--tokenizer", "bpe:300", "--steps", "2",
        "--batch-size", "8", "--seq-len", "32", "--out", str(tmp_path / "run"), "--json", str(path), "--seed", "4",
    ])  # fmt: skip
    assert code == 0
    row = json.loads(path.read_text())["rows"][0]
    assert {"method", "val_loss", "val_ppl", "kept_bytes", "peak_bytes", "tokens_per_s", "steps", "seed"} <= row.keys()
    assert (row["seed"], row["steps"]) == (4, 2)
    assert "report:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"prac {prac.__version__}\n"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama-tinny", "llama-tiny"),
        ("LLAMA-130M", "llama-130m"),
        ("lama-60m", "llama-60m"),
        ("gpt-124m", "gpt2-124m"),
        ("gpt2_355m", "gpt2-355m"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare", "memory"])
def test_a_wrong_name_is_answered_at_once_with_the_nearest(command, name, near, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in ("huggingface_hub", "transformers", "datasets"):  # an import of it would fail
        monkeypatch.setitem(sys.modules, module, None)
    assert main([command, "--model", name]) == 2
    assert f"unknown model '{name}': " in (err := capsys.readouterr().err) and err.endswith(f"nearest is {near}.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["./model", "/no/such/model", "a/b/c", "../llama-tiny", "", "what is this"])
def test_what_can_only_be_a_folder_is_not_looked_for_elsewhere(name, error, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert f"unknown model '{name}': there is no" in error("--model", name)


def test_resuming_needs_a_folder_and_is_not_starting_over(error):
    assert "--resume goes on with the run in --out: say which one" in error("--resume")
    assert "not allowed with argument" in error("--resume", "--overwrite", "--out", "x")


SMALL = ["--model", "llama-32x1", "--tokenizer", "bpe:300", "--steps", "2", "--batch-size", "2", "--seq-len", "32"]


def test_a_terminal_that_knows_ascii_alone(corpus_file, tmp_path):
    """Tables, bars and errors, with signs that it does not have."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = ["train", "--method", "plain", *SMALL, "--data", str(corpus_file), "--out", str(tmp_path / "run")]
    ran = run_prac(argv, **locale)
    assert ran.returncode == 0, ran.stderr
    assert "plain" in ran.stdout and "report:" in ran.stdout and ran.stdout.isascii()


def run_prac(argv, **environment):
    command = [sys.executable, "-m", "prac", *argv]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_signs_are_spelled(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    streams.never_fail()
    print("0.5× ± 1 – 2 … 漢")
    stream.flush()
    assert stream.buffer.getvalue() == b"0.5x +- 1 - 2 ... ?\n"


def test_without_a_home_it_says_what_to_set(error, monkeypatch, corpus_file, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PRAC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", nobody)
    assert "set PRAC_CACHE" in error(*SMALL, "--data", str(corpus_file), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_is_named(error, monkeypatch, corpus_file, tmp_path):
    given = [*SMALL, "--data", str(corpus_file), "--out", str(tmp_path / "run")]
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRAC_CACHE", str(tmp_path / "file" / "cache"))
    line = error(*given)
    assert str(tmp_path / "file" / "cache") in line and "set PRAC_CACHE to another folder" in line
    monkeypatch.setenv("PRAC_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, name in ((2_000, "bpe-300-"), (30_000, "packed-")):  # a disk that is full
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            line = error(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{tmp_path / 'cache'}/{name}" in line and "Make room" in line
        assert not any(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())


def test_a_cache_that_was_cut_off_is_named(error, monkeypatch, corpus_file, tmp_path):
    monkeypatch.setenv("PRAC_CACHE", str(tmp_path / "cache"))
    given = ["--method", "plain", *SMALL, "--data", str(corpus_file)]
    assert main(["train", *given, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    for pattern in ("bpe-*.json", "packed-*/facts.json", "packed-*/train/*.arrow", "packed-*/validation/state.json"):
        (path,) = (tmp_path / "cache").glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        entry = tmp_path / "cache" / path.relative_to(tmp_path / "cache").parts[0]
        with pytest.raises(ValueError, match=f"{entry.name} in the cache is cut off or damaged .*delete it"):
            train.prepare(command.options_of(parse(*given), "plain", 0))
        path.write_bytes(content)


def test_files_that_exist_are_not_replaced_unasked(capsys, tmp_path):
    path = tmp_path / "plot.svg"
    path.write_text("mine")
    assert main(["layers", str(tmp_path), "--plot", str(path)]) == 2
    assert main(["memory", "--plot", str(path)]) == 2
    assert main(["bench", "--json", str(path)]) == 2
    assert capsys.readouterr().err.count("plot.svg exists; give --overwrite") == 3
    assert path.read_text() == "mine"


def test_output_that_nobody_reads_on_is_no_error(monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(layers_command, "run", closed)
    assert main(["layers", "x"]) == 141
    assert capsys.readouterr().err == ""
