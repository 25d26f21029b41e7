"""What compression does to the loss at a real size: a LLaMA-130M on text.

A row is written at each loss on unseen text and so grows while it trains: :mod:`training`.
"""

from __future__ import annotations

from collections.abc import Iterator

from rows import Job, Row
from shapes import TOY_TRAINED, TOY_TRAINING, TRAINED, TRAINING
from training import kept, setting_of, source, train

from prac import PRESETS

METHODS = {"plain": None, "lean": PRESETS["lean"], "small": PRESETS["small"], "paper": PRESETS["paper"]}
SECONDS = {"plain": 130, "lean": 115, "small": 120, "paper": 150}  # on an H100, with the first step
SEEDS = (0, 1)


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """Every method with every seed."""
    shape, training = (TOY_TRAINED, TOY_TRAINING) if toy else (TRAINED, TRAINING)
    common = setting_of(shape, training, toy, flash, tokens)
    text = source(tokens, toy)
    return [
        Job(f"{name} {seed}", measure, common | {"method": name, "seed": seed} | kept(config), SECONDS[name], text)
        for seed in (SEEDS[:1] if toy else SEEDS)
        for name, config in METHODS.items()
    ]


def measure(setting: Row, device: str, tokens: str | None, limit: int | None) -> Iterator[Row]:
    """A row, at each loss on unseen text."""
    yield from train(setting, device, METHODS[setting["method"]], tokens, limit)
