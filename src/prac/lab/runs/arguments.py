"""What the ``Trainer`` is told for the options of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments

from prac.lab import methods
from prac.lab.runs.options import Options


def training_arguments(options: Options, method: methods.Method, out: Path) -> TrainingArguments:
    """Those of one run; made first, since it is by them that several processes get to know of each other."""
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
        save_total_limit=None,  # it would count copies of checkpoints, and delete them
        logging_steps=max(1, options.steps // 1000),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        report_to="none",
    )


def quiet() -> None:
    """No chatter of the libraries below: the progress bar and the table say what there is to say."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
