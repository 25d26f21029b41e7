"""The variance of weight gradients: every formula against its definition and against draws, in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from helpers import Steps, activations
from torch import Tensor

from prac.allocation.calibration import Half, Measured
from prac.allocation.choices import Choices
from prac.allocation.variance import best_split, of_rank, of_rounding, tails
from prac.config import Bits, Rank
from prac.estimators.bases import principal_basis, random_complement
from prac.estimators.rounded import Stored
from prac.estimators.subspace import Subspace

SHAPES = [(37, 19), (41, 23), (29, 17)]


def problem(m: int, n: int, o: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """X (m × n) with a tail, dY (m × o) and γ (n), float64."""
    generator = torch.Generator().manual_seed(m)
    dy_MO = torch.randn(m, o, generator=generator, dtype=torch.float64) * torch.rand(m, 1, generator=generator)
    gamma_N = torch.rand(n, generator=generator, dtype=torch.float64) * 2
    return activations(m, n, tail=2.0, seed=m), dy_MO, gamma_N


def within(samples: list[float], expected: float, standard_errors: float = 4.0) -> None:
    """Their mean is ``expected``, to so many standard errors."""
    values = torch.tensor(samples, dtype=torch.float64)
    error = values.std().item() / len(samples) ** 0.5
    assert abs(values.mean().item() - expected) <= standard_errors * error, (values.mean().item(), expected, error)


def measured(x_MN: Tensor, dy_MO: Tensor, gamma_N: Tensor | None) -> Measured:
    d_ON = dy_MO.mT @ x_MN
    weight_M = dy_MO.square().sum(1)
    return Measured("layer", x_MN, weight_M, d_ON.mT @ d_ON, gamma_N, x_MN.dtype.itemsize, True, 0)


# --- the variance of a rank ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_norm_it_is_the_paper_s_formula(shape: tuple[int, int]) -> None:
    """(k − 1) ‖D (I − Q1 Q1ᵀ)‖², for every rank and split, to rounding."""
    x_MN, dy_MO, _ = problem(*shape)
    n, d_ON = shape[1], dy_MO.mT @ x_MN
    found = tails(x_MN.mT @ x_MN, d_ON.mT @ d_ON)
    v_NN = torch.linalg.svd(x_MN).Vh.mT
    for r1, r2 in itertools.product(range(n + 1), repeat=2):
        if r1 + r2 > n or r2 == 0:
            continue
        rest_ON = d_ON - d_ON @ v_NN[:, :r1] @ v_NN[:, :r1].mT
        expected = ((n - r1) / r2 - 1) * rest_ON.square().sum()
        assert of_rank(found, r1, r2).item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("r1", "r2", "k"), [(4, 5, 1.0), (0, 3, 1.0), (6, 2, 1.0), (3, 7, 0.6), (9, 1, 1.0)])
def test_behind_a_norm_s_scale_it_is_the_mean_over_draws(shape: tuple[int, int], r1: int, r2: int, k: float) -> None:
    """500 draws of Q2; four standard errors are a false alarm once in 16,000."""
    x_MN, dy_MO, gamma_N = problem(*shape)
    n, d_ON = shape[1], dy_MO.mT @ x_MN
    found = tails(x_MN.mT @ x_MN, d_ON.mT @ d_ON, gamma_N)
    q1_NR = principal_basis(x_MN.mT @ x_MN, r1)
    scale = k * (n - r1) / r2
    generator = torch.Generator().manual_seed(r1)
    errors = []
    for _ in range(500):
        q2_NR = random_complement(q1_NR, r2, generator=generator)
        off_ON = d_ON @ (q1_NR @ q1_NR.mT + scale * q2_NR @ q2_NR.mT) - d_ON
        errors.append((off_ON * gamma_N).square().sum().item())
    within(errors, of_rank(found, r1, r2, k).item())


def test_the_limits_of_the_formula() -> None:
    x_MN, dy_MO, gamma_N = problem(37, 19)
    d_ON = dy_MO.mT @ x_MN
    found = tails(x_MN.mT @ x_MN, d_ON.mT @ d_ON, gamma_N)
    for r1 in range(20):  # nothing lost, and PAC, whose error is its bias
        assert of_rank(found, r1, 19 - r1).item() <= 1e-9 * d_ON.square().sum() * (r1 < 19)
        q1_NR = principal_basis(x_MN.mT @ x_MN, r1)
        bias = ((d_ON - d_ON @ q1_NR @ q1_NR.mT) * gamma_N).square().sum().item()
        assert of_rank(found, r1, 0).item() == pytest.approx(bias, rel=1e-8, abs=1e-8)
    for r in range(1, 20):
        splits = {r1: of_rank(found, r1, r - r1).item() for r1 in range(min(r, 8))}
        r1, variance = best_split([found], r, 7)
        assert variance == splits[r1] == min(splits.values())


# --- the variance of rounding ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits", [Bits(2), Bits(4), Bits(8), Bits(4, 7), Bits(2, 5), Bits(4, 32, True), Bits(2, 8, True)]
)
@pytest.mark.parametrize("shape", [*SHAPES, (31, 70)])
def test_rounding_is_the_mean_over_draws(bits: Bits, shape: tuple[int, int]) -> None:
    """100 draws of the dither, on widths that no group divides."""
    x_MN, dy_MO, gamma_N = problem(*shape)
    errors = []
    for seed in range(100):
        kept = Stored(bits, Steps(), unbiased=True, seed=seed, name="x").keep(x_MN)
        off_ON = (kept.weight_grad(dy_MO) - dy_MO.mT @ x_MN) * gamma_N
        errors.append(off_ON.square().sum().item())
    within(errors, of_rounding(x_MN, dy_MO.square().sum(1), bits, gamma_N.square()))


def test_rounding_to_bfloat16_is_the_mean_over_signs() -> None:
    x_MN, dy_MO, _ = problem(37, 19)
    off_MN = x_MN.bfloat16().double() - x_MN
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (2000, 37, 1), generator=generator) * 2.0 - 1
    errors = [((dy_MO * sign).mT @ off_MN).square().sum().item() for sign in signs]
    within(errors, of_rounding(x_MN, dy_MO.square().sum(1), Bits(16)))
    assert of_rounding(x_MN, dy_MO.square().sum(1), Bits(32)) == of_rounding(x_MN, dy_MO.square().sum(1), None) == 0
    assert of_rounding(x_MN.bfloat16(), dy_MO.square().sum(1), Bits(16)) == 0


def test_a_step_of_evenly_spread_values_is_s_squared_over_six() -> None:
    x_MN = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = (1 + 2**-7) / 15 * (x_MN.amax(1) - x_MN.amin(1)).mean()
    found = of_rounding(x_MN, torch.ones(2000), Bits(4)) / x_MN.numel()
    assert found == pytest.approx(step.square().item() / 6, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_rank_with_a_rounded_product(bits: int, scaled: bool) -> None:
    """Both errors together, as the estimator makes them; within a tenth, and four standard errors."""
    x_MN, dy_MO, gamma_N = problem(53, 23)
    gamma = gamma_N if scaled else None
    keep = Rank(5, 6, bits=Bits(bits, 16))
    predicted = Choices(measured(x_MN, dy_MO, gamma)).variance(keep)
    errors = []
    for seed in range(200):
        dw_ON = Subspace(keep, Steps(), seed=seed, name="x").keep(x_MN).weight_grad(dy_MO)
        off_ON = (dw_ON - dy_MO.mT @ x_MN) * (1.0 if gamma is None else gamma)
        errors.append(off_ON.square().sum().item())
    values = torch.tensor(errors, dtype=torch.float64)
    bound = 0.1 * predicted + 4 * values.std().item() / len(errors) ** 0.5
    assert abs(values.mean().item() - predicted) <= bound


def test_held_out_is_what_a_basis_of_one_half_loses_of_the_other() -> None:
    x_MN, dy_MO, gamma_N = problem(60, 23)
    rows = [slice(0, 30), slice(30, 60)]
    halves = []
    for half in rows:
        d_ON = dy_MO[half].mT @ x_MN[half]
        halves.append(Half(x_MN[half].mT @ x_MN[half], d_ON.mT @ d_ON))
    whole = measured(x_MN, dy_MO, gamma_N)
    choices = Choices(dataclasses.replace(whole, halves=tuple(halves)), held_out=True)
    r1, r2 = 4, 5
    lost, energy = 0.0, 0.0
    for basis, of in (rows, rows[::-1]):
        d_ON = dy_MO[of].mT @ x_MN[of]
        q1_NR = principal_basis(x_MN[basis].mT @ x_MN[basis], r1)
        generator = torch.Generator().manual_seed(0)
        errors = []
        for _ in range(1000):
            q2_NR = random_complement(q1_NR, r2, generator=generator)
            off_ON = d_ON @ (q1_NR @ q1_NR.mT + (23 - r1) / r2 * q2_NR @ q2_NR.mT) - d_ON
            errors.append((off_ON * gamma_N).square().sum())
        lost += torch.stack(errors).mean().item()
        energy += (d_ON * gamma_N).square().sum().item()
    # Of 1,000 draws the mean is off by two percent; six is more than three standard errors.
    assert choices.variance(Rank(r1, r2)) == pytest.approx(whole.energy * lost / energy, rel=0.06)
    assert choices.variance(Bits(4)) == Choices(whole).variance(Bits(4))
