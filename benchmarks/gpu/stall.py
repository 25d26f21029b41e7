"""Why compressed training stands still where subspaces are stale, and what it takes that it does not: a table of ways.

A LLaMA so small that all of them can be tried, three seeds. Each differs in one thing from the paper as printed or
from the preset `paper`. Beside the loss on unseen text, rows have for each norm the share of its input's energy that
its principal basis misses, and how large the residual stream in front of it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rows import Job, Row
from shapes import TINY, TOY_TINY
from torch import Tensor, nn
from training import kept, setting_of, source, train

from prac import PRESETS, Config, Rank
from prac.estimators import bases
from prac.estimators.subspace import Subspace
from prac.layers import Compressed

PRINTED, PAPER = PRESETS["paper-as-printed"], PRESETS["paper"]
NORMS_EVERY_STEP = PAPER.replace(growth=1e-9)
DRIFT = "norms when 1.5 times the energy is missed"
TRACKED = "norms by one iteration each step"
WAYS: dict[str, Config | None] = {
    "plain": None,
    "as printed": PRINTED,
    "as printed, linear layers alone": PRINTED.replace(norm=None, activation=None),
    "as printed, activations alone": PRINTED.replace(norm=None, linear=None),
    "as printed, norms alone": PRINTED.replace(linear=None, activation=None),
    "as printed but the last norm": PRINTED.replace(last_norm=False),
    "as printed, T a quarter of the warm-up": PRINTED.replace(T1=6, T2=6),
    "as printed, growing intervals": PRINTED.replace(growth=0.1),
    "paper": PAPER,
    "paper, fixed intervals": PAPER.replace(growth=0.0),
    "paper, with the last norm": PAPER.replace(last_norm=True),
    "paper, not renormalised": PAPER.replace(renormalise=False),
    "paper, norms at every step": NORMS_EVERY_STEP,
    f"paper, {DRIFT}": PAPER.replace(growth=0.0),
    f"paper, {TRACKED}": NORMS_EVERY_STEP,
    "paper, activations as printed": PAPER.replace(activation=PRINTED.activation),
    "paper, exact scalar of groups": PAPER.replace(group=Rank(0.3, 0.3)),
    "paper-product": PRESETS["paper-product"],
    "paper, Z in 8 bits": PRESETS["paper-8bits"],
    "paper, Z in 4 bits": PRESETS["paper-4bits"],
    "loract": PRESETS["loract"],
    "lean": PRESETS["lean"],
}
SEEDS = (0, 1, 2)


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """Every way with every seed."""
    common = setting_of(*(TOY_TINY if toy else TINY), toy, flash, tokens)
    text = source(tokens, toy)
    return [
        Job(f"{name} {seed}", measure, common | {"method": name, "seed": seed} | kept(config), 12, text)
        for seed in (SEEDS[:1] if toy else SEEDS)
        for name, config in WAYS.items()
    ]


def measure(setting: Row, device: str, tokens: str | None, limit: int | None) -> Iterator[Row]:
    """A row, at each loss on unseen text."""
    name = setting["method"]
    if name.endswith(TRACKED):
        bases.WARM_ITERATIONS, bases.EIGH_MAX_WIDTH_WARM = 1, 0
    if name.endswith(DRIFT):
        refresh_by_drift(1.5)
    states: list[Row] = []

    def state(model: Any, ids_BS: Tensor) -> Row:
        states.append(norms(model, ids_BS))
        return {"norms": states}

    yield from train(setting, device, WAYS[name], tokens, limit, more=state)


def refresh_by_drift(most: float) -> None:
    """Norms refresh when their basis misses so many times the energy that it missed when it was made."""
    original, missed = Subspace.update, dict[Subspace, float]()

    def update(subspace: Subspace, x_MN: Tensor) -> None:
        before, is_norm = subspace.refreshes, "norm" in subspace.name
        if is_norm and subspace.p_NR is not None and outside(subspace, x_MN) > most * missed[subspace]:
            subspace._q1_step = -subspace.T1 if subspace.T1 else 0
        original(subspace, x_MN)
        if is_norm and subspace.refreshes > before:
            missed[subspace] = outside(subspace, x_MN)

    Subspace.update = update  # type: ignore[method-assign]


def outside(subspace: Subspace, x_MN: Tensor) -> float:
    """The share of the energy of x that the principal basis misses."""
    x_MN = x_MN.float()
    inside = (x_MN @ subspace._q1(x_MN)).square().sum() / x_MN.square().sum()
    return 1 - float(inside)


@torch.no_grad()
def norms(model: nn.Module, ids_BS: Tensor) -> Row:
    """Of each norm the root mean square of its input, and the share of it that a principal basis misses."""
    found: Row = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x_MN = args[0].detach().reshape(-1, args[0].shape[-1])
            kept = module.estimators["x"] if isinstance(module, Compressed) else None
            missed = outside(kept, x_MN) if isinstance(kept, Subspace) and kept.p_NR is not None else None
            found[name] = [float(x_MN.float().square().mean().sqrt()), missed]

        return hook

    handles = [m.register_forward_pre_hook(look(n)) for n, m in model.named_modules() if n.endswith("norm")]
    model.eval()
    try:
        model(input_ids=ids_BS)
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    return found
