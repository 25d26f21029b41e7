"""Ranks and bits where they count, for a budget of bytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prac.allocation.calibration import GROUP, watched_step
from prac.allocation.choices import Choices
from prac.allocation.waterfill import Choice, fill
from prac.config import Bits, Config, Factors, Rank
from prac.convert.compress import compress
from prac.convert.conversion import Filter
from prac.convert.example import example_for
from prac.estimators.base import Estimator
from prac.estimators.subspace import subspaces_among
from prac.presets import as_config
from prac.runtime.running import Example
from prac.runtime.text import aligned


@dataclass(frozen=True)
class Decision:
    """One tensor: how it is kept, and how the uniform policy would have kept it.

    Variances are E‖G̃ − G‖² / ‖G‖², G being the gradients of all weights that read the tensor.
    """

    name: str
    keep: Choice
    bytes_per_token: int
    variance: float
    uniform: Choice | None
    uniform_variance: float | None


@dataclass(frozen=True)
class Allocation:
    """What was decided; ``str`` gives a table. ``compress(model, allocation.config)``.

    Attributes:
        config: the one it started from, with :attr:`prac.Config.layers` filled in.
        decisions: one for each tensor, in the model's order.
        fixed: bytes per token of everything else that compressed layers keep.
        budget: bytes per token of everything.
        variance: what was minimised, predicted for the calibration batch: Σ E‖G̃ − G‖² / Σ ‖G‖² over all tensors; with
            ``relative`` the mean of the tensors' own ratios.
        uniform_variance: of the policy that the budget was taken from, or of ``config`` where the budget is a number;
            None where that policy keeps other tensors.
        uniform_bytes_per_token: of that policy.
    """

    config: Config
    decisions: tuple[Decision, ...]
    fixed: int
    budget: int
    variance: float
    uniform_variance: float | None
    uniform_bytes_per_token: int

    @property
    def bytes_per_token(self) -> int:
        """Of everything that compressed layers keep, as ``handle.summary()`` counts it."""
        return self.fixed + sum(decision.bytes_per_token for decision in self.decisions)

    def table(self) -> str:
        """Each tensor, how it is kept, and its variance beside the uniform policy's; then the totals."""
        lines: list[tuple[str, ...]] = [("tensor", "kept as", "bytes per token", "variance", "uniform", "variance")]
        for d in self.decisions:
            lines.append(
                (d.name, _label(d.keep), f"{d.bytes_per_token:,}", f"{d.variance:.2e}",
                 "" if d.uniform is None else _label(d.uniform),
                 "" if d.uniform_variance is None else f"{d.uniform_variance:.2e}")
            )  # fmt: skip
        before = ""
        if self.uniform_variance is not None:
            before = f", {self.uniform_variance:.2e} with {self.uniform_bytes_per_token:,} bytes for the uniform policy"
        return "\n".join(
            [
                *aligned(lines, right={2, 3, 5}),
                "",
                f"{self.bytes_per_token:,} bytes per token of a budget of {self.budget:,}, {self.fixed:,} of them for "
                f"what was not up for choice. Variance of the gradients: {self.variance:.2e}{before}.",
            ]
        )

    __str__ = table


