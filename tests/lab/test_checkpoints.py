"""What becomes of a run whose checkpoints are cut short, damaged, or cannot be written."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from prac import saving
from prac.lab import checkpoints, results, train
from prac.lab.options import Options
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
        saving.load(tmp_path)
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
@pytest.mark.parametrize("limit", [100_000, 10_000_000])
def test_a_full_disk_loses_neither_the_run_nor_the_last_checkpoint(options, run, tmp_path, capfd, limit):
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-6").iterdir()}
    assert sizes["model.safetensors"] < 10_000_000 < sizes["optimizer.pt"]
    whole = train.run(options, tmp_path / "whole")
    row = train.run(options, tmp_path / "full", callbacks=[FullDisk(6, limit)])
    assert "checkpoint-6 could not be written and is left out, training goes on" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "full").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-9"]
    for path in (tmp_path / "full").glob("checkpoint-*"):
        checkpoints.check(path)
    assert row["val_loss"] == whole["val_loss"]
    old, new = (load_file(tmp_path / name / "checkpoint-9" / "model.safetensors") for name in ("whole", "full"))
    assert all(torch.equal(old[name], new[name]) for name in old)
