"""What to give up so that training fits into a budget: as little as possible."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
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
from prac.memory.predict import OptimizerFactory, adamw, predict, recomputes, switch_of
from prac.presets import PRESETS
from prac.runtime.running import Example, as_call, buffers_kept, in_mode, tensors_in
from prac.runtime.text import size
from prac.runtime.warn import warn

Loss = Literal["chunked"] | None


class Rung(NamedTuple):
    """One way to train, ``config`` and ``loss`` as :func:`prac.compress` takes them, and what it gives up."""

    name: str
    config: Config | None  # None for plain training
    loss: Loss
    gives_up: str


# From the mildest on: each gives up more than the one before and, where there is much to keep, takes less memory.
LADDER = (
    Rung("plain", None, None, "nothing"),
    Rung("chunked loss", None, "chunked", "nothing but the logits in the output; loss and gradients are exact"),
    Rung("lean", PRESETS["lean"], "chunked", "exact gradients: x̂ in 4 bits, g and u in 8; no measurable loss"),
    Rung(
        "lean+attention8",
        PRESETS["lean"].replace(attention_bits=8),
        "chunked",
        "exact gradients: as lean, and q, k, v and the output of attention in 8 bits",
    ),
    Rung(
        "small",
        PRESETS["small"],
        "chunked",
        "exact gradients: everything in 4 bits, attention too; q and k's are off by a sixth",
    ),
)


@dataclass(frozen=True)
class Choice:
    """The mildest way that fits a budget.

    Attributes:
        name: of the way.
        config: what it compresses by; None for plain training, where there is nothing to compress.
        loss: ``"chunked"`` where it trains without logits.
        gives_up: what it costs.
        predicted: the memory of a step.
        budget: bytes.
        rejected: the ways before it, with the bytes they would have taken.
        further: the next way that takes less, with the bytes it would take and what it gives up; None after the last.
        real: bytes at the peak of a step that was run, where one was.
    """

    name: str
    config: Config | None
    loss: Loss
    gives_up: str
    predicted: Breakdown
    budget: int
    rejected: dict[str, int]
    further: tuple[str, int, str] | None = None
    real: int | None = None

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
    objective: Callable[[Any], Tensor] | None = None
    include: Filter | None = None
    exclude: Filter | None = None

    def predicted(self, rung: Rung, *, checkpoint: bool = False) -> Breakdown:
        """Its memory in one way; what there is to warn of is said of the one that is taken."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of: dict[str, Any] = {"loss": rung.loss, "checkpoint": checkpoint}
            return predict(self.model, self.batch, rung.config, **of, **self.how())

    def largest(self, rung: Rung, limit: int) -> int:
        """How many rows of its batch fit in one way."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return largest_batch(self.model, self.batch, limit, rung.config, loss=rung.loss, **self.how())

    def compressed(self, way: Rung | Choice) -> Handle:
        """Its model, trained in this way from now on."""
        if way.config is None:
            chunked = None if way.loss is None else ChunkedLoss(self.model)
            return left_plain(self.model, chunked, f"{way.name} fits the budget: stays in full")
        of: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "example": self.batch}
        return compress(self.model, way.config, loss=way.loss, **of)

    def how(self) -> dict[str, Any]:
        """All but the model and the batch."""
        return {name: value for name, value in self._asdict().items() if name not in ("model", "batch")}

    def check(self) -> None:
        """Raise for what cannot be a step, and a prediction would not name.

        Raises:
            TypeError: for a batch without tensors.
            ValueError: for a model of which nothing is trained.
        """
        as_call(self.batch)
        if not tensors_in(self.batch):
            raise TypeError(
                f"the batch, a {type(self.batch).__name__}, holds no tensor: give it as the model takes it."
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("no parameter of the model requires a gradient, so there is no step to fit.")


def compress_within(
    model: nn.Module,
    batch: Example,
    budget: int | float | str,
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


def choose(step: Step, budget: int | float | str, check: bool | None = None) -> Choice:
    """The mildest way whose predicted peak fits ``budget``: plain training if that does.

    Args:
        step: the model is not changed.
        budget: bytes, or text such as ``"24GiB"`` or ``"80 GB"``.
        check: also run a real step each way that is predicted to fit, and go by what it takes; by default where model
            and batch are on the same CUDA device. The batch must then be one that is trained on; the weights do not
            change, gradients are freed.

    Raises:
        TypeError: for a batch, an optimizer or a dtype that is none.
        ValueError: if nothing fits; the message says by how much, and what would. Also if a step cannot be tried.
    """
    limit = parse_budget(budget)
    step.check()
    if check is None:
        devices = {tensor.device for tensor in (*tensors_in(step.batch), *step.model.parameters())}
        check = len(devices) == 1 and devices.pop().type == "cuda"
    predicted = functools.cache(step.predicted)
    takes: dict[Rung, int] = {}
    rungs = _rungs(step, predicted)
    for rung in rungs:
        found, real = predicted(rung), None
        takes[rung] = found.peak
        if found.peak <= limit and check:
            of_step = _real_peak(step, rung)
            real = limit + 1 if of_step is None else of_step + found.at_peak.get("optimizer", 0)
            takes[rung] = real
        if takes[rung] <= limit:
            less = (each for each in rungs if predicted(each).peak < found.peak)  # of those that are left
            further = next(((each.name, predicted(each).peak, each.gives_up) for each in less), None)
            rejected = {each.name: count for each, count in takes.items() if each is not rung}
            return Choice(*rung, found, limit, rejected, further, real)
    least = min(takes, key=lambda rung: takes[rung])
    found = predicted(least)
    # What a real step took beyond the prediction, smaller batches are taken to need in proportion.
    within = limit * found.peak // max(takes[least], found.peak)
    raise ValueError(
        f"{size(limit)} is not enough: {least.name}, which takes least, would take {size(takes[least])}, "
        f"{size(takes[least] - limit)} more. What would fit: {_instead(step, least, within)}. Also to try:"
        + "".join(f"\n  - {each}" for each in _also(step, rung, found))
    )


def _instead(step: Step, rung: Rung, limit: int) -> str:
    """How much smaller the batch, which was refused, would have to be for a predicted peak within ``limit``."""
    rows = rows_of(step.batch)
    most = min(step.largest(rung, limit), rows - 1)
    return f"a batch of {most} instead of {rows}" if most else f"a smaller model: not even a batch of 1 of {rows} fits"


def _also(step: Step, last: Rung, found: Breakdown) -> list[str]:
    """What else there is to try, with the memory it would take or free."""
    tries, switch = [], switch_of(step.model)
    if switch and not recomputes(step.model):
        peak = step.predicted(last, checkpoint=True).peak
        if peak < found.peak:
            tries.append(f"checkpointing as well, before prac.compress (model.{switch}()): {size(peak)}, predicted")
    state, gradients = (found.at_peak.get(kind, 0) for kind in ("optimizer", "gradients"))
    if state:
        tries.append(f"an optimizer with less state: this one holds {size(state)}, one in 8 bits a quarter of that")
    if state + gradients and all(p.requires_grad for p in step.model.parameters()):
        tries.append(f"adapters (LoRA, with peft): most of the {size(state + gradients)} of gradients and state go")
    tries.append("keeping activations in the host's memory (torch.autograd.graph.save_on_cpu()): slow")
    return tries


def _real_peak(step: Step, rung: Rung) -> int | None:
    """Bytes at the peak of a real step, without the optimizer's state; None if there is not that much."""
    model = step.model
    device = next(model.parameters()).device
    _refuse_made_up(step)
    with ExitStack() as undo:
        undo.callback(model.zero_grad, set_to_none=True)
        undo.enter_context(in_mode(model, training=True))
        undo.enter_context(buffers_kept(model))
        undo.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        undo.callback(step.compressed(rung).restore)
        try:
            return measure(model, step.batch, autocast=step.autocast, objective=step.objective).peak
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            raise ValueError(
                f"the budget could not be tried on a real step ({type(error).__name__}: {error}). Give a batch as it "
                "is trained on, on the model's device, or check=False to go by the prediction."
            ) from error


