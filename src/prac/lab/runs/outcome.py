"""What a run has come to: its validation loss, and what its training kept and took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prac.lab.measured import training

if TYPE_CHECKING:
    from prac.convert.handle import Handle
    from prac.lab import methods
    from prac.lab.materials import tokens
    from prac.lab.report import results
    from prac.lab.runs.options import Options
    from prac.lab.runs.trainer import LabTrainer

# The first of these that there is: on CPU a process is mostly its libraries, so there a step is measured by itself.
PEAKS = ("peak_cuda_bytes", "peak_step_bytes", "peak_process_bytes")


@dataclass(frozen=True)
class Trained:
    """A run that has been trained; ``peak`` is its memory by the names of :data:`PEAKS`."""

    options: Options
    method: methods.Method
    trainer: LabTrainer
    blocks: tokens.Blocks
    peak: dict[str, int]


def measured(run: Trained, handle: Handle | None) -> tuple[results.Row, dict[str, Any]]:
    """Validate with all blocks and measure one batch; returns the row of the run and what goes beside it."""
    trainer, options, blocks = run.trainer, run.options, run.blocks
    arguments, model, peak = trainer.args, trainer.model, dict(run.peak)
    val_loss = trainer.evaluate(blocks.validation)["eval_loss"]
    batch = {name: tensor.to(arguments.device) for name, tensor in next(iter(trainer.get_train_dataloader())).items()}
    # A compiled model keeps what its graphs keep; the module inside of it has none.
    trained = trainer.model_wrapped if run.method.compiled else model
    kept = training.kept_by_layer(trained, batch, arguments.bf16)
    if arguments.world_size == 1:
        step = training.step(trained, batch, trainer.optimizer, arguments.bf16)
        peak["peak_step_bytes"] = step.peak
        if run.method.selective:  # its cache is out of sight of what counts by layer
            rest = step.activations - sum(layer["bytes"] for layer in kept)
            kept.append({"module": "", "block": None, "kind": "checkpoint", "bytes": rest})
    row = {
        "method": options.method,
        "seed": options.seed,
        "model": options.model,
        "data": options.data,
        "tokenizer": options.tokenizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "val_loss": val_loss,
        "val_ppl": training.perplexity(val_loss),
        "val_tokens": len(blocks.validation) * options.seq_len,
        "unigram_entropy": blocks.unigram_entropy,
        "peak_bytes": next(peak[name] for name in PEAKS if name in peak),
        **peak,
        "kept_bytes": sum(layer["bytes"] for layer in kept),
        "kept_tokens": batch["input_ids"].numel(),
        "device": str(arguments.device),
        "processes": arguments.world_size,
        "threads": torch.get_num_threads(),
    }
    details: dict[str, Any] = {"kept_by_layer": kept, "summary": None, "reconstruction_error": None}
    if handle is not None:
        details |= {"summary": handle.summary(), "reconstruction_error": handle.reconstruction_error(batch)}
    return row, details
