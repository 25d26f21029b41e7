"""Whole runs of a small LLaMA: 12 steps, plain and paper."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

import prac
from prac.lab.commands.main import main
from prac.lab.materials import models
from prac.lab.report import page, results
from prac.lab.runs import callbacks, train
from prac.lab.runs.options import Options
from prac.monitoring import monitor
from prac.presets import PRESETS

STEPS = 12


class Spy(TrainerCallback):
    """Writes down every training batch; interrupts after the checkpoint of a given step."""

    def __init__(self, stop=None):
        self.batches = []
        self.stop = stop
        self.looking = True

    def on_train_begin(self, args, state, control, model, **_):
        def look(_, inputs):
            if model.training and self.looking:
                self.batches.append(inputs[0].flatten().tolist())

        model.get_input_embeddings().register_forward_pre_hook(look)

    def on_step_begin(self, args, state, control, **_):
        self.looking = True

    def on_step_end(self, args, state, control, **_):
        self.looking = False  # layers are measured between steps

    def on_train_end(self, args, state, control, **_):
        self.looking = True

    def on_save(self, args, state, control, **_):
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def options(corpus_file):
    def make(method, **changes):
        config = None if method in ("plain", "compile") else PRESETS[method].replace(T1=4, T2=4)
        common = {"model": "llama-tiny", "data": str(corpus_file), "tokenizer": "bpe:300", "steps": STEPS}
        common |= {"batch_size": 8, "seq_len": 32, "lr": 1e-3, "warmup": 0.25, "eval_every": 4, "save_every": 6}
        return Options(**({"method": method, "config": config} | common | changes))

    return make


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory):
    """One whole run of each method: its folder, its row and its batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRAC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        found = {}
        for method in ("plain", "paper"):
            spy, out = Spy(), tmp_path_factory.mktemp("runs") / method
            row = train.run(options(method), out, callbacks=[spy])
            found[method] = (out, row, spy.batches)
    return found


def test_rows_carry_the_contract(runs):
    for method, (out, row, _) in runs.items():
        assert row["method"] == method
        assert (row["steps"], row["seed"], row["tokens"]) == (STEPS, 0, STEPS * 8 * 32)
        assert row["val_ppl"] == pytest.approx(math.exp(row["val_loss"]))
        assert 1 < row["val_loss"] < math.log(300)
        assert 0 < row["unigram_entropy"] < math.log(300)
        lines = [line for line in results.read_lines(out / "metrics.jsonl") if "elapsed" in line]
        seconds = row["train_s"] - lines[0]["elapsed"]  # the first step compiles and warms up
        assert row["tokens_per_s"] == pytest.approx((row["tokens"] - lines[0]["tokens"]) / seconds)
        weights = 4 * row["parameters"]
        assert row["peak_bytes"] == row["peak_step_bytes"] > row["kept_bytes"] + 3 * weights  # and Adam's two moments
        result = results.read(out / "result.json")
        assert result["rows"] == [row]
        assert result["command"] == "train"
        assert {"python", "torch", "transformers", "prac"} <= result["versions"].keys()
        assert sum(layer["bytes"] for layer in result["kept_by_layer"]) == row["kept_bytes"]


def test_the_paper_keeps_less(runs):
    plain, paper = (results.read(runs[method][0] / "result.json") for method in ("plain", "paper"))
    assert paper["rows"][0]["kept_bytes"] < 0.75 * plain["rows"][0]["kept_bytes"]
    norms = [sum(x["bytes"] for x in r["kept_by_layer"] if x["kind"] == "norm") for r in (plain, paper)]
    assert norms[1] < 0.5 * norms[0]
    assert paper["summary"] and paper["reconstruction_error"]


def test_a_run_folder_is_complete(runs):
    out = runs["paper"][0]
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "result.json", "spectrum.json", "tensorboard", "checkpoint-6", "checkpoint-12",
        "layers.jsonl", "model", "prac-run.json", ".prac.lock",
    }  # fmt: skip
    assert "layers.jsonl" not in {path.name for path in runs["plain"][0].iterdir()}
    assert results.read(out / "config.json")["options"]["config"]["T1"] == 4
    assert (out / "checkpoint-12" / "tokenizer.json").exists()


