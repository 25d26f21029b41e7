"""What a run is measured by: peak memory, and the spectrum of an activation."""

from __future__ import annotations

import math
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from prac.memory.breakdown import Breakdown
from prac.memory.kinds import kinds
from prac.memory.measure import measure, track_kept


def reset_peak() -> None:
    """Start the peak anew: of CUDA, and of the process where the system allows it (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_process_bytes() -> int:
    """Peak resident memory of this process in bytes, since :func:`reset_peak` where that is possible.

    ``ru_maxrss`` alone would not do: on Linux a child starts with its parent's.
    """
    with suppress(OSError):
        if match := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_by_layer(model: nn.Module, batch: dict[str, Tensor], bf16: bool = False) -> list[dict[str, Any]]:
    """What autograd keeps for one training batch, with ``bf16`` under autocast to it.

    Returns:
        A row for each module that keeps something: ``module`` (its name), ``block`` (its index, or None outside
        the blocks), ``kind`` (:mod:`prac.memory.kinds`) and ``bytes``.
    """
    model.train()
    with track_kept(model) as kept, torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
        model(**batch)
    rows, of = [], kinds(model)
    for name, count in kept.by_module.items():
        block = re.search(r"\.(\d+)\.", name)
        rows.append({"module": name, "block": int(block[1]) if block else None, "kind": of[name], "bytes": count})
    return rows


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: Optimizer, bf16: bool = False) -> Breakdown:
    """The memory of one training step as :func:`prac.measure` has it; the model's gradients are freed."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return measure(model.train(), batch, optimizer=optimizer, autocast=torch.bfloat16 if bf16 else None)


def middle_linear(model: nn.Module) -> str:
    """The name of the first linear layer of the middle transformer block.

    Raises:
        ValueError: if the model has no list of blocks.
    """
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ValueError("the model has no nn.ModuleList of blocks to take the middle one of.")
    name, blocks = max(stacks, key=lambda stack: len(stack[1]))
    middle = len(blocks) // 2
    for inner, module in blocks[middle].named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            return f"{name}.{middle}.{inner}"
    raise ValueError(f"block {name}.{middle} has no linear layer.")


@torch.no_grad()
def spectrum(model: nn.Module, layer: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Singular values of the input of ``layer``, tokens × features, on one batch (Figure 2 of the paper).

    Returns:
        ``layer``, ``singular_values`` (descending, as many as features) and ``energy``: the share of
        ``sum(s ** 2)`` in the first i of them.
    """
    caught: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    was_training = model.training
    try:
        model.eval()(**batch)
    finally:
        hook.remove()
        model.train(was_training)
    values = torch.linalg.svdvals(caught[0].flatten(0, -2).float())
    energy = values.double().square().cumsum(0)
    return {"layer": layer, "singular_values": values.tolist(), "energy": (energy / energy[-1]).tolist()}


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
