"""One training run: one method, one seed, on the Hugging Face ``Trainer``."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

import prac
from prac import files
from prac.lab import checkpoints, data, measure, methods, models, optimizers, peers, results, run_folder, tokens
from prac.lab.callbacks import Layers, Metrics, Progress, Spectra
from prac.lab.options import Options
from prac.lab.trainer import LastingTrainer
from prac.lab.turns import Turns

if TYPE_CHECKING:
    from torch import Tensor, nn


def prepare(options: Options) -> tuple[Any, tokens.Blocks]:
    """The tokenizer and the packed data; the work is done once and cached."""
    _quiet()
    models.check(options.model)
    cache = files.cache_folder()
    corpus = data.load(options.data, options.split, options.text_column, options.max_tokens)
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
        out: the run folder. It must not hold a run yet, unless ``resume``.
        resume: go on from the newest whole checkpoint in ``out``, if there is one.
        callbacks: further ``Trainer`` callbacks.
        overwrite: delete the run that there is in ``out``.

    Raises:
        ValueError: for options that do not fit each other, the data or the run to resume, and for a checkpoint that was
            damaged.
    """
    started = time.perf_counter()
    method = methods.parse(options.method)
    peers.limit_compiled_memory(method.budget)
    arguments = _arguments(options, method, out)  # from here on the processes know of each other
    peers.check_device(method, arguments.device)
    if method.lora and options.model in models.SIZES:
        raise ValueError(f"{method.name}: adapters on frozen random weights learn nothing; give a pretrained --model.")
    if options.fsdp and arguments.world_size == 1:
        raise ValueError(
            "--fsdp shards over several processes: start it as torchrun --nproc-per-node 2 -m prac train … --fsdp."
        )
    if arguments.world_size > 1 and method.optimizer != "adamw":
        raise ValueError(f"{method.name}: its optimizer sees the whole gradient only in a single process.")
    with arguments.main_process_first(local=False):
        main = arguments.process_index == 0
        if overwrite and main:
            run_folder.clear(out)
        if resume and (done := run_folder.finished(options, out)):
            return done
        if not resume and main:
            run_folder.check_free(out)
        checkpoint = checkpoints.newest(out)
        if checkpoint is not None and main:
            checkpoints.check(checkpoint)
        tokenizer, blocks = prepare(options)
        if main:
            run_folder.claim(out, options)

    set_seed(options.seed)
    model = models.build(options.model, tokenizer, options.seq_len)
    loss = _chunk_loss(model, options.loss)
    if method.lora:
        model = peers.adapt(model, method.velora)
    handle = None
    if options.config is not None:
        handle = prac.compress(model, options.config, include=options.include, exclude=options.exclude)
        if checkpoint is not None:
            handle.load(checkpoint)
        elif options.config.T1 is None:
            _calibrate(handle, blocks, options, arguments)
    peers.wrap(model, method)
    for name, value in optimizers.arguments(method, model, options).items():
        setattr(arguments, name, value)

    spectra_batch = collate([blocks.validation[i] for i in range(min(len(blocks.validation), 4 * options.batch_size))])
    metrics = Metrics(out / "metrics.jsonl")
    trainer = LastingTrainer(
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
            Spectra(out / "spectrum.json", measure.middle_linear(model), spectra_batch),
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
    gc.collect()
    measure.reset_peak()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    peak = {"peak_process_bytes": measure.peak_process_bytes()}
    if torch.cuda.is_available():
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()

    trainer.remove_callback(TensorBoardCallback)  # it would open a folder of its own
    val_loss = trainer.evaluate(blocks.validation)["eval_loss"]
    batch = {name: tensor.to(arguments.device) for name, tensor in next(iter(trainer.get_train_dataloader())).items()}
    # A compiled model keeps what its graphs keep; the module inside of it has none.
    trained = trainer.model_wrapped if method.compiled else model
    kept = measure.kept_by_layer(trained, batch, arguments.bf16)
    if arguments.world_size == 1:
        step = measure.step(trained, batch, trainer.optimizer, arguments.bf16)
        peak["peak_step_bytes"] = step.peak
        if method.selective:  # its cache is out of sight of what counts by layer
            rest = step.activations - sum(layer["bytes"] for layer in kept)
            kept.append({"module": "", "block": None, "kind": "selective checkpoints", "bytes": rest})
    row = {
        "method": options.method,
        "seed": options.seed,
        "model": options.model,
        "data": options.data,
        "tokenizer": options.tokenizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "val_loss": val_loss,
        "val_ppl": measure.perplexity(val_loss),
        "val_tokens": len(blocks.validation) * options.seq_len,
        "unigram_entropy": blocks.unigram_entropy,
        "peak_bytes": next(peak[name] for name in PEAKS if name in peak),
        **peak,
        "tokens_per_s": metrics.tokens_per_s,
        "train_s": metrics.elapsed,
        "wall_s": time.perf_counter() - started,
        "device": str(arguments.device),
        "processes": arguments.world_size,
        "threads": torch.get_num_threads(),
        "out": str(out),
    }
    row["kept_bytes"] = sum(layer["bytes"] for layer in kept)
    row["kept_tokens"] = batch["input_ids"].numel()
    details: dict[str, Any] = {"kept_by_layer": kept, "summary": None, "reconstruction_error": None}
    if handle is not None:
        details |= {"summary": handle.summary(), "reconstruction_error": handle.reconstruction_error(batch)}
    if options.fsdp:  # its checkpoints are in shards
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_world_process_zero():
            model.save_pretrained(out / "model", state_dict=weights)
    if trainer.is_world_process_zero():
        result = results.document("train", [row])
        files.write_json(out / "result.json", result | {"options": options.to_dict()} | details)
    return row


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


# The first of these that there is: on CPU a process is mostly its libraries, so there a step is measured by itself.
PEAKS = ("peak_cuda_bytes", "peak_step_bytes", "peak_process_bytes")
CALIBRATION = 8  # batches, for bases that are made once


def _calibrate(handle: prac.Handle, blocks: tokens.Blocks, options: Options, arguments: TrainingArguments) -> None:
    """Make the bases of the first training blocks, before the first step."""
    size = options.batch_size
    count = min(CALIBRATION, len(blocks.train) // size)
    handle.model.to(arguments.device)
    batches = (collate([blocks.train[i * size + j] for j in range(size)]) for i in range(count))
    prac.calibrate(handle, ({k: v.to(arguments.device) for k, v in batch.items()} for batch in batches))


def _arguments(options: Options, method: methods.Method, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        torch_compile=method.compiled,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=options.warmup_steps,
        bf16=options.bf16,
        ddp_find_unused_parameters=False,
        fsdp=options.fsdp,
        fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"} if options.fsdp else None,
        use_cpu=not torch.accelerator.is_available(),  # else it refuses bf16
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every or None,
        prediction_loss_only=True,
        label_names=["labels"],  # which it cannot find out of a model with adapters
        # Without --save-every there is just the checkpoint that the Trainer makes after the last step.
        save_strategy="steps",
        save_steps=options.save_every or options.steps,
        # Two, since the older one goes before the newer one is whole.
        save_total_limit=2,
        logging_steps=max(1, options.steps // 1000),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        report_to="none",
    )


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


def _quiet() -> None:
    """No chatter of the libraries below: the progress bar and the table say what there is to say."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