def test_metrics_have_a_line_for_every_step(runs):
    lines = results.read_lines(runs["plain"][0] / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in training] == [step * 8 * 32 for step in range(1, STEPS + 1)]
    assert {4, 8, 12} <= {line["step"] for line in lines if "val_loss" in line}
    assert training[-1]["loss"] < training[0]["loss"]


def test_learning_rate_warms_up_and_falls_to_a_tenth(runs):
    rates = [line["lr"] for line in results.read_lines(runs["plain"][0] / "metrics.jsonl") if "lr" in line]
    for step, rate in enumerate(rates):
        if step < 3:
            expected = 1e-3 * step / 3
        else:
            expected = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3))))
        assert rate == pytest.approx(expected, rel=1e-6)


def test_every_method_sees_the_same_weights_and_batches(runs, options, tmp_path):
    assert len(runs["plain"][2]) == STEPS + 4  # and the batch that is measured: what it keeps, and the peak
    assert runs["plain"][2] == runs["paper"][2][: STEPS + 4]
    first = [results.read_lines(runs[method][0] / "metrics.jsonl")[0]["loss"] for method in ("plain", "paper")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    other = Spy()
    train.run(options("plain", seed=1, steps=1, warmup=0), tmp_path, callbacks=[other])
    assert other.batches[0] != runs["plain"][2][0]


def test_spectra_are_taken_early_and_at_the_end(runs):
    spectra = results.read(runs["paper"][0] / "spectrum.json")
    assert [row["step"] for row in spectra] == [1, STEPS]
    for row in spectra:
        assert row["layer"] == "model.layers.2.self_attn.q_proj"
        values = row["singular_values"]
        assert len(values) == len(row["energy"]) == models.SIZES["llama-tiny"].hidden
        assert values == sorted(values, reverse=True)
        assert row["energy"][0] == pytest.approx(values[0] ** 2 / sum(v * v for v in values), rel=1e-4)
        assert row["energy"][-1] == 1


@pytest.mark.parametrize("method", ["plain", "paper"])
def test_resume_is_exact(method, runs, options, tmp_path):
    whole = runs[method][0]
    with pytest.raises(KeyboardInterrupt):
        train.run(options(method), tmp_path, callbacks=[Spy(stop=6)])
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(ValueError, match="already holds a run"):
        train.run(options(method), tmp_path)
    row = train.run(options(method), tmp_path, resume=True)

    def losses(out):
        keep = ("step", "loss", "val_loss", "lr", "tokens")
        return [{k: v for k, v in line.items() if k in keep} for line in results.read_lines(out / "metrics.jsonl")]

    assert losses(tmp_path) == losses(whole)
    assert row["val_loss"] == runs[method][1]["val_loss"]
    assert row["kept_bytes"] == runs[method][1]["kept_bytes"]
    old, new = (load_file(out / f"checkpoint-{STEPS}" / "model.safetensors") for out in (whole, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert results.read(tmp_path / "spectrum.json") == results.read(whole / "spectrum.json")
    assert monitor.read(tmp_path / "layers.jsonl") == monitor.read(whole / "layers.jsonl")


def test_a_bar_shows_the_evaluation_after_training(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.count, self.open = total, 0, True
            bars.append(self)

        def update(self, count):
            self.count += count

        def close(self):
            self.open = False

    monkeypatch.setattr(callbacks, "tqdm", Bar)
    progress, state = callbacks.Progress("plain"), TrainerState(max_steps=3)
    progress.on_train_begin(None, state, None)
    progress.on_prediction_step(None, state, None, eval_dataloader=range(5))  # one during training needs no bar
    progress.on_train_end(None, state, None)
    for _ in range(5):
        progress.on_prediction_step(None, state, None, eval_dataloader=range(5))
    progress.on_evaluate(None, state, None)
    assert [(bar.total, bar.count, bar.open) for bar in bars] == [(3, 0, False), (5, 5, False)]


def test_every_layer_is_measured_and_shown(runs, tmp_path, capsys):
    out = runs["paper"][0]
    readings = monitor.read(out / "layers.jsonl")
    assert len(readings) > 2
    assert readings[-1].refreshes > readings[0].refreshes
    assert all(layer.gradient_variance > 0 for layer in readings[-1].layers if layer.kind in ("linear", "norm"))
    assert main(["layers", str(out), "--top", "5", "--plot", str(tmp_path / "layers.svg")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(readings[-1].table(5))
    assert (tmp_path / "layers.svg").read_text().startswith("<svg")
    assert main(["layers", str(out / "layers.jsonl"), "--step", str(readings[0].step)]) == 0
    assert capsys.readouterr().out.strip() == readings[0].table(20).strip()

    assert main(["layers", str(out), "--step", "1000"]) == 2
    assert f"has no reading of step 1000; there are {readings[0].step}, " in capsys.readouterr().err
    assert main(["layers", str(runs["plain"][0])]) == 2
    assert "layers.jsonl does not exist: give the folder of a compressed run" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("my notes")
    assert main(["layers", str(tmp_path / "notes.txt")]) == 2
    assert "holds no readings of a prac.Monitor" in capsys.readouterr().err


def test_a_complete_run_is_reused_but_not_for_other_options(runs, options):
    out, row, _ = runs["paper"]
    assert train.run(options("paper"), out, resume=True) == row
    with pytest.raises(ValueError, match=r"other options \(lr: 0.001 -> 0.002\)"):
        train.run(options("paper", lr=2e-3), out, resume=True)
    other = PRESETS["paper"].replace(T1=4, T2=4, linear=prac.Rank(0.2, 0.3))
    with pytest.raises(ValueError, match=r"other options \(config\.linear\.r1: 0.3 -> 0.2\)"):
        train.run(options("paper", config=other), out, resume=True)
    with pytest.raises(ValueError, match=r"other options \(method: paper -> pac\)"):
        train.run(options("pac"), out, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan at step"):
        train.run(options("plain", lr=1e30, warmup=0), tmp_path)


def test_too_few_blocks_for_a_step(options, tmp_path):
    with pytest.raises(ValueError, match="lower --batch-size"):
        train.run(options("plain", batch_size=100_000), tmp_path)


def test_bf16_and_accumulation(options, tmp_path):
    row = train.run(options("paper", bf16=True, steps=2, warmup=0, batch_size=8, grad_accum=2), tmp_path)
    assert row["tokens"] == 2 * 2 * 8 * 32
    assert math.isfinite(row["val_loss"])


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"lr": -1.0}, {"lr": math.nan}, {"max_tokens": 3}, {"warmup": 13.0}, {"seq_len": 1}]
)
def test_options_that_cannot_be(options, changes):
    with pytest.raises(ValueError):
        options("plain", **changes)


def test_the_report_stands_alone(runs):
    text = page.render([runs[method][0] for method in ("plain", "paper")], ["train", "--method", "plain", "paper"])
    plain, paper = (runs[method][1] for method in ("plain", "paper"))
    assert f"{plain['kept_bytes'] / paper['kept_bytes']:.2f}×" in text
    assert f"{paper['val_loss']:.3f}" in text
    assert f"{plain['unigram_entropy']:.3f}" in text
    assert "prac train --method plain paper" in text
    assert text.count("<svg") == 4
    assert "What paper loses, layer by layer" in text
    for outside in ("<script", "<img", "<link", "@import", "url(http", 'src="http'):
        assert outside not in text


def test_the_report_of_one_run_says_what_it_measured(runs):
    text = page.render([runs["plain"][0]], ["train"])
    assert f"{runs['plain'][1]['val_loss']:.3f}" in text
    assert "against plain" not in text


def test_options_survive_json(options):
    data = options("paper", include=("model.layers.*",)).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert dataclasses.replace(options("paper"), include=("model.layers.*",)).to_dict() == data


@pytest.mark.long
def test_compiled_plain_training_ends_with_plain_trainings_loss(runs, options, tmp_path):
    compiled = train.run(options("compile"), tmp_path)
    plain = runs["plain"][1]
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-3)
    assert compiled["kept_bytes"] < plain["kept_bytes"] and compiled["peak_bytes"] < plain["peak_bytes"]