def allocate(
    model: nn.Module,
    batch: Example,
    budget: int | str | Config,
    config: Config | str = "lean",
    *,
    bits: Sequence[int | Bits] = (2, 4, 6, 8, 16),
    rank_bits: Sequence[int | None] = (4, 8, 16),
    relative: bool = False,
    held_out: bool = False,
    objective: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
) -> Allocation:
    """The ranks and bits with the least variance of the weights' gradients for a budget of bytes.

    One training step on ``batch`` gives, for every tensor that linear layers read, the variance of every rank, split
    and number of bits in closed form (:mod:`prac.allocation.variance`); the budget then goes where a byte buys most
    (:func:`prac.allocation.waterfill.fill`, within one step of the optimum). Nothing is trained, the model stays as it
    is.

    Up for choice are the x̂ of norm groups and of other norms that linear layers read (these in bits only), and the
    inputs that linear layers keep of their own. What a nonlinearity follows (g and u of an MLP, q and k) has no such
    formula and stays as ``config`` has it, and so do norms with ``group=None``. Left out is the noise in a norm's own
    gradients, which for x̂ is small (:mod:`prac.ops.shared_norm`), and that a basis ages between refreshes; on tokens
    that it was not made from, and ``held_out`` is about these, a rank of a small model was seen to lose several times
    as much. Activations at initialisation say little about training: calibrate after some steps.

    Args:
        model: as for :func:`prac.compress`, not compressed yet.
        batch: its input, with labels; the more tokens the better, several times the width at least.
        budget: bytes per token of everything that compressed layers keep, as ``handle.summary()`` adds them up; or the
            policy, a preset's name or a config, whose bytes are not to be exceeded.
        config: what else is kept how.
        bits: ways to keep every direction, ``Bits`` or their numbers (then rotated where ``config`` has them so); empty
            for ranks alone.
        rank_bits: ways to keep Z where a tensor is at a rank, None for its own dtype; empty for bits alone. For a byte,
            bits nearly always leave less variance; ranks take fewer operations.
        relative: minimise the mean of ‖G̃ − G‖² / ‖G‖² over tensors rather than the sum of ‖G̃ − G‖²: for optimizers
            such as Adam, whose steps do not depend on the size of a layer's gradients.
        held_out: judge ranks by gradients of one half of the batch with bases of the other, as in the steps between
            refreshes. By default both are of the whole batch, as in the step of a refresh; there it is exact.
        objective: the scalar to differentiate, of the model's output; by default its ``loss``, or itself.
        autocast: dtype of the forward pass.
        include: as for :func:`prac.compress`, which is then to be given the same.
        exclude: likewise.

    Raises:
        ValueError: if the budget is below what the cheapest choice takes (the message says how much that is), if
            activations or gradients are not finite, if nothing is up for choice, and for what
            :func:`prac.compress` raises: nothing matched, compressed already, an unknown preset.

    >>> found = allocate(model, batch, "fast")
    >>> print(found)
    >>> prac.compress(model, found.config)
    """
    if not bits and not rank_bits:
        raise ValueError("there is nothing to choose from: give bits, rank_bits or both.")
    base = as_config(config)
    policy = base if isinstance(budget, int) else as_config(budget)
    _check(base, policy)
    example = example_for(model)
    how: dict[str, Any] = {"include": include, "exclude": exclude, "example": batch if example is None else example}
    own, theirs = (_survey(model, each, how) for each in (base, policy))

    tensors = _measure(model, base, own, batch, how, held_out, autocast=autocast, objective=objective)
    fixed = own.total - sum(tensor.bytes(own.keeps[name]) for name, tensor in tensors.items())
    limit = budget if isinstance(budget, int) else theirs.total
    energies = [max(tensor.measured.energy, torch.finfo(torch.float64).tiny) for tensor in tensors.values()]
    units = [energy * len(energies) if relative else sum(energies) for energy in energies]

    alike = (policy.group is None) == (base.group is None) and theirs.keeps.keys() >= tensors.keys()
    uniform = [tensor.option(theirs.keeps[name]) if alike else None for name, tensor in tensors.items()]
    like = next((keep for keep in (base.group, base.linear) if isinstance(keep, Bits)), None)
    choices = [
        [option._replace(variance=option.variance / unit) for option in tensor.options(bits, rank_bits, each, like)]
        for tensor, each, unit in zip(tensors.values(), uniform, units, strict=True)
    ]
    same = [each._replace(variance=each.variance / unit) for each, unit in zip(uniform, units, strict=True) if each]
    chosen = fill(choices, limit - fixed, instead=same)
    if chosen is None:
        least = fixed + sum(min(option.bytes for option in options) for options in choices)
        raise ValueError(
            f"a budget of {limit:,} bytes per token is too small: the cheapest choice takes {least:,}, {fixed:,} of "
            "them for what is not up for choice. Raise it, or give a config that keeps the rest in fewer bits."
        )
    decisions = tuple(
        Decision(
            name, option.keep, option.bytes, option.variance * unit / energy,
            None if each is None else each.keep, None if each is None else each.variance / energy,
        )
        for name, option, each, unit, energy in zip(tensors, chosen, uniform, units, energies, strict=True)
    )  # fmt: skip
    return Allocation(
        base.replace(layers=base.layers | {decision.name: decision.keep for decision in decisions}),
        decisions,
        fixed,
        limit,
        math.fsum(option.variance for option in chosen),
        math.fsum(each.variance for each in same) if same else None,
        theirs.total,
    )


def _check(*configs: Config) -> None:
    """Refuse what the closed forms are not of."""
    for keep in (keep for config in configs for keep in (*vars(config).values(), *config.layers.values())):
        if isinstance(keep, Factors):
            raise ValueError(
                "factors that are made anew in every step have no variance in closed form: give ranks or bits."
            )
        if isinstance(keep, Rank) and not keep.orthonormal:
            raise ValueError("the closed form is that of orthonormal random directions: leave out orthonormal=False.")


class _Survey(NamedTuple):
    """What a policy comes to on a model."""

    total: int  # bytes per token, as handle.summary() adds them up
    keeps: dict[str, Choice]  # of every tensor, by the module that keeps it
    norms: set[str]


def _survey(model: nn.Module, config: Config, how: dict[str, Any]) -> _Survey:
    with warnings.catch_warnings():  # they come again when the user compresses
        warnings.simplefilter("ignore")
        handle = compress(model, config, **how)
    try:
        layers = handle.layers()
        keeps = {e.name: _keep(e) for name in layers for e in handle.read_by(name)}
        norms = {name for name, layer in layers.items() if layer.kind == "norm"}
        return _Survey(sum(row.after or 0 for row in handle.rows()), keeps, norms)
    finally:
        handle.restore()


def _keep(estimator: Estimator) -> Choice:
    subspace = next(subspaces_among([estimator]), None)
    if subspace is not None:
        return subspace.rank
    return Bits(32) if estimator.bits is None else estimator.bits


def _measure(
    model: nn.Module, base: Config, own: _Survey, batch: Example, how: dict[str, Any], held_out: bool, **step: Any
) -> dict[str, Choices]:
    """The tensors that are up for choice, by name."""
    # Norms go unnamed, so that those of groups are found by what is kept for groups.
    linears = {name: keep for name, keep in base.layers.items() if name not in own.norms}
    watched = base.replace(group=None if base.group is None else GROUP, layers=linears)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = compress(model, watched, **how)
    try:
        tensors = [Choices(measured, held_out) for measured in watched_step(handle, batch, **step)]
    finally:
        handle.restore()
    if not tensors:
        raise ValueError(
            f"nothing is up for choice in this {type(model).__name__}: with this config no trained linear layer reads "
            "what it or a norm keeps."
        )
    return {tensor.measured.name: tensor for tensor in tensors}


def _label(keep: Choice) -> str:
    if isinstance(keep, Bits):
        return keep.label
    rank = f"{keep.r1}+{keep.r2}" if isinstance(keep.r1, int) else f"{keep.r1}n+{keep.r2}n"
    return rank if keep.bits is None else f"{rank}, {keep.bits.label}"
