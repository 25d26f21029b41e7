"""The callbacks for the Trainers of transformers and of Lightning: what they report, and that runs resume exactly."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import COMMON
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import prac
from prac.integrations.lightning import PracCallback as LightningCallback
from prac.integrations.transformers import PracCallback
from prac.monitoring import monitor

CONFIG = prac.PRESETS["paper"].replace(T1=2, T2=2, min_width=8)
IDS = torch.randint(97, (48, 24), generator=torch.Generator().manual_seed(5))
LAYER = "model.layers.1.mlp.up_proj"


def model_and_handle(dropout=0.0):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, attention_dropout=dropout))
    return model, prac.compress(model, CONFIG)


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- transformers ------------------------------------------------------------------------------


class Logger(TrainerCallback):
    """Takes down what is logged, as TensorBoard or Weights & Biases would."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append((state.global_step, dict(logs)))


def trainer_for(out, model, **changes):
    settings = dict(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=4, save_steps=3, logging_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    return Trainer(model, TrainingArguments(**settings | changes), train_dataset=rows)


def test_transformers_reports_every_layer(tmp_path, capsys):
    model, handle = model_and_handle()
    trainer = trainer_for(tmp_path, model)
    logger = Logger()
    trainer.add_callback(logger)
    trainer.add_callback(PracCallback(handle, trainer, every=3, path=tmp_path / "layers.jsonl"))
    trainer.train()

    totals = {step: logs for step, logs in logger.rows if "prac/kept_bytes" in logs}
    details = {step: logs for step, logs in logger.rows if f"prac/gradient_variance/{LAYER}" in logs}
    assert sorted(totals) == sorted(details) == [1, 3, 6]
    compressed = {row.name for row in handle.rows() if row.compressed}
    for step in totals:
        assert totals[step]["prac/kept_bytes"] > 10_000
        assert totals[step]["prac/gradient_variance"] > 0
        for what in ("kept_bytes", "refreshes", "reconstruction_error"):
            assert {name.split("/")[2] for name in details[step] if name.startswith(f"prac/{what}/")} == compressed
    assert totals[6]["prac/refreshes"] > totals[1]["prac/refreshes"]
    assert [row["step"] for row in trainer.state.log_history if "prac/kept_bytes" in row] == [1, 3, 6]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [2, 4, 6]  # as ever
    assert [reading.step for reading in monitor.read(tmp_path / "layers.jsonl")] == [1, 3, 6]
    printed = capsys.readouterr().out
    assert "prac/kept_bytes" in printed
    assert LAYER not in printed  # the terminal gets the totals


def test_transformers_resumes_exactly(tmp_path):
    whole, handle = model_and_handle(0.1)
    trainer = trainer_for(tmp_path / "whole", whole)
    trainer.add_callback(PracCallback(handle, trainer, every=2))
    trainer.train()

    model, handle = model_and_handle(0.1)
    trainer = trainer_for(tmp_path / "halves", model)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    for callback in (PracCallback(handle, trainer), Stop()):
        trainer.add_callback(callback)
    trainer.train()
    assert handle.step == 3

    model, handle = model_and_handle(0.1)
    trainer = trainer_for(tmp_path / "halves", model)
    trainer.add_callback(PracCallback(handle, trainer))
    trainer.train(resume_from_checkpoint=True)
    assert handle.step == 6
    assert equal(model, whole)


def test_transformers_resumes_with_a_warning_where_nothing_was_saved(tmp_path):
    model, handle = model_and_handle()
    trainer_for(tmp_path, model, max_steps=3).train()
    model, handle = model_and_handle()
    trainer = trainer_for(tmp_path, model)
    trainer.add_callback(PracCallback(handle, trainer))
    with pytest.warns(UserWarning, match=r"no prac\.pt in .*checkpoint-3"):
        trainer.train(resume_from_checkpoint=True)


def test_transformers_trains_on_after_it_has_trained(tmp_path, recwarn):
    model, handle = model_and_handle()
    trainer = trainer_for(tmp_path, model, max_steps=2)
    trainer.add_callback(PracCallback(handle, trainer))
    for steps in (2, 4):
        trainer.train()  # anew, not resumed
        assert handle.step == steps
    assert not [warning for warning in recwarn if "prac.pt" in str(warning.message)]


def test_transformers_refuses_a_damaged_state(tmp_path):
    model, handle = model_and_handle()
    trainer = trainer_for(tmp_path, model, max_steps=3)
    trainer.add_callback(PracCallback(handle, trainer))
    trainer.train()
    path = tmp_path / "checkpoint-3" / "prac.pt"
    path.write_bytes(path.read_bytes()[:-100])
    model, handle = model_and_handle()
    trainer = trainer_for(tmp_path, model)
    trainer.add_callback(PracCallback(handle, trainer))
    with pytest.raises(ValueError, match=r"prac\.pt is damaged: restore it from a copy, or delete it"):
        trainer.train(resume_from_checkpoint=True)


# --- Lightning -----------------------------------------------------------------------------------

lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    """A LightningModule around a compressed model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        """The loss."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Memory(lightning.loggers.logger.Logger):
    """Takes down what is logged."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        """Remember."""
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        """Nothing of interest."""


def fit(out, model, handle, steps, checkpoint=None, rows=8, **changes):
    """Train up to ``steps``; returns the Trainer, the logger and the callback."""
    logger, callback = Memory(), LightningCallback(handle, every=3, path=out / "layers.jsonl")
    settings = dict(
        max_steps=steps, accelerator="cpu", callbacks=[callback], logger=logger, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(out), log_every_n_steps=1,
    )  # fmt: skip
    trainer = lightning.Trainer(**settings | changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(IDS[:rows], batch_size=8)
        trainer.fit(Module(model), loader, ckpt_path=checkpoint, weights_only=True)
    return trainer, logger, callback


def test_lightning_reports_every_layer(tmp_path):
    model, handle = model_and_handle()
    _, logger, callback = fit(tmp_path, model, handle, 6, accumulate_grad_batches=2, rows=48)
    details = {step: logs for step, logs in logger.rows if f"prac/gradient_variance/{LAYER}" in logs}
    assert sorted(details) == [1, 3, 6]
    compressed = {row.name for row in handle.rows() if row.compressed}
    for logs in details.values():
        assert logs["prac/kept_bytes"] > 10_000
        for what in ("kept_bytes", "refreshes", "reconstruction_error"):
            assert {name.split("/")[2] for name in logs if name.startswith(f"prac/{what}/")} == compressed
    assert [reading.step for reading in monitor.read(tmp_path / "layers.jsonl")] == [1, 3, 6]
    assert len(callback.monitor.history) == 3


def test_lightning_resumes_exactly(tmp_path):
    # On one batch and without dropout: Lightning saves neither the state of torch's generator nor, for an ordinary
    # DataLoader, the place in the data.
    whole, handle = model_and_handle()
    fit(tmp_path, whole, handle, 6)
    model, handle = model_and_handle()
    trainer, *_ = fit(tmp_path, model, handle, 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    model, handle = model_and_handle()
    fit(tmp_path, model, handle, 6, tmp_path / "half.ckpt")
    assert handle.step == 6
    assert equal(model, whole)


def test_lightning_is_told_to_compress_what_is_called(tmp_path):
    torch.manual_seed(0)
    module = Module(nn.Sequential(nn.Embedding(97, 32), nn.Linear(32, 97)))
    module.training_step = lambda batch: module.model(batch).square().mean()
    handle = prac.compress(module, CONFIG, include="*")
    callback = LightningCallback(handle)
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.warns(UserWarning, match="Compress the module that the training loop calls"):
        trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=8))
