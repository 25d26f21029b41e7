"""What becomes of a run whose checkpoints are cut short, damaged, or cannot be written."""

from __future__ import annotations

import copy
import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback, TrainerState

from prac.convert import state as saved_state
from prac.lab.materials import weights
from prac.lab.report import results
from prac.lab.runs import checkpoints, train
from prac.lab.runs.callbacks import Metrics
from prac.lab.runs.options import Options
from prac.presets import PRESETS


@pytest.fixture(scope="module")
def options(corpus_file):
    return Options(
        method="paper", config=PRESETS["paper"].replace(T1=4, T2=4), model="llama-tiny", data=str(corpus_file),
        tokenizer="bpe:300", steps=9, batch_size=8, seq_len=32, lr=1e-3, warmup=0.25, eval_every=0, save_every=3,
    )  # fmt: skip


class Stop(TrainerCallback):
    """Interrupts the run after the checkpoint of step 6."""

    def on_save(self, args, state, control, **_):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(options, tmp_path_factory):
    """A run with the checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("PRAC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        train.run(options, out, callbacks=[Stop()])
    return out


@pytest.fixture
def run(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def losses(out):
    return [(line["step"], line["loss"]) for line in results.read_lines(out / "metrics.jsonl") if "loss" in line]


def test_the_seal_lists_every_file(run):
    sealed = json.loads((run / "checkpoint-6" / "sealed.json").read_text())
    assert sealed["processes"] == 1
    assert {"prac.pt", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(sealed["files"])
    for name, entry in sealed["files"].items():
        assert (run / "checkpoint-6" / name).stat().st_size == entry["bytes"]


def test_one_cut_short_is_passed_over(options, run):
    (run / "checkpoint-6" / "sealed.json").unlink()  # as if the process had been killed before the end
    (run / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    assert checkpoints.newest(run).name == "checkpoint-3"
    row = train.run(options, run, resume=True)
    assert row["steps"] == 9
    assert [step for step, _ in losses(run)] == list(range(1, 10))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unlink(path):
    path.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "prac.pt", "trainer_state.json"])
@pytest.mark.parametrize(
    ("damage", "says"), [(truncate, r"has [\d,]+ of [\d,]+ bytes"), (change, "is not what"), (unlink, "is missing")]
)
def test_a_damaged_one_is_refused(options, run, name, damage, says):
    damage(run / "checkpoint-6" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6 is damaged: {name} {says}.*go on from checkpoint-3"):
        train.run(options, run, resume=True)
    assert (run / "checkpoint-6").exists()  # what is to be done with it is the user's to say


def test_once_the_damaged_one_is_gone_it_goes_on_from_the_one_before(options, run):
    shutil.rmtree(run / "checkpoint-6")
    assert train.run(options, run, resume=True)["steps"] == 9


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"prac.pt": 3}}'])
def test_a_seal_that_cannot_be_read(options, run, content):
    (run / "checkpoint-6" / "sealed.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged: sealed\.json cannot be read"):
        train.run(options, run, resume=True)


def test_without_an_older_one_it_says_so(options, run):
    shutil.rmtree(run / "checkpoint-3")
    truncate(run / "checkpoint-6" / "prac.pt")
    with pytest.raises(ValueError, match="start over with --overwrite"):
        train.run(options, run, resume=True)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "evil").touch, ()

    torch.save({"handle": Evil()}, tmp_path / "prac.pt")
    with pytest.raises(ValueError, match=r"prac\.pt is damaged"):
        saved_state.load(tmp_path)
    assert not (tmp_path / "evil").exists()


class FullDisk(TrainerCallback):
    """No file may grow over a limit while a given step is saved."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def on_step_begin(self, args, state, control, **_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


