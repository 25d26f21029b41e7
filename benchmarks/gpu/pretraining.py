"""The paper's claims at the paper's sizes: LLaMA-60M and -130M from scratch, PRAC beside what it is compared with.

``rates`` trains each method for a short while at each learning rate of the paper's grid. ``pretraining`` trains at the
best of them (:data:`RATES`, which is what ``rates`` said; the row says which), three seeds. Each row has the loss on
unseen text, and of what keeps subspaces how long all refreshes took together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from rows import Job, Row
from shapes import GRID, PRETRAINED, SHORT, TOY_PRETRAINED, TOY_SHORT
from training import adamw, kept, setting_of, source, train

from prac.estimators.subspace import Subspace
from prac.lab.methods import optimizers
from prac.lab.methods.naming import parse
from prac.optim import SubspaceAdamW

METHODS = ("plain", "paper", "paper-as-printed", "lean", "pac", "rac", "rso", "galore")
SEVERAL = ("plain", "paper", "paper-as-printed")  # with more than one seed
SEEDS = (0, 1, 2)
SECONDS = {"llama-60m": 60, "llama-130m": 130}
RATES: dict[str, float] = {}  # of those whose best is not 1e-3


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """The rows of ``rates`` or ``pretraining``."""
    sizes, found = TOY_PRETRAINED if toy else PRETRAINED, []
    for model, (shape, training) in sizes.items():
        if stage == "rates" and model != next(iter(sizes)):
            continue
        short = TOY_SHORT if toy else SHORT
        common = setting_of(shape, short if stage == "rates" else training, toy, flash, tokens) | {"model": model}
        text = source(tokens, toy)
        for name, method, seed, rate in _wanted(stage, toy):
            setting = common | {"method": method, "seed": seed, "learning_rate": rate} | kept(parse(method).config)
            seconds = SECONDS[model] * common["steps"] / training.steps
            found.append(Job(name, measure, setting, seconds, text, left_out=_why_not(method)))
    return found


def _wanted(stage: str, toy: bool) -> list[tuple[str, str, int, float]]:
    """The name, method, seed and learning rate of each row."""
    if stage == "rates":
        return [(f"{method} {rate:g}", method, 0, rate) for rate in GRID[-1 if toy else 0 :] for method in METHODS]
    seeds = SEEDS[:1] if toy else SEEDS
    return [
        (f"{method} {seed}", method, seed, RATES.get(method, 1e-3))
        for seed in seeds
        for method in (METHODS if seed == 0 else SEVERAL)
    ]


def _why_not(method: str) -> str:
    return "galore_torch is not installed" if method == "galore" and find_spec("galore_torch") is None else ""


def measure(setting: Row, device: str, tokens: str | None, limit: int | None) -> Iterator[Row]:
    """A row, at each loss on unseen text."""
    method = parse(setting["method"])
    refreshing = Refreshing()
    for row in train(setting, device, method.config, tokens, limit, optimizer_of=_optimizer(method.optimizer)):
        yield row | (refreshing.row() if method.config is not None else {})


def _optimizer(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    if kind == "adamw":
        return adamw

    def of(model: Any) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        how: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95)}
        if kind == "reset":
            return SubspaceAdamW(optimizers.decayed(named, 0.1), **how, at_refresh="reset")
        from galore_torch import GaLoreAdamW

        inside = {name: p for name, p in named.items() if optimizers.is_matrix_of_a_block(name, p)}
        rest = [p for name, p in named.items() if name not in inside]
        own = {"rank": optimizers.galore_rank(model), "update_proj_gap": optimizers.GALORE_INTERVAL,
               "scale": optimizers.GALORE_SCALE, "proj_type": "std"}  # fmt: skip
        groups = [{"params": rest}, {"params": list(inside.values())} | own]
        return GaLoreAdamW(groups, **how, weight_decay=0.1)

    return of


class Refreshing:
    """How long refreshes take in this process, all of them together, by events of the device where it is one."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        original = Subspace.update

        def update(subspace: Subspace, x_MN: torch.Tensor) -> None:
            before, on_gpu = subspace.refreshes, x_MN.is_cuda
            start = _event() if on_gpu else time.perf_counter()
            original(subspace, x_MN)
            if subspace.refreshes == before:
                return
            self.count += 1
            if on_gpu:
                self._pairs.append((start, _event()))
            else:
                self.seconds += time.perf_counter() - start

        Subspace.update = update  # type: ignore[method-assign]

    def row(self) -> Row:
        """What a row says of them."""
        for start, end in self._pairs:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3
        self._pairs.clear()
        return {"refreshes": self.count, "refresh_s": self.seconds}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