def _refuse_made_up(step: Step) -> None:
    """Raise ValueError for tokens that the model does not have: on CUDA they would end the process's use of it."""
    ids = step.batch.get("input_ids") if isinstance(step.batch, Mapping) else None
    table = step.model.get_input_embeddings() if hasattr(step.model, "get_input_embeddings") else None  # type: ignore[operator]
    if not isinstance(ids, Tensor) or not isinstance(table, nn.Embedding) or ids.is_meta or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= table.num_embeddings:
        raise ValueError(
            f"to try the budget on a real step, the batch has to be one that is trained on: its input_ids go from "
            f"{low} to {high}, and the model has {table.num_embeddings} tokens. check=False goes by the prediction."
        )


def _rungs(step: Step, predicted: Callable[[Rung], Breakdown]) -> Iterator[Rung]:
    """The ways that there are for a step: each without logits where its loss can be chunked and that saves memory.

    With a small vocabulary or few tokens it does not; where plain training takes most elsewhere, others may save.
    """
    plain, chunked, *others = LADDER
    yield plain
    try:
        saves = predicted(chunked).peak < predicted(plain).peak
    except Exception as error:
        # An objective of the user's that works in plain training may fail for want of logits in any way of its own.
        if not isinstance(error, NotChunked):
            if step.objective is None:
                raise
            warn(
                f"the loss is not chunked, since the objective fails without logits ({type(error).__name__}: {error})."
            )
        yield from (rung._replace(loss=None) for rung in others)
        return
    if saves:
        yield from (chunked, *others)
        return
    for rung in others:
        yield min(rung._replace(loss=None), rung, key=lambda way: predicted(way).peak)
