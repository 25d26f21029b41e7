"""The matrix of what people train with: model × dtype × loop × wrapper × preset, one check for each cell.

A cell trains a small model three times on one batch: with nothing lost (rank n, or 32 bits), which must change the
weights as plain training without prac does; then with the preset, whose loss must fall and which must keep the bytes
that it keeps without the wrapper. What cannot work must say so: see :data:`REFUSED`.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from models import VOCAB, build
from torch import Tensor, nn

import prac
from prac.layers import Compressed
from prac.memory import track_kept

MODELS = ("llama", "gpt2", "bert", "vit")
DTYPES = ("fp32", "bf16 autocast", "pure bf16")
LOOPS = ("plain loop", "Trainer", "Accelerate")
HERE = (
    "none",
    "checkpointing",
    "checkpointing, reentrant",
    "accumulation",
    "LoRA",
    "4-bit base",
    "compile",
    "fullgraph",
)
SEVERAL = ("DDP", "FSDP2")  # need processes
PRESETS = ("paper", "lean")
STEPS, LR = 3, 0.1

FULL = prac.Bits(32)
LOSSLESS = {
    "paper": prac.Config(
        linear=prac.Rank(1.0, 0.0), norm=prac.Rank(1.0, 0.0), activation=prac.Rank(1.0, 0.0), min_width=1
    ),
    "lean": prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1),
}
# Relative error of the weights' change that the dtype explains.
TOLERANCE = {"fp32": 1e-3, "bf16 autocast": 0.05, "pure bf16": 0.2}
# What cannot work, and what it says.
GRAPHS = "prac keeps activations outside of graphs"
TWICE = "Invariant encountered: value was None when it should not be"  # accelerate 1.15, with or without prac


class Cell(NamedTuple):
    """One combination."""

    model: str
    dtype: str
    loop: str
    wrapper: str
    preset: str

    def __str__(self) -> str:
        return "-".join(self)


def cells(wrappers: tuple[str, ...]) -> list[Cell]:
    """All with these wrappers."""
    return [Cell(*each) for each in itertools.product(MODELS, DTYPES, LOOPS, wrappers, PRESETS)]


def run(cell: Cell) -> str:
    """``passes``, or ``refused: `` and the reason; an AssertionError for anything else."""
    try:
        check(cell)
    except (RuntimeError, TypeError) as error:
        if not refusal(cell) or refusal(cell) not in str(error):
            raise
        return f"refused: {refusal(cell)}"
    return "passes"


def refusal(cell: Cell) -> str:
    """What a cell that cannot work is to say; "" for one that can."""
    if cell.wrapper == "fullgraph":
        return GRAPHS
    if cell.wrapper == "FSDP2" and cell.model in ("bert", "vit") and cell.loop != "plain loop":
        return TWICE
    return ""


def check(cell: Cell) -> None:
    """The three trainings of a cell."""
    before, expected, kept_plain, kept_alone = reference(cell)
    exact = train(cell, LOSSLESS[cell.preset])
    error, size = distance(exact.weights, expected), distance(expected, before)
    assert error <= TOLERANCE[cell.dtype] * size, f"weights are off by {error / size:.2g} where nothing is lost"
    trained = train(cell, prac.PRESETS[cell.preset].replace(min_width=8))
    assert trained.losses[-1] < trained.losses[0], f"the loss does not fall: {trained.losses}"
    if "checkpointing" in cell.wrapper:  # inputs of blocks, whatever is in them
        assert trained.kept < 0.6 * kept_plain
    else:
        # In graphs transformers makes an attention mask that it leaves out otherwise; models this small show it.
        tolerance = 0.08 if cell.wrapper == "compile" else 0.05
        share = 0.5 if cell.wrapper in SEVERAL and cell.loop != "Trainer" else 1.0  # the reference's part of the batch
        most = (share + tolerance) * kept_alone
        # FSDP2 has a mixed precision of its own, all in bfloat16, where autocast runs norms in float32.
        least = 0 if cell.wrapper == "FSDP2" and cell.dtype == "bf16 autocast" else (share - tolerance) * kept_alone
        assert least <= trained.kept <= most, f"keeps {trained.kept}, alone {kept_alone}"
        assert trained.kept < 0.85 * share * kept_plain, f"keeps {trained.kept}, without prac {kept_plain}"


# --- training ----------------------------------------------------------------------------------


@dataclass
class Trained:
    """What a training left: the weights, its losses, and the bytes that a forward pass keeps."""

    weights: dict[str, Tensor]
    losses: list[float]
    kept: int


def train(cell: Cell, config: prac.Config | None) -> Trained:
    """Train a fresh model as the cell says; ``config`` None for without prac."""
    model, batch = made(cell.model, cell.dtype, cell.wrapper), batch_for(cell.model, cell.dtype)
    if config is not None:
        prac.compress(model, config)
        assert any(isinstance(module, Compressed) for module in model.modules())
    losses, forward = LOOP[cell.loop](model, batch, cell)
    model.train()
    with track_kept(model, batch) as kept:
        forward()
    weights = {name: whole(p).detach().float().clone() for name, p in model.named_parameters()}
    return Trained(weights, losses, kept.total)


def reference(cell: Cell) -> tuple[Any, Any, int, int]:
    """Weights before and after training without prac and without the wrapper; bytes kept, and the preset's.

    In a plain loop and one process; or with the Trainer and with the wrapper, since it counts tokens in a way of its
    own, and BERT's loss as many times as there are micro-batches or processes.
    """
    variant = {"LoRA": "LoRA", "4-bit base": "4-bit base", "compile": "one layer"}.get(cell.wrapper, "none")
    loop = "Trainer" if cell.loop == "Trainer" else "plain loop"
    if loop == "Trainer" and cell.wrapper in ("accumulation", *SEVERAL):
        variant = cell.wrapper
    return _reference(cell._replace(loop=loop, wrapper=variant))


@functools.cache
def _reference(alone: Cell) -> tuple[Any, Any, int, int]:
    before = {name: p.detach().float() for name, p in made(alone.model, alone.dtype, alone.wrapper).named_parameters()}
    plain = train(alone, None)
    ours = train(alone, prac.PRESETS[alone.preset].replace(min_width=8))
    return before, plain.weights, plain.kept, ours.kept


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
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": "reentrant" in wrapper})
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


def autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16 autocast")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


Ran = tuple[list[float], Callable[[], Any]]


def plain_loop(model: nn.Module, batch: dict[str, Tensor], cell: Cell) -> Ran:
    ready = wrapped(model, cell.wrapper)
    optimizer, losses = sgd(ready), []
    mine = share(batch)
    parts = halves(mine) if cell.wrapper == "accumulation" else [mine]

    def forward() -> Tensor:
        with autocast(cell.dtype):
            return ready(**mine).loss

    for _ in range(STEPS + 1):
        found = []
        for part in parts:
            with autocast(cell.dtype):
                loss = ready(**part).loss
            (loss / len(parts)).backward()
            found.append(loss.item())
        losses.append(mean(found))
        if len(losses) <= STEPS:
            optimizer.step()
        optimizer.zero_grad()
    return losses, forward


def accelerate_loop(model: nn.Module, batch: dict[str, Tensor], cell: Cell) -> Ran:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prac.lab.checkpoints import shard_on_cpu

    AcceleratorState._reset_state()  # it keeps the settings of the first one
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

    from prac.lab.checkpoints import LastingTrainer

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
        if cell.wrapper in ("compile", "fullgraph"):
            torch._dynamo.reset()
        inside = wrapped(model, cell.wrapper) if cell.wrapper == "fullgraph" else model
        rows = [{name: t[i] for name, t in batch.items()} for i in range(count)]
        trainer = LastingTrainer(
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


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference of all weights."""
    assert len(a) == len(b)
    squares = [(x - y).double().square().sum().item() for x, y in zip(a.values(), b.values(), strict=True)]
    return sum(squares) ** 0.5


