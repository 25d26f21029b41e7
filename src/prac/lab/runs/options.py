"""Everything that decides a training run, as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prac.config import Config
from prac.lab import methods
from prac.lab.materials import models


@dataclass(frozen=True)
class Options:
    """One training run: one method, one seed.

    Args:
        method: ``plain``, or the name of the preset that ``config`` started from.
        config: what is compressed; ``None`` for ``plain``.
        include: glob patterns of the modules to compress; ``None`` for all.
        exclude: glob patterns of the modules to leave alone.
        model: a size of :data:`prac.lab.materials.models.SIZES`, a folder, or a hub name.
        data: ``sotu``, a file of text or records, a folder of them, or a hub data set (``name`` or ``name:config``).
        split: the training split of a table; of a hub data set it may be a slice (``train[:1%]``).
        text_field: the field of a table that holds the text.
        max_tokens: tokens to train on at most; ``None`` for all there are.
        tokenizer: ``bpe:SIZE`` (trained on the data), a folder, or a hub name.
        steps: optimizer steps.
        batch_size: blocks per device and micro-batch.
        grad_accum: micro-batches per optimizer step.
        seq_len: tokens per block.
        lr: peak learning rate of AdamW.
        warmup: linear warm-up, as a fraction of the steps (below 1) or a number of steps.
        weight_decay: of AdamW; norms and biases are exempt, as in the ``Trainer``.
        bf16: autocast to bfloat16.
        fsdp: shard parameters, gradients and optimizer over the processes (FSDP2).
        loss: ``plain``, ``chunked`` (without the logits), or ``auto``: chunked where the model allows it.
        seed: of the initial weights and of the data order, the same for every method.
        eval_every: optimizer steps between validations; 0 for one after a tenth of the steps, where the spectrum is
            taken, and the last.
        eval_blocks: validation blocks used by those (the last one uses all of them).
        save_every: optimizer steps between checkpoints; 0 for the last one alone.
    """

    method: str
    config: Config | None
    model: str
    data: str
    tokenizer: str
    steps: int
    batch_size: int
    seq_len: int
    lr: float
    warmup: float
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    split: str = "train"
    text_field: str = "text"
    max_tokens: int | None = None
    grad_accum: int = 1
    weight_decay: float = 0.1
    bf16: bool = False
    fsdp: bool = False
    loss: str = "auto"
    seed: int = 0
    eval_every: int = 0
    eval_blocks: int = 32
    save_every: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "seq_len": 2, "eval_every": 0, "save_every": 0}
        least |= {"eval_blocks": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}.")
        for name in ("lr", "warmup", "weight_decay"):
            value = getattr(self, name)
            if not (0 <= value < float("inf")):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise ValueError(f"max_tokens = {self.max_tokens} is less than one block of {self.seq_len} tokens.")
        if self.warmup_steps > self.steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps is longer than the run ({self.steps} steps).")

    @property
    def warmup_steps(self) -> int:
        """The length of the warm-up in optimizer steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal to what it is after a trip through JSON."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


def options(
    method: str,
    seed: int = 0,
    *,
    model: str = "llama-tiny",
    config: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Options:
    """The options of one run: the model's recipe and the method's config, but for what is given here.

    Args:
        method: as :func:`prac.lab.methods.parse` takes it.
        seed: of the run, and of the random bases unless ``config`` has another.
        model: as of :class:`Options`.
        config: fields of the method's config, where it has one, that are to be otherwise.
        **changes: fields of :class:`Options`.
    """
    recipe = models.recipe(model)
    how = {name: getattr(recipe, name) for name in ("steps", "batch_size", "grad_accum", "seq_len", "lr", "warmup")}
    how |= {"data": "sotu", "tokenizer": "bpe:4096" if model in models.SIZES else model} | changes
    steps = how["steps"]
    validations = {"eval_every": max(1, steps // 10), "save_every": max(1, steps // 5)}
    return Options(
        method, _config(method, model, {"seed": seed, **(config or {})}), model, seed=seed, **(validations | how)
    )


def _config(method: str, model: str, changes: Mapping[str, Any]) -> Config | None:
    """The config of a method on a model: its preset, with intervals that fit the model's recipe."""
    own = methods.parse(method).config
    if own is None:
        return None
    # A short run needs short intervals where an optimizer lives in the subspace; bases of every step stay so.
    interval = models.recipe(model).interval if own.factored and own.T1 not in (None, 1) else None
    defaults = {} if interval is None else {"T1": interval, "T2": interval}
    return own.replace(**defaults | dict(changes))


def differences(old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs between two ``to_dict()``, as ``name: old -> new``; of one method's configs what differs in them."""
    found = []
    for name in sorted((old.keys() | new.keys()) - set(ignore)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if old.get("method") == new.get("method"):
                found += [f"{name}.{inner}" for inner in differences(a, b)]
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found
