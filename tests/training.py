"""Small models trained in the ways that people train: loops, wrappers and dtypes, for the matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import VOCAB, build
from torch import Tensor, nn

from prac.lab.methods.peers import checkpoint_blocks

SEVERAL = ("DDP", "FSDP2")  # wrappers that need processes
STEPS, LR = 3, 0.1


class Cell(NamedTuple):
    """One combination."""

    model: str
    dtype: str
    loop: str
    wrapper: str
    preset: str

    def __str__(self) -> str:
        return "-".join(self)


def made(family: str, dtype: str, wrapper: str) -> nn.Module:
    """The model, with what is put into it before prac."""
    model = build(family)
    if hasattr(model, "config"):
        model.config.use_cache = False
    if wrapper in ("compile", "one layer"):  # tracing takes most of the time
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                del module[1:]
        model.config.num_hidden_layers = 1
    if wrapper == "4-bit base":
        quantise(model)
    if wrapper in ("LoRA", "4-bit base"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        targets = (
            "all-linear" if wrapper == "LoRA" else [n.split(".")[-1] for n, m in model.named_modules() if is_4bit(m)]
        )
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide errors
                nn.init.normal_(parameter, std=0.1)
    if dtype == "pure bf16":
        model.to(torch.bfloat16)
    if "checkpointing" in wrapper:
        checkpoint_blocks(model, reentrant="reentrant" in wrapper)
    return model.train()


def batch_for(family: str, dtype: str) -> dict[str, Tensor]:
    """Eight samples, so that half of them are more tokens than any rank."""
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        pixels = torch.randn(8, 3, 24, 24, generator=generator)
        batch = {"pixel_values": pixels.bfloat16() if dtype == "pure bf16" else pixels}
    else:
        batch = {"input_ids": torch.randint(3, VOCAB, (8, 17), generator=generator)}
    causal = family in ("llama", "gpt2")
    return batch | {"labels": batch["input_ids"] if causal else torch.arange(8) % 2}


def is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def quantise(model: nn.Module) -> None:
    """Linear layers of the blocks to bitsandbytes' 4 bits, as transformers does it when it loads a model so."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        is_conv1d = type(module).__name__ == "Conv1D"
        if not (is_conv1d or type(module) is nn.Linear) or not any(part.isdigit() for part in name.split(".")):
            continue
        weight = module.weight.data.T if is_conv1d else module.weight.data
        new = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(weight.contiguous().clone(), requires_grad=False, quant_type="nf4")
        new.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))


def wrapped(model: nn.Module, wrapper: str) -> Any:
    """The model, with what is put around it after prac."""
    if wrapper in ("compile", "fullgraph"):
        torch._dynamo.reset()
        return torch.compile(model, backend="eager", fullgraph=wrapper == "fullgraph")
    if wrapper == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for name, module in model.named_modules():
            if name.rpartition(".")[2].isdigit():
                fully_shard(module)
        return fully_shard(model)
    return model


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Two micro-batches."""
    return [{name: t.chunk(2)[i] for name, t in batch.items()} for i in range(2)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


Ran = tuple[list[float], Callable[[], Any]]


def plain_loop(model: nn.Module, batch: dict[str, Tensor], cell: Cell) -> Ran:
    ready = wrapped(model, cell.wrapper)
    optimizer, losses = sgd(ready), []
    mine = share(batch)
    parts = halves(mine) if cell.wrapper == "accumulation" else [mine]

    def forward(part: dict[str, Tensor] = mine) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cell.dtype == "bf16 autocast"):
            return ready(**part).loss

    for _ in range(STEPS + 1):
        found = []
        for part in parts:
            loss = forward(part)
            (loss / len(parts)).backward()
            found.append(loss.item())
        losses.append(mean(found))
        if len(losses) <= STEPS:
            optimizer.step()
        optimizer.zero_grad()
    return losses, forward


def accelerate_loop(model: nn.Module, batch: dict[str, Tensor], cell: Cell) -> Ran:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from prac.lab.runs.trainer import shard_on_cpu

    AcceleratorState._reset_state()  # they keep the settings of the first one
    GradientState._reset_state()
    accumulation = 2 if cell.wrapper == "accumulation" else 1
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if cell.dtype == "bf16 autocast" else "no",
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    if cell.wrapper == "FSDP2":
        shard_on_cpu(accelerator, {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"})
    around = model if cell.wrapper in SEVERAL else wrapped(model, cell.wrapper)
    ready, optimizer = accelerator.prepare(around, sgd(around))
    losses, mine = [], share(batch)
    for _ in range(STEPS + 1):
        found = []
        for part in halves(mine) if accumulation == 2 else [mine]:
            with accelerator.accumulate(ready):
                loss = ready(**part).loss
                accelerator.backward(loss)
                if len(losses) < STEPS:
                    optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        losses.append(mean(found))
    return losses, lambda: ready(**mine)


def trainer_loop(model: nn.Module, batch: dict[str, Tensor], cell: Cell) -> Ran:
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    from prac.lab.runs.trainer import LabTrainer

    count = len(batch["labels"])
    per_device = len(share(batch)["labels"]) // (2 if cell.wrapper == "accumulation" else 1)
    fsdp = cell.wrapper == "FSDP2"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=per_device, report_to="none",
            gradient_accumulation_steps=2 if cell.wrapper == "accumulation" else 1, save_strategy="no",
            logging_steps=1, use_cpu=True, bf16=cell.dtype == "bf16 autocast", max_grad_norm=0.0, disable_tqdm=True,
            dataloader_pin_memory=False, lr_scheduler_type="constant", torch_compile=cell.wrapper == "compile",
            torch_compile_backend="eager" if cell.wrapper == "compile" else None,
            fsdp=fsdp, fsdp_config={} if fsdp else None, remove_unused_columns=False,
        )  # fmt: skip
        torch._dynamo.reset()
        inside = wrapped(model, cell.wrapper) if cell.wrapper == "fullgraph" else model
        rows = [{name: t[i] for name, t in batch.items()} for i in range(count)]
        trainer = LabTrainer(
            model=inside, args=arguments, train_dataset=rows * STEPS, data_collator=stacked,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR}),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    mine = share(batch)

    def forward() -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model_wrapped, dict(mine))

    return losses, forward


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


LOOP = {"plain loop": plain_loop, "Trainer": trainer_loop, "Accelerate": accelerate_loop}

# --- several processes ----------------------------------------------------------------------------


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of a batch."""
    if not torch.distributed.is_initialized():
        return batch
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {name: t.chunk(size)[rank] for name, t in batch.items()}


def mean(losses: list[float]) -> float:
    """Over micro-batches and processes."""
    found = torch.tensor(losses).mean()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.SUM)
        found /= torch.distributed.get_world_size()
    return found.item()


def whole(p: Tensor) -> Tensor:
    """A parameter that may be in shards."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p
