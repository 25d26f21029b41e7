"""What to give up so that training fits into a budget: as little as possible."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prac.config import Config
from prac.convert.chunked_loss import ChunkedLoss, NotChunked
from prac.convert.compress import compress
from prac.memory.breakdown import Breakdown
from prac.memory.measure import measure
from prac.memory.predict import OptimizerFactory, adamw, predict
from prac.presets import PRESETS
from prac.runtime.running import Example, in_mode, tensors_in
from prac.runtime.text import size


class Rung(NamedTuple):
    """One way to train, and what it gives up."""

    name: str
    config: Config | None
    chunked_loss: bool
    gives_up: str


# From the mildest on: each takes no more memory than the one before.
LADDER = (
    Rung("plain", None, False, "nothing"),
    Rung("chunked loss", None, True, "nothing but the logits in the output; loss and gradients are exact"),
    Rung("lean", PRESETS["lean"], True, "exact gradients: x̂ in 4 bits, g and u in 8; no measurable loss"),
    Rung(
        "lean+attention8",
        PRESETS["lean"].replace(attention_bits=8),
        True,
        "the same, and q, k, v and the output of attention in 8 bits",
    ),
    Rung("small", PRESETS["small"], True, "everything in 4 bits, attention too: those of q and k off by a sixth"),
)


@dataclass(frozen=True)
class Fit:
    """The mildest way that fits: ``compress(model, fit.config, loss=fit.loss)``; ``config`` is None for plain training.

    ``rejected`` has the ways before it, with the bytes they would have taken.
    """

    name: str
    config: Config | None
    chunked_loss: bool
    gives_up: str
    predicted: Breakdown
    budget: int
    rejected: dict[str, int]
    real: int | None = None  # bytes at the peak of a step that was run, where one was

    @property
    def loss(self) -> Literal["chunked"] | None:
        """As :func:`prac.compress` takes it."""
        return "chunked" if self.chunked_loss else None

    def __str__(self) -> str:
        tried = "".join(f"\n  {name} would take {size(count)}" for name, count in self.rejected.items())
        real = "" if self.real is None else f", {size(self.real)} when tried"
        return (
            f"{self.name} fits {size(self.budget)}: predicted peak {size(self.predicted.peak)}{real}. "
            f"It gives up {self.gives_up}.{tried}"
        )


def fit(
    model: nn.Module,
    batch: Example,
    budget: int | str,
    *,
    optimizer: OptimizerFactory | None = adamw,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    check: bool | None = None,
) -> Fit:
    """The mildest configuration whose predicted peak fits ``budget``: plain training if that does.

    Args:
        model: as for :func:`prac.predict`, like the rest; it is not changed.
        batch: its input.
        budget: bytes, or text such as ``"24GiB"`` or ``"80 GB"``.
        optimizer: makes the optimizer for a model.
        autocast: dtype of the forward pass.
        loss: of the model's output.
        check: also run a real step each way that is predicted to fit, and go by what it takes; by default where the
            model is on CUDA. ``model`` and ``batch`` must then be as they are trained on; the weights
            do not change, gradients are freed.

    Raises:
        ValueError: if nothing fits; the message says by how much, and the largest batch that would.

    >>> found = prac.fit(model, batch, "24GiB")
    >>> if found.config is not None:
    ...     prac.compress(model, found.config, loss=found.loss)
    """
    limit = parse_budget(budget)
    how: dict[str, Any] = {"optimizer": optimizer, "autocast": autocast, "loss": loss}
    check = next(model.parameters()).is_cuda if check is None else check
    rejected: dict[str, int] = {}
    last, chunks = LADDER[0], _chunks(model, batch, **how)
    for rung in LADDER:
        if rung.config is None and rung.chunked_loss and not chunks:
            continue
        rung = last = rung._replace(chunked_loss=rung.chunked_loss and chunks)
        found = predict(model, batch, rung.config, chunked_loss=rung.chunked_loss, **how)
        takes, real = found.peak, None
        if takes <= limit and check:
            of_step = _real_peak(model, batch, rung, autocast, loss)
            takes = real = limit + 1 if of_step is None else of_step + found.at_peak.get("optimizer", 0)
        if takes <= limit:
            return Fit(*rung, found, limit, rejected, real)
        rejected[rung.name] = takes
    rows = _rows(batch)
    most = largest_batch(model, batch, limit, last.config, chunked_loss=last.chunked_loss, **how)
    instead = (
        f"a batch of {most} instead of {rows}" if most else f"a smaller model: not even a batch of 1 of {rows} fits"
    )
    raise ValueError(
        f"{size(limit)} is not enough: even {last.name} would take {size(takes)}, "
        f"{size(takes - limit)} more. What would fit: {instead}."
    )


def _real_peak(
    model: nn.Module, batch: Example, rung: Rung, autocast: torch.dtype | None, loss: Callable[[Any], Tensor] | None
) -> int | None:
    """Bytes at the peak of a real step, without the optimizer's state; None if there is not that much."""
    device = next(model.parameters()).device
    with ExitStack() as undo:
        undo.callback(model.zero_grad, set_to_none=True)
        undo.enter_context(in_mode(model, training=True))
        undo.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if rung.config is not None:
            undo.callback(compress(model, rung.config, loss="chunked" if rung.chunked_loss else None).restore)
        elif rung.chunked_loss:
            undo.callback(ChunkedLoss(model).remove)
        try:
            return measure(model, batch, autocast=autocast, loss=loss).peak
        except torch.OutOfMemoryError:
            return None