# --- the table --------------------------------------------------------------------------------------


def expected(cell: Cell) -> str:
    """What :func:`run` is to return."""
    return f"refused: {refusal(cell)}" if refusal(cell) else "passes"


def table() -> str:
    """The page for the docs: a row for each wrapper and dtype, a column for each model and preset."""
    everything = cells((*HERE, *SEVERAL))
    columns = list(itertools.product(MODELS, PRESETS))
    refused = [cell for cell in everything if expected(cell) != "passes"]
    lines = [
        "# What it works with",
        "",
        f"{len(everything)} combinations of model, dtype, training loop, wrapper and preset, each trained on a small",
        f"model by `tests/matrix.py`: {len(everything) - len(refused)} pass, {len(refused)} are refused with an error",
        "that says why. This page is generated from what the tests assert (`python tests/test_matrix.py`).",
        "",
        "A combination passes if (1) with nothing lost (rank n, or 32 bits) three steps of training change the weights",
        "as training without prac does, to the accuracy of the dtype; (2) with the preset the loss falls; (3) a",
        "forward pass keeps the bytes that it keeps without the wrapper, within 5% (8% in graphs of torch.compile,",
        "where transformers adds a mask), and at most 85% of plain's. Under checkpointing it keeps the blocks' inputs.",
        "",
        "Each cell stands for three training loops: plain PyTorch, the `Trainer` and Accelerate. DDP and FSDP2 run in",
        "two processes that share the batch; their weights are compared with those of one process on the whole batch.",
        "",
        "| wrapper | dtype | " + " | ".join(f"{model} {preset}" for model, preset in columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for wrapper, dtype in itertools.product((*HERE, *SEVERAL), DTYPES):
        outcomes = []
        for model, preset in columns:
            found = {expected(Cell(model, dtype, loop, wrapper, preset)) for loop in LOOPS}
            outcomes.append(" / ".join(sorted({outcome.partition(":")[0] for outcome in found})))
        lines.append(f"| {wrapper} | {dtype} | " + " | ".join(outcomes) + " |")
    lines += [
        "",
        "Refused:",
        "",
        f"- `fullgraph`, “{GRAPHS}”: a compressed layer is left out of the graphs of torch.compile in",
        "  training, so there cannot be one graph. In eval mode there is (`tests/test_compile.py`).",
        f"- FSDP2 for BERT and ViT by the `Trainer` and Accelerate, “{TWICE}”:",
        "  accelerate 1.15 shards their embeddings twice, with or without prac. In a plain loop it passes.",
        "",
        "The 4-bit base is bitsandbytes' NF4, with LoRA. On CPU, accelerate leaves FSDP2 out; `prac.lab` lets it in.",
        "",
    ]
    return "\n".join(lines)
