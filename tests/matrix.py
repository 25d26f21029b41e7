"""The matrix of what people train with: model × dtype × loop × wrapper × preset, one check for each cell.

A cell trains a small model three times on one batch: with nothing lost (rank n, or 32 bits), which must change the
weights as plain training without prac does; then with the preset, whose loss must fall and which must keep the bytes
that it keeps without the wrapper. What cannot work must say so: see :data:`refusal`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from training import LOOP, SEVERAL, Cell, batch_for, made, whole

import prac
from prac.layers import Compressed
from prac.memory import track_kept

MODELS = ("llama", "gpt2", "bert", "vit")
DTYPES = ("fp32", "bf16 autocast", "pure bf16")
LOOPS = tuple(LOOP)
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
PRESETS = ("paper", "lean")

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


def cells(wrappers: tuple[str, ...]) -> list[Cell]:
    """All with these wrappers."""
    return [Cell(*each) for each in itertools.product(MODELS, DTYPES, LOOPS, wrappers, PRESETS)]


def takes_long(cell: Cell) -> bool:
    """What is left to ``make test-long``: whose graphs take seconds to trace, and what differs least from the rest."""
    if cell.wrapper == "compile":
        return cell.loop != "plain loop" or cell.dtype != "fp32" or (cell.preset == "paper" and cell.model != "llama")
    if cell.wrapper in SEVERAL:  # of two wrappers and two loops each is run once
        once = {"DDP": "Trainer", "FSDP2": "plain loop"}
        return cell.dtype == "pure bf16" or cell.loop != once[cell.wrapper]
    # What a loop adds to autocast is a context, and what it does with a wrapper is the same for either preset.
    alone = cell.wrapper == "none"
    return cell.loop != "plain loop" and (
        cell.dtype == "pure bf16" or (not alone and (cell.dtype != "fp32" or cell.preset == "paper"))
    )


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
    long = [cell for cell in everything if takes_long(cell)]
    refused = [cell for cell in everything if expected(cell) != "passes"]
    lines = [
        "# What it works with",
        "",
        f"{len(everything)} combinations of model, dtype, training loop, wrapper and preset, each trained on a small",
        f"model by `tests/matrix.py`: {len(everything) - len(refused)} pass, {len(refused)} are refused with an error",
        "that says why. This page is generated from what the tests assert (`python tests/test_matrix.py`), of which",
        f"`make test` runs {len(everything) - len(long)} combinations and `make test-long` the other {len(long)}",
        "([its last output](../benchmarks/results/test-long.txt)).",
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
