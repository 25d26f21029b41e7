"""One training run: one method, one seed, on the Hugging Face ``Trainer``."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

import prac
from prac.convert.calibrate import calibrate
from prac.integrations.transformers import checkpoint_folder
from prac.lab import methods
from prac.lab.materials import data, models, tokens, weights
from prac.lab.materials.cache import cache_folder
from prac.lab.measured import training
from prac.lab.methods import optimizers, peers
from prac.lab.report import results
from prac.lab.runs import checkpoints, outcome, ownership, run_folder
from prac.lab.runs.arguments import quiet, training_arguments
from prac.lab.runs.callbacks import Layers, Metrics, Progress, Spectra
from prac.lab.runs.options import Options
from prac.lab.runs.trainer import LabTrainer
from prac.lab.runs.turns import Turns
from prac.runtime import files

if TYPE_CHECKING:
    from torch import Tensor, nn


def prepare(options: Options) -> tuple[Any, tokens.Blocks]:
    """The tokenizer and the packed data; the work is done once and cached."""
    quiet()
    models.check(options.model)
    cache = cache_folder()
    corpus = data.load(options.data, options.split, options.text_field, options.max_tokens)
    tokenizer = tokens.load_tokenizer(options.tokenizer, corpus, cache)
    blocks = tokens.load_blocks(corpus, tokenizer, options.seq_len, options.max_tokens, cache)
    needed = options.batch_size * options.grad_accum
    if len(blocks.train) < needed:
        raise ValueError(
            f"{options.data} gives {len(blocks.train)} training blocks of {options.seq_len} tokens, one step takes "
            f"{needed}: lower --batch-size, --grad-accum or --seq-len, or give more text."
        )
    return tokenizer, blocks


def run(
    options: Options,
    out: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    overwrite: bool = False,
) -> results.Row:
    """Train, validate, measure; leave everything in ``out`` and return the result row.

    Args:
        options: what to run.
        out: the run folder. It must not hold a run yet, unless ``resume``, nor anything that prac did not make.
        resume: go on from the newest whole checkpoint in ``out``, if there is one.
        callbacks: further ``Trainer`` callbacks.
        overwrite: delete the run that there is in ``out``, once the new one is sure to start.

    Raises:
        ValueError: for options that do not fit each other, the data or the run to resume, for a folder that is not to
            be written to, and for a checkpoint that was damaged.
        RuntimeError: if a checkpoint or the model cannot be written; the run is then not complete.
    """
    method = methods.parse(options.method)
    peers.limit_compiled_memory(method.budget)
    arguments = training_arguments(options, method, out)  # from here on the processes know of each other
    _check(options, method, arguments)
    ownership.check_apart(options, out)
    with ownership.held(out) if arguments.process_index == 0 else nullcontext():
        return _run(options, method, arguments, out, resume, callbacks, overwrite)


def _check(options: Options, method: methods.Method, arguments: TrainingArguments) -> None:
    """Refuse what cannot be trained like this."""
    peers.check_device(method, arguments.device)
    if method.lora and options.model in models.SIZES:
        raise ValueError(f"{method.name}: adapters on frozen random weights learn nothing; give a pretrained --model.")
    if options.fsdp and arguments.world_size == 1:
        raise ValueError(
            "--fsdp shards over several processes: start it as torchrun --nproc-per-node 2 -m prac train … --fsdp."
        )
    if arguments.world_size > 1 and method.optimizer != "adamw":
        raise ValueError(f"{method.name}: its optimizer sees the whole gradient only in a single process.")


def _run(
    options: Options, method: methods.Method, arguments: TrainingArguments, out: Path, resume: bool,
    callbacks: Sequence[TrainerCallback], overwrite: bool,
) -> results.Row:  # fmt: skip
    """Read, make, train, keep, measure."""
    started = time.perf_counter()
    main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if not (resume or overwrite):
            run_folder.check_free(out)
        tokenizer, blocks = prepare(options)
        if resume and (done := run_folder.finished(options, out, blocks.read)):
            return done
        checkpoint = _checkpoint(out, main) if resume else None

    set_seed(options.seed)
    model, handle, loss = _model(options, method, tokenizer, checkpoint)
    if handle is not None and checkpoint is None and handle.config.T1 is None:
        _calibrate(handle, blocks, options, arguments)
    peers.wrap(model, method)
    for name, value in optimizers.arguments(method, model, options).items():
        setattr(arguments, name, value)
    if main:  # whatever can be refused has been
        run_folder.claim(out, options, blocks.read, fresh=checkpoint is None)

    metrics = Metrics(out / "metrics.jsonl")
    trainer = _trainer(
        options, method, arguments, out, model, handle, tokenizer, blocks, checkpoint, metrics, callbacks
    )
    peak = _train(trainer, out, checkpoint)
    _keep_model(options, trainer, out)
    row, details = outcome.measured(outcome.Trained(options, method, trainer, blocks, peak), handle)
    row |= {"loss": loss, "tokens_per_s": metrics.tokens_per_s, "train_s": metrics.elapsed}
    row |= {"wall_s": time.perf_counter() - started, "out": str(out)}
    if main:
        result = results.document("train", [row])
        files.write_json(out / "result.json", result | {"options": options.to_dict()} | details)
    return row


def _checkpoint(out: Path, main: bool) -> Path | None:
    """The newest whole checkpoint in ``out``; the main process checks it, or says that there is none."""
    checkpoint = checkpoints.newest(out)
    if main and checkpoint is None:
        print(f"prac: {out} holds no checkpoint to go on from: a new run begins.", file=sys.stderr)
    if main and checkpoint is not None:
        checkpoints.check(checkpoint)
    return checkpoint


def _train(trainer: LabTrainer, out: Path, checkpoint: Path | None) -> dict[str, int]:
    """Train, from the checkpoint if there is one; the peaks of memory, by name."""
    gc.collect()
    training.reset_peak()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:  # of what callbacks write
        here = checkpoint_folder(trainer.args, trainer.state)
        what = Path(error.filename or out)
        tokenizer = trainer.processing_class
        raise checkpoints.ended(what, error, here, trainer.args, trainer.model, tokenizer) from error
    peak = {"peak_process_bytes": training.peak_process_bytes()}
    if torch.cuda.is_available():
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    trainer.remove_callback(TensorBoardCallback)  # it would open a folder of its own
    return peak


def _model(
    options: Options, method: methods.Method, tokenizer: Any, checkpoint: Path | None
) -> tuple[nn.Module, prac.Handle | None, str]:
    """The model, compressed if it is to be; and which loss it has."""
    model: nn.Module = models.build(options.model, tokenizer, options.seq_len)
    loss = _chunk_loss(model, options.loss)
    if method.lora:
        model = peers.adapt(model, method.velora)
    handle = None
    if options.config is not None:
        handle = prac.compress(model, options.config, include=options.include, exclude=options.exclude)
        if checkpoint is not None:
            handle.load(checkpoint)
    return model, handle, loss


def _trainer(
    options: Options, method: methods.Method, arguments: TrainingArguments, out: Path, model: nn.Module,
    handle: prac.Handle | None, tokenizer: Any, blocks: tokens.Blocks, checkpoint: Path | None, metrics: Metrics,
    callbacks: Sequence[TrainerCallback],
) -> LabTrainer:  # fmt: skip
    spectra_batch = collate([blocks.validation[i] for i in range(min(len(blocks.validation), 4 * options.batch_size))])
    trainer = LabTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks.train,
        eval_dataset=_sample(blocks.validation, options.eval_blocks),
        data_collator=collate,
        processing_class=tokenizer,
        optimizers=(optimizers.make(method, model, options), None),
        callbacks=[
            metrics,
            Progress(f"{options.method} seed {options.seed}"),
            checkpoints.Seal(handle),
            Spectra(out / "spectrum.json", training.middle_linear(model), spectra_batch),
            *(_tensorboard(out, checkpoint) if arguments.process_index == 0 else ()),
            *Turns.wanted(metrics),
            *callbacks,
        ],
    )
    if handle is not None:
        every = options.eval_every or max(1, options.steps // 10)
        if not method.compiled:  # what is measured is run again in parts, each of which would be compiled
            trainer.add_callback(Layers(handle, trainer, every, out / run_folder.LAYERS, metrics))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _keep_model(options: Options, trainer: LabTrainer, out: Path) -> None:
    """Write the trained model for whoever uses it next; one in shards is put together first."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(trainer.model, options=whole) if options.fsdp else None
    if trainer.is_world_process_zero():
        weights.save(trainer.model, trainer.processing_class, out / weights.MODEL, state)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of blocks: ``input_ids`` and ``labels``, both batch × seq_len; the model shifts the labels itself."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _chunk_loss(model: nn.Module, wanted: str) -> str:
    """Put the chunked loss into the model if it is wanted, or may be had; returns which one it has."""
    if wanted != "plain":
        try:
            prac.ChunkedLoss(model, always=True)  # nobody here looks at logits
            return "chunked"
        except ValueError:
            if wanted == "chunked":
                raise
    return "plain"


CALIBRATION = 8  # batches, for bases that are made once


def _calibrate(handle: prac.Handle, blocks: tokens.Blocks, options: Options, arguments: TrainingArguments) -> None:
    """Make the bases of the first training blocks, before the first step."""
    size = options.batch_size
    count = min(CALIBRATION, len(blocks.train) // size)
    handle.model.to(arguments.device)
    batches = (collate([blocks.train[i * size + j] for j in range(size)]) for i in range(count))
    calibrate(handle, ({k: v.to(arguments.device) for k, v in batch.items()} for batch in batches))


def _sample(blocks: Any, count: int) -> Any:
    """At most ``count`` blocks, evenly spaced."""
    count = min(count, len(blocks))
    return blocks.select([index * len(blocks) // count for index in range(count)])


def _tensorboard(out: Path, checkpoint: Path | None) -> list[TrainerCallback]:
    if find_spec("tensorboard") is None:
        return []
    from torch.utils.tensorboard import SummaryWriter

    step = None if checkpoint is None else checkpoints.step(checkpoint) + 1
    return [TensorBoardCallback(SummaryWriter(str(out / "tensorboard"), purge_step=step))]
