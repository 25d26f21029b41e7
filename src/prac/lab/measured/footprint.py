"""The predicted memory of methods side by side: model × micro-batch × dtype × optimizer × method × loss."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from prac.lab.materials import models
from prac.lab.methods.naming import Method, parse
from prac.lab.methods.optimizers import galore_rank, is_matrix_of_a_block
from prac.lab.methods.peers import adapt, recompute
from prac.lab.runs import children
from prac.memory import Breakdown, predict
from prac.memory.predict import OptimizerFactory, adamw
from prac.optim import SubspaceAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULTS = ("plain", "checkpoint", "selective", "galore", "paper", "lean", "lean+attention8", "fast", "small")
LOSSES = ("plain", "chunked")
WORTH_PROCESSES = 20  # seconds; starting them takes some 8
HALF = "half"  # as plain, but in the dtype of the logits, as some training code has it
DTYPES = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "amp": (torch.float32, torch.bfloat16)}


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and vectors."""
    inside = {name: p for name, p in model.named_parameters() if is_matrix_of_a_block(name, p)}
    rest = [p for name, p in model.named_parameters() if name not in inside]
    return [torch.optim.Muon(inside.values()), torch.optim.AdamW(rest, fused=True)]


class StateOnly(Optimizer):
    """An optimizer's state, for counting, where its package cannot run on fake tensors.

    ``adam-mini`` reads numbers off the gradients; ``galore-torch`` needs bitsandbytes to be imported at all.

    Args:
        parameters: as for any optimizer.
        state: the tensors it keeps for one parameter.
    """

    def __init__(self, parameters: Any, state: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__(parameters, {})
        self.of = state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of every parameter that has none."""
        for p in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            self.state[p] = {str(i): tensor for i, tensor in enumerate(self.of(p))}


def adam_mini(model: nn.Module) -> Optimizer:
    """Adam-mini: a momentum for each value, one second moment for each row of a matrix (a block has many rows)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return StateOnly(trained, lambda p: [torch.zeros_like(p), torch.zeros_like(p[..., :1] if p.dim() > 1 else p)])


def galore(model: nn.Module) -> Optimizer:
    """GaLore's AdamW at the rank of its paper, a quarter of the hidden size, on the matrices of the blocks.

    Of a matrix it keeps two moments of rank × the longer side, and a projection of rank × the shorter one.
    """
    rank = galore_rank(model)
    inside = {id(p) for name, p in model.named_parameters() if is_matrix_of_a_block(name, p)}

    def state(p: Tensor) -> list[Tensor]:
        if id(p) not in inside or min(p.shape) <= rank:
            return [torch.zeros_like(p), torch.zeros_like(p)]
        return [p.new_zeros(rank, max(p.shape)), p.new_zeros(rank, max(p.shape)), p.new_zeros(rank, min(p.shape))]

    return StateOnly([p for p in model.parameters() if p.requires_grad], state)


def in_subspace(model: nn.Module) -> Optimizer:
    """AdamW whose state of factored gradients is as narrow as they are."""
    return SubspaceAdamW([p for p in model.parameters() if p.requires_grad])


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": adamw,
    "adam-mini": adam_mini,
    "muon": muon,
    "galore": galore,
    "reproject": in_subspace,
    "reset": in_subspace,
}


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how."""

    model: str
    micro_batch: int
    seq_len: int
    dtype: str
    include: tuple[str, ...] | None = None  # patterns of module names, as prac.compress takes them
    exclude: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Footprint:
    """The prediction for one method, or why there is none.

    ``reduction`` is the share of the first row's peak that it saves; None where the first row has none.
    """

    method: str
    loss: str
    optimizer: str
    peak_gib: float = math.nan
    activation_gib: float = math.nan
    reduction: float | None = None
    where: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    why_not: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: None for what there is not."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def of(name: str) -> Method:
    """The method of a name, if its memory can be predicted.

    Raises:
        ValueError: for an unknown name, and for what decides with real numbers what it keeps.
    """
    method = parse(name)
    if method.compiled:
        raise ValueError(f"{name}: torch.compile decides what to keep when it compiles; measure it with prac bench.")
    if method.velora:
        raise ValueError(
            f"{name}: peft's VeLoRA looks at numbers, and a prediction has none; measure it in prac train."
        )
    return method


def materials(setting: Setting) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model and a batch, both without numbers."""
    dtype, _ = DTYPES[setting.dtype]
    model = models.without_weights(setting.model, setting.seq_len, dtype)
    # As the Trainer has it: a cache would hold every k and v until the forward pass is over.
    model.config.use_cache = False
    ids = torch.empty(setting.micro_batch, setting.seq_len, dtype=torch.long, device="meta")
    return model, {"input_ids": ids, "labels": ids}


