"""What to give up so that training fits into a budget: as little as possible."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prac.config import Config
from prac.convert.chunked_loss import ChunkedLoss, NotChunked
from prac.convert.compress import compress
from prac.convert.conversion import Filter
from prac.convert.handle import Handle, left_plain
from prac.memory.breakdown import Breakdown
from prac.memory.largest_batch import largest_batch, parse_budget, rows_of
from prac.memory.measure import measure
from prac.memory.predict import OptimizerFactory, adamw, predict
from prac.presets import PRESETS
from prac.runtime.running import Example, in_mode
from prac.runtime.text import size


class Rung(NamedTuple):
    """One way to train, and what it gives up."""

    name: str
    config: Config | None
    chunked_loss: bool
    gives_up: str


# From the mildest on: each takes no more memory than the one before, and from lean on more time.
LADDER = (
    Rung("plain", None, False, "nothing"),
    Rung("chunked loss", None, True, "nothing but the logits in the output; loss and gradients are exact"),
    Rung("lean", PRESETS["lean"], True, "exact gradients: x̂ in 4 bits, g and u in 8; no measurable loss"),
    Rung(
        "lean+attention8",
        PRESETS["lean"].replace(attention_bits=8),
        True,
        "exact gradients: as lean, and q, k, v and the output of attention in 8 bits",
    ),
    Rung(
        "small",
        PRESETS["small"],
        True,
        "exact gradients: everything in 4 bits, attention too; q and k's are off by a sixth",
    ),
)


@dataclass(frozen=True)
class Choice:
    """The mildest way that fits a budget.

    Attributes:
        name: of the way; ``config`` is None for plain training.
        gives_up: what it costs.
        predicted: the memory of a step.
        budget: bytes.
        rejected: the ways before it, with the bytes they would have taken.
        further: the next way, with the bytes it would take and what more it gives up; None after the last.
        real: bytes at the peak of a step that was run, where one was.
    """

    name: str
    config: Config | None
    chunked_loss: bool
    gives_up: str
    predicted: Breakdown
    budget: int
    rejected: dict[str, int]
    further: tuple[str, int, str] | None = None
    real: int | None = None

    @property
    def loss(self) -> Literal["chunked"] | None:
        """As :func:`prac.compress` takes it."""
        return "chunked" if self.chunked_loss else None

    def __str__(self) -> str:
        real = "" if self.real is None else f", {size(self.real)} when tried"
        lines = [
            f"{self.name} fits {size(self.budget)}: predicted peak {size(self.predicted.peak)}{real}. "
            f"It gives up {self.gives_up}."
        ]
        lines += [f"{name} would take {size(count)}." for name, count in self.rejected.items()]
        if self.further is not None:
            name, count, gives_up = self.further
            lines.append(f"To go further: {name} would take {size(count)} and give up {gives_up}.")
        return "\n  ".join(lines)


class Step(NamedTuple):
    """What is to fit: a step of a model on a batch, as for :func:`prac.predict`."""

    model: nn.Module
    batch: Example
    optimizer: OptimizerFactory | None = adamw
    autocast: torch.dtype | None = None
    loss: Callable[[Any], Tensor] | None = None
    include: Filter | None = None
    exclude: Filter | None = None

    def predicted(self, rung: Rung) -> Breakdown:
        """Its memory in one way; what there is to warn of is said of the one that is taken."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return predict(self.model, self.batch, rung.config, chunked_loss=rung.chunked_loss, **self.how())

    def compressed(self, way: Rung | Choice) -> Handle:
        """Its model, trained in this way from now on."""
        if way.config is None:
            return left_plain(self.model, ChunkedLoss(self.model) if way.chunked_loss else None)
        loss: Literal["chunked"] | None = "chunked" if way.chunked_loss else None
        of: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "example": self.batch}
        return compress(self.model, way.config, loss=loss, **of)

    def how(self) -> dict[str, Any]:
        """All but the model and the batch."""
        return {name: value for name, value in self._asdict().items() if name not in ("model", "batch")}


def compress_within(
    model: nn.Module,
    batch: Example,
    budget: int | str,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    optimizer: OptimizerFactory | None = adamw,
    autocast: torch.dtype | None = None,
    objective: Callable[[Any], Tensor] | None = None,
    check: bool | None = None,
) -> Handle:
    """What :func:`prac.compress` does with a budget."""
    step = Step(model, batch, optimizer, autocast, objective, include, exclude)
    found = choose(step, budget, check)
    handle = step.compressed(found)
    handle.choice = found
    return handle