# The first stops the model's file, the second the optimizer's.
@pytest.mark.parametrize(
    ("limit", "says"),
    [(100_000, "Its weights are lost"), pytest.param(10_000_000, "Its weights, without", marks=pytest.mark.long)],
)
def test_a_full_disk_ends_the_run_and_it_goes_on_from_the_last_checkpoint(
    options, run, tmp_path, monkeypatch, limit, says
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(weights.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-6").iterdir()}
    assert sizes["model.safetensors"] < 10_000_000 < sizes["optimizer.pt"]
    whole, full = tmp_path / "whole", tmp_path / "full"
    expected = train.run(options, whole)
    disk = FullDisk(6, limit)
    try:
        with pytest.raises(RuntimeError, match=f"checkpoint-6 could not be written.*{says}.*go on from checkpoint-3"):
            train.run(options, full, callbacks=[disk])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, disk.before)
    assert not (full / "result.json").exists() and not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in full.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (full / "model").exists() == (limit > 1_000_000)
    if limit > 1_000_000:
        rescued = load_file(full / "model" / "model.safetensors")
        steps_6 = load_file(run / "checkpoint-6" / "model.safetensors")
        assert all(torch.equal(rescued[name], steps_6[name]) for name in rescued)
    row = train.run(options, full, resume=True)
    assert row["val_loss"] == expected["val_loss"]
    assert losses(full) == losses(whole)
    old, new = (load_file(out / "model" / "model.safetensors") for out in (whole, full))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_where_the_model_cannot_be_written_the_run_is_not_complete(options, run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.files, "replace_folder", full)
        with pytest.raises(RuntimeError, match=r"model could not be written .*No space left.*the last checkpoint"):
            train.run(options, run, resume=True)
    assert not (run / "result.json").exists()
    assert train.run(options, run, resume=True)["steps"] == 9  # and not a step more
    last, kept = (load_file(run / name / "model.safetensors") for name in ("checkpoint-9", "model"))
    assert all(torch.equal(last[name], kept[name]) for name in last)


class FullForSpectra(FullDisk):
    """From the first spectrum on."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, self.before[1]))

    def on_step_begin(self, args, state, control, **_):
        pass


@pytest.mark.filterwarnings("ignore:prac.Monitor", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_cannot_be_written_in_training_says_what_is_lost(options, tmp_path):
    disk = FullForSpectra(1, 0)
    try:
        with pytest.raises(
            RuntimeError, match=r"could not be written .*training ends at step 1\. Its weights are lost"
        ):
            train.run(options, tmp_path / "run", callbacks=[disk])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, disk.before)
    assert not (tmp_path / "run" / "result.json").exists()
    assert train.run(options, tmp_path / "run", resume=True)["steps"] == 9


def test_a_line_that_could_not_be_written_is_written_later(tmp_path, monkeypatch, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    state = TrainerState(is_world_process_zero=True)
    metrics.on_train_begin(None, state, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics._write(step=1, val_loss=1.0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.path.stat().st_size + 5, before[1]))
        metrics._write(step=2, val_loss=2.0)
        assert len(metrics.path.read_text().splitlines()) == 1
        assert "metrics.jsonl could not be written" in capsys.readouterr().err
        with pytest.raises(OSError, match="1 lines of this run could not be written"):
            copy.copy(metrics).on_train_end(None, state, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics._write(step=3, val_loss=3.0)
    metrics.on_train_end(None, state, None)
    assert [line["step"] for line in results.read_lines(metrics.path)] == [1, 2, 3]


def test_copies_beside_a_checkpoint_are_neither_used_nor_deleted(options, run):
    """Whatever somebody calls them; only checkpoints of prac's own name take turns in being the oldest."""
    copies = ["checkpoint-6 copy", "checkpoint-abc", "checkpoint-", "checkpoint-99x", "checkpoint-3.bak"]
    for name in copies:
        shutil.copytree(run / "checkpoint-3", run / name)
    assert checkpoints.newest(run).name == "checkpoint-6"
    assert train.run(options, run, resume=True)["steps"] == 9
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names == {"checkpoint-6", "checkpoint-9", *copies}


def test_where_the_disk_of_the_run_is_full_the_weights_go_to_another(options, run, tmp_path, monkeypatch):
    replace = weights.files.replace_folder

    def full(path, fill):
        if path.is_relative_to(run):
            raise OSError(28, "No space left on device")
        replace(path, fill)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(weights.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(weights.files, "replace_folder", full)
    model = LlamaForCausalLM.from_pretrained(run / "checkpoint-6")
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-6")
    place = weights.rescue(model, tokenizer, run / "checkpoint-9")
    assert place.is_relative_to(tmp_path / "elsewhere")
    saved, rescued = (load_file(folder / "model.safetensors") for folder in (run / "checkpoint-6", place))
    assert all(torch.equal(saved[name], rescued[name]) for name in saved)