def one(setting: Setting, method: str, loss: str, optimizer: str) -> Breakdown:
    """The prediction for one method."""
    way = of(method)
    model, batch = materials(setting)
    recompute(model, way)
    if loss == HALF:
        model.loss_function = _without_upcast
    _, autocast = DTYPES[setting.dtype]
    return predict(
        adapt(model) if way.lora else model,
        batch,
        way.config,
        offload=way.offload,
        include=setting.include,
        exclude=setting.exclude,
        loss="chunked" if loss == "chunked" else None,
        optimizer=OPTIMIZERS[optimizer],
        autocast=autocast,
    )


def _without_upcast(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(logits.view(-1, vocab_size), labels.reshape(-1))


def rows(
    setting: Setting,
    methods: Sequence[str],
    losses: Sequence[str] = LOSSES,
    optimizers: Sequence[str] = ("adamw",),
    notify: Callable[[str], None] = lambda done: None,
) -> list[Footprint]:
    """Every method with every loss and optimizer; the first one is what the others are compared with.

    Large models are predicted by one process for each processor, so a script that calls this needs the usual
    ``if __name__ == "__main__"``. ``notify`` gets the name of each row that is done.

    Raises:
        ValueError: for a method or a model that there is not, and if no row can be predicted.
    """
    ways = [
        (method, loss, optimizer if of(method).optimizer == "adamw" else of(method).optimizer)
        for optimizer in optimizers
        for loss in losses
        for method in methods
        if of(method).optimizer == "adamw" or optimizer == optimizers[0]  # it brings an optimizer of its own
    ]
    found: list[Footprint] = []
    for way, it in zip(ways, _predictions(setting, ways), strict=True):
        if isinstance(it, str):
            found.append(Footprint(*way, why_not=it))
        else:
            peak, parts = it.peak / 2**30, it.to_dict()
            base = found[0].peak_gib if found else peak
            less = None if math.isnan(base) else 1 - peak / base
            made = {"where": it.where, "at_peak": parts["at_peak"], "kept": parts["kept"]}
            found.append(Footprint(*way, peak, it.activations / 2**30, less, **made))
        notify("{}, {} loss, {}".format(*way))
    if all(row.why_not for row in found):
        raise ValueError(found[0].why_not)
    return found


def _predictions(setting: Setting, ways: Sequence[tuple[str, str, str]]) -> Iterator[Breakdown | str]:
    """One for each way, in order, or why there is none."""
    materials(setting)  # imports what the first prediction would be charged with
    begun = time.monotonic()
    yield _one_or_why(setting, *ways[0])
    rest, processors = ways[1:], os.cpu_count() or 1
    if (time.monotonic() - begun) * len(rest) < WORTH_PROCESSES or processors == 1:
        yield from (_one_or_why(setting, *way) for way in rest)
        return
    workers = min(processors, len(rest))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=children.end_with_pool) as pool:
        yield from pool.map(_one_or_why, [setting] * len(rest), *zip(*rest, strict=True))


def _one_or_why(setting: Setting, method: str, loss: str, optimizer: str) -> Breakdown | str:
    """A row that refuses takes no other with it."""
    try:
        return one(setting, method, loss, optimizer)
    except (ValueError, RuntimeError) as error:
        return " ".join(str(error).split())