def choose(step: Step, budget: int | str, check: bool | None = None) -> Choice:
    """The mildest way whose predicted peak fits ``budget``: plain training if that does.

    Args:
        step: the model is not changed.
        budget: bytes, or text such as ``"24GiB"`` or ``"80 GB"``.
        check: also run a real step each way that is predicted to fit, and go by what it takes; by default where the
            model is on CUDA. Model and batch must then be as they are trained on; the weights do not change, gradients
            are freed.

    Raises:
        ValueError: if nothing fits; the message says by how much, and what would.
    """
    limit = parse_budget(budget)
    check = next(step.model.parameters()).is_cuda if check is None else check
    predicted = functools.cache(step.predicted)
    rejected: dict[str, int] = {}
    rungs = _rungs(predicted)
    for number, rung in enumerate(rungs):
        found = predicted(rung)
        takes, real = found.peak, None
        if takes <= limit and check:
            of_step = _real_peak(step, rung)
            takes = real = limit + 1 if of_step is None else of_step + found.at_peak.get("optimizer", 0)
        if takes <= limit:
            less = (each for each in rungs[number + 1 :] if predicted(each).peak < found.peak)
            further = next(((each.name, predicted(each).peak, each.gives_up) for each in less), None)
            return Choice(*rung, found, limit, rejected, further, real)
        rejected[rung.name] = takes
    raise ValueError(
        f"{size(limit)} is not enough: even {rung.name} would take {size(takes)}, {size(takes - limit)} more. "
        f"What would fit: {_instead(step, rung, limit)}.{_also(step, rung, found)}"
    )


def _instead(step: Step, rung: Rung, limit: int) -> str:
    """How much smaller the batch would have to be."""
    rows = rows_of(step.batch)
    most = largest_batch(step.model, step.batch, limit, rung.config, chunked_loss=rung.chunked_loss, **step.how())
    return f"a batch of {most} instead of {rows}" if most else f"a smaller model: not even a batch of 1 of {rows} fits"


def _also(step: Step, rung: Rung, found: Breakdown) -> str:
    """What else there is to try, with the memory it would take or free."""
    tries = []
    with _recomputed(step.model) as switch:
        if switch:
            peak = size(step.predicted(rung).peak)
            tries.append(f"checkpointing as well (model.{switch}()): {peak} in all")
    state, gradients = (found.at_peak.get(kind, 0) for kind in ("optimizer", "gradients"))
    if state:
        tries.append(f"an optimizer with less state: this one holds {size(state)}, one in 8 bits a quarter of that")
    if state + gradients and all(p.requires_grad for p in step.model.parameters()):
        tries.append(f"adapters (LoRA, with peft): most of the {size(state + gradients)} of gradients and state go")
    tries.append("keeping activations in the host's memory (torch.autograd.graph.save_on_cpu()): slow")
    return " Also to try: " + "; ".join(tries) + "."


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[str]:
    """Inside, blocks of a model of transformers are computed again in backward; the name of the method that does it.

    "" where it cannot, or does so already.
    """
    # What version 6 calls it, and what it was called before.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next((n for n in names if hasattr(model, f"{n}_enable")), None)
    can = name is not None and getattr(model, "supports_gradient_checkpointing", False)
    if not can or getattr(model, f"is_{name}", False):
        yield ""
        return
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    getattr(model, f"{name}_enable")()
    try:
        yield f"{name}_enable"
    finally:
        getattr(model, f"{name}_disable")()
        for own, then in before:  # which leaves attributes on them
            own.clear()
            own.update(then)


def _real_peak(step: Step, rung: Rung) -> int | None:
    """Bytes at the peak of a real step, without the optimizer's state; None if there is not that much."""
    model = step.model
    device = next(model.parameters()).device
    with ExitStack() as undo:
        undo.callback(model.zero_grad, set_to_none=True)
        undo.enter_context(in_mode(model, training=True))
        undo.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        undo.callback(step.compressed(rung).restore)
        try:
            return measure(model, step.batch, autocast=step.autocast, loss=step.loss).peak
        except torch.OutOfMemoryError:
            return None


def _rungs(predicted: Callable[[Rung], Breakdown]) -> list[Rung]:
    """The ways that there are for a step: without logits where its loss can be chunked, and where that saves memory.

    With a small vocabulary or few tokens it does not.
    """
    plain, chunked, *others = LADDER
    try:
        chunks = predicted(chunked).peak < predicted(plain).peak
    except NotChunked:
        chunks = False
    return [plain, *([chunked] if chunks else []), *(rung._replace(chunked_loss=chunks) for rung in others)]
