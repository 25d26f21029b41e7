"""``prac bench``: one transformer block, and what each method costs on it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prac.config import Config
from prac.convert.handle import Handle
from prac.lab.materials.blocks import Block, Shape, build
from prac.lab.measured import meters
from prac.lab.methods import peers
from prac.lab.methods.naming import Method

WARM_UP = 2  # steps: the first one compiles, and makes the first subspaces
REFRESHES = 3  # rounds: most is in small parallel pieces, which a busy machine makes slow at random


@dataclass(frozen=True)
class Cost:
    """What one method costs; ratios are to ``plain``."""

    method: str  # plain, a peer or a preset; +attentionN where attention is kept in N bits
    kept_units: float  # kept_bytes in activations of tokens × hidden, in the block's dtype
    kept_bytes: int  # for backward, see meters.kept_bytes
    held_bytes: int  # the same from outside: what was allocated when forward was over, without the output
    peak_bytes: int  # the most allocated during the step, above what was before; with the weights' gradients
    flops: int  # of the matrix products and attention of a step that refreshes nothing
    flops_ratio: float
    time_ms: float  # of such a step, median
    time_ratio: float  # to plain's step of the same round, median
    time_spread: tuple[float, float]  # the quartiles of that ratio
    input_grad_error: float  # ‖dx − dx_plain‖ / ‖dx_plain‖, one draw
    weight_grad_error: float  # the same over all parameters together
    worst_parameter: str | None  # whose own gradient is furthest off, relative to itself; None if none is off
    worst_parameter_error: float  # by how much
    refresh_ms: float | None  # what refreshing every subspace adds to a step; None if the method is not of prac
    refresh_share: float | None  # that, spread over the T1 steps between refreshes, as a share of a step

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal to what it is after a trip through JSON."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


@dataclass
class _Subject:
    """A method at work on its own copy of the block, and what was measured of it so far."""

    name: str
    block: Block
    handle: Handle | None
    errors: dict[str, Any]  # the fields of a row that say how far its gradients are off
    kept: int
    allocated: meters.StepBytes
    flops: int
    seconds: list[float] = field(default_factory=list)
    refreshing: list[float] = field(default_factory=list)


def measure_block(
    shape: Shape,
    methods: Sequence[str] | Mapping[str, Config | Method | None] = peers.DEFAULTS,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 7,
    seed: int = 0,
    notify: Callable[[str], None] = lambda doing: None,
    before: Callable[[str, Block], None] = lambda name, block: None,
) -> list[Cost]:
    """Measure every method on the same block with the same weights, input and gradient of the output.

    ``plain`` is always measured and comes first: the others are compared with it. Steps are timed in rounds of one
    per method, in an order that turns from round to round, so that a slow moment of the machine hits all alike.

    Args:
        shape: of the block.
        methods: names, as :func:`prac.lab.methods.naming.parse` takes them; or configs or methods of your own by
            name, ``plain`` (None) first.
        dtype: of weights and activations.
        device: where.
        repeats: rounds.
        seed: of weights, input and gradient.
        notify: told what comes next: for each method once, for each step of each round, and for each
            refresh of prac's own.
        before: given the name of each method and its own copy of the block before the method is put to work on it:
            whoever brings kernels of his own puts them in here.

    Raises:
        ValueError: for an unknown method, or a setting that does not fit the block.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if isinstance(methods, Mapping):
        chosen = {name: _named(name, method) for name, method in methods.items()}
    else:
        chosen = peers.variants(methods)
    if any(method.compiled for method in chosen.values()):
        torch.compiler.reset()  # torch compiles the same function for a few blocks only, then gives up
    original, (x, dy) = build(shape, dtype=dtype, device=torch.device(device), seed=seed)
    exact = _gradients(original, x, dy)
    subjects = []
    for name, method in chosen.items():
        notify(name)
        try:
            peers.check_device(method, x.device)
            block = copy.deepcopy(original)
            before(name, block)
            subjects.append(_prepare(method, block, x, dy, exact))
        except (RuntimeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"{name}: {' '.join(str(error).split())[:300]}") from error
    for turn in range(repeats):
        start = turn % len(subjects)
        for subject in (*subjects[start:], *subjects[:start]):
            notify(f"round {turn + 1} of {repeats}: {subject.name}")
            subject.seconds.append(_seconds(subject.block, x, dy))
    for turn in range(REFRESHES):
        for subject in subjects:
            if subject.handle is not None and subject.handle.config.T1 is not None:
                notify(f"refresh {turn + 1} of {REFRESHES}: {subject.name}")
                subject.refreshing.append(_refreshing_seconds(subject.handle, subject.block, x, dy))
    unit = x.numel() * x.element_size()
    return [_row(subject, subjects[0], unit) for subject in subjects]