def largest_batch(
    model: nn.Module,
    batch: Example,
    budget: int | str,
    config: Config | str | None = None,
    **how: Any,
) -> int:
    """The most samples (rows of ``batch``'s tensors) with which a training step fits ``budget``; 0 if not one does.

    The peak grows linearly with the batch from some size on; this goes by that and checks what it finds.

    Args:
        model: as for :func:`prac.predict`.
        batch: as an example; its tensors are made longer or shorter.
        budget: as for :func:`fit`.
        config: as for :func:`prac.predict`.
        **how: the rest of what :func:`prac.predict` takes.
    """
    limit = parse_budget(budget)
    rows = _rows(batch)

    @functools.cache
    def peak(count: int) -> int:
        resized = tree_map_only(
            Tensor,
            lambda t: (
                torch.empty(count, *t.shape[1:], dtype=t.dtype, device="meta") if t.dim() and len(t) == rows else t
            ),
            batch,
        )
        return predict(model, resized, config, **how).peak

    if peak(1) > limit:
        return 0
    low, high = 1, max(2, rows)
    while peak(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:  # low fits, high does not; try where the line through both meets the budget
        guess = low + int((high - low) * (limit - peak(low)) / (peak(high) - peak(low)))
        guess = min(high - 1, max(low + 1, guess))
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low


def parse_budget(budget: int | str) -> int:
    """Bytes of ``"24GiB"``, ``"80 GB"``, ``"512 MiB"`` or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(budget, int):
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", budget, re.IGNORECASE)
    if match is None:
        raise ValueError(f"a budget is a number of bytes or text such as 24GiB or 80GB, got {budget!r}.")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _rows(batch: Example) -> int:
    """Samples in a batch: the first dimension of most of its tensors (patches and positions have others).

    Raises:
        ValueError: if it has no tensor with a dimension.
    """
    first = Counter(len(tensor) for tensor in tensors_in(batch) if tensor.dim())
    if not first:
        raise ValueError(f"this batch, a {type(batch).__name__}, has no tensor whose rows could be counted.")
    return first.most_common(1)[0][0]


def _chunks(model: nn.Module, batch: Example, **how: Any) -> bool:
    """Whether its loss can be chunked, on this batch too."""
    try:
        ChunkedLoss(model).remove()
        predict(model, batch, chunked_loss=True, **how)
    except NotChunked:
        return False
    return True
