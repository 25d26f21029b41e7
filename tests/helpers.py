"""What several tests need: activations with a known spectrum, subspaces, gradients."""

from __future__ import annotations

import itertools
import os
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from prac.config import Rank
from prac.estimators.clock import Clock
from prac.estimators.subspace import Subspace


def activations(m: int, n: int, *, s: int = 4, tail: float = 0.1, seed: int = 0, dtype=torch.float64) -> Tensor:
    """An (m, n) matrix with a degenerate spectrum (Assumption 4): s large singular values, then a long tail."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    u = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    sigma = tail * torch.linspace(1, 0.5, rank, dtype=torch.float64)
    sigma[:s] = torch.linspace(10, 5, s, dtype=torch.float64)[:rank]
    return ((u * sigma) @ v.T).to(dtype)


class Steps(Clock):
    """A clock to set by hand."""

    def __init__(self, step: int = 0) -> None:
        self._model_kept = nn.Linear(1, 1)
        super().__init__(self._model_kept, step)


def subspace(r1: int, r2: int, *, k: float = 1.0, seed: int = 0, name: str = "layer", **kwargs: Any) -> Subspace:
    """A subspace with a clock of its own."""
    return Subspace(Rank(r1, r2, k), kwargs.pop("clock", None) or Steps(), name=name, seed=seed, **kwargs)


def draws(x: Tensor, r1: int, r2: int, count: int, **kwargs: Any) -> Tensor:
    """``count`` independent reconstructions of x: (count, m, n)."""
    estimates = []
    for seed in range(count):
        s = subspace(r1, r2, seed=seed, **kwargs)
        estimates.append(s.keep(x).reconstruct())
    return torch.stack(estimates)


def captured(x: Tensor, q: Tensor) -> float:
    """‖X Q‖², of which an orthonormal Q of so many columns can have no more than the top singular values'."""
    return (x.double() @ q.double()).square().sum().item()


def assert_mean(samples: Tensor, expected: Tensor, standard_errors: float = 4.0) -> None:
    """The mean over dim 0 is ``expected`` within so many standard errors, as a whole and entry by entry.

    Entry by entry the bound is widened for the number of entries (Bonferroni), so that the
    chance of a false alarm is the one of a single test at ``standard_errors``.
    """
    count = samples.shape[0]
    mean, error = samples.mean(0), samples.std(0) / count**0.5
    bound = torch.distributions.Normal(0.0, 1.0)
    alpha = 2 * (1 - bound.cdf(torch.tensor(standard_errors, dtype=torch.float64)))
    widened = bound.icdf(1 - alpha / (2 * mean.numel())).item()
    deviation = ((mean - expected).abs() / error.clamp_min(1e-300)).nan_to_num(0.0)
    rounding = 1e-9 * expected.abs().max()
    assert (((mean - expected).abs() < rounding) | (deviation < widened)).all(), deviation.max()
    # As a whole: the squared error of the mean is its variance, on average.
    total, variance = (mean - expected).square().sum(), error.square().sum()
    assert total <= (1 + standard_errors) * variance + rounding**2, (total / variance).item()


def gradients(module: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output: of all parameters, by name."""
    module.zero_grad(set_to_none=True)
    loss(module(*inputs, **kwargs)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def loss(output: Any) -> Tensor:
    """A scalar in which every output element has its own weight."""
    if not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    weights = weights.to(output.device)
    return (output.float() * weights).sum() if output.dtype != torch.float64 else (output * weights.double()).sum()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def odd_shapes() -> list[tuple[int, ...]]:
    """Shapes nobody would choose: (..., n)."""
    return [(37, 19), (3, 11, 23), (2, 1, 5, 17)]


pairs = itertools.pairwise


def agree(ours: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Loss and gradients in training, with the same random numbers."""
    torch.manual_seed(3)
    got = gradients(ours, *args, **kwargs)
    torch.manual_seed(3)
    expected = gradients(plain, *args, **kwargs)
    assert got.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < 1e-4 or (got[name] - gradient).abs().max() < 1e-5 * scale, name


def leave(*, in_step: bool = True) -> NoReturn:
    """End one of several spawned processes, which has done all that it was to do; where they are in step, together.

    Caches of torch's sharded tensors keep Gloo's threads to the end, and one of them that lets go of a tensor when the
    interpreter is already coming down aborts its process: so it does not come down.
    """
    if in_step:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