def _named(name: str, method: Config | Method | None) -> Method:
    return dataclasses.replace(method, name=name) if isinstance(method, Method) else Method(name, method)


def _prepare(method: Method, block: Block, x: Tensor, dy: Tensor, exact: dict[str, Tensor]) -> _Subject:
    """Put a method to work, and measure all that does not take turns."""
    peers.limit_compiled_memory(method.budget)
    handle = peers.apply(block, method, x)
    for _ in range(WARM_UP):
        _seconds(block, x, dy)
    subject = _Subject(
        method.name,
        block,
        handle,
        errors=_errors(_gradients(block, x, dy), exact),
        kept=meters.kept_bytes(block, x, peers.SAVED if method.selective else ()),
        allocated=meters.allocated_bytes(block, x, dy),
        flops=meters.step_flops(block, x, dy),
    )
    meters.clear(block, x)
    return subject


def _gradients(block: Block, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of one step: the parameters' by name, the input's under ""."""
    block(x).backward(dy)
    gradients = {name: parameter.grad for name, parameter in (("", x), *block.named_parameters())}
    meters.clear(block, x)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _seconds(block: Block, x: Tensor, dy: Tensor) -> float:
    """The time of one step, forward and backward."""
    meters.synchronize(x.device)
    start = time.perf_counter()
    block(x).backward(dy)
    meters.synchronize(x.device)
    seconds = time.perf_counter() - start
    meters.clear(block, x)  # every method has a block of its own, and they all stay
    return seconds


def _refreshing_seconds(handle: Handle, block: Block, x: Tensor, dy: Tensor) -> float:
    """The time of a step T1 optimizer steps later, when every subspace is due."""
    meters.until_refresh(handle)
    return _seconds(block, x, dy)


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """What a row says of gradients ``found`` where plain training has ``exact``."""
    norms = {name: exact[name].float().norm().item() for name in exact}
    off = {name: (found[name].float() - exact[name].float()).norm().item() for name in exact}
    relative = {name: off[name] / norms[name] for name in exact if name and norms[name]}
    worst = max(relative, key=lambda name: relative[name])
    weights = math.hypot(*(off[name] for name in relative)) / math.hypot(*(norms[name] for name in relative))
    return {
        "input_grad_error": off[""] / norms[""],
        "weight_grad_error": weights,
        "worst_parameter": worst if relative[worst] else None,
        "worst_parameter_error": relative[worst],
    }


def _row(subject: _Subject, plain: _Subject, unit: int) -> Cost:
    ratios = [mine / its for mine, its in zip(subject.seconds, plain.seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    step = statistics.median(subject.seconds)
    refresh = max(0.0, statistics.median(subject.refreshing) - step) if subject.refreshing else None
    interval = subject.handle.config.T1 if subject.handle else None
    return Cost(
        method=subject.name,
        kept_units=subject.kept / unit,
        kept_bytes=subject.kept,
        held_bytes=subject.allocated.held,
        peak_bytes=subject.allocated.peak,
        flops=subject.flops,
        flops_ratio=subject.flops / plain.flops,
        time_ms=1e3 * step,
        time_ratio=statistics.median(ratios),
        time_spread=(low, high),
        refresh_ms=None if refresh is None else 1e3 * refresh,
        refresh_share=None if refresh is None or interval is None else refresh / (interval * step),
        **subject.errors,
    )
