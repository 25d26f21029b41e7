"""The paper's statements, each against float64 on fresh data with a stated confidence."""

from __future__ import annotations

import pytest
import torch
from helpers import activations, assert_mean, draws, subspace

from prac.ops import linear

M, N, R1, R2 = 41, 23, 5, 6


def tail_energy(x: torch.Tensor, r1: int) -> float:
    """‖X − X Q1 Q1ᵀ‖² for the exact top-r1 right singular vectors."""
    return torch.linalg.svdvals(x)[r1:].square().sum().item()


@pytest.mark.parametrize(("r1", "r2"), [(R1, R2), (0, R2), (R1, 1), (N - 4, 4), (1, N - 1)])
def test_theorem_6_prac_is_unbiased(r1: int, r2: int) -> None:
    """E[X̃] = X within 4 standard errors over 2,000 draws (RAC, r1 = 0, is Theorem 14)."""
    x = activations(M, N, seed=r1)
    assert_mean(draws(x, r1, r2, 2000), x)


def test_a_wrong_scale_is_biased() -> None:
    """The same check rejects k = 1.2 k0 and k = 0.5 k0 (Figure 7), so it can fail."""
    x = activations(M, N)
    for k in (0.5, 1.2):
        with pytest.raises(AssertionError):
            assert_mean(draws(x, R1, R2, 2000, k=k), x)


@pytest.mark.parametrize(("r1", "r2"), [(R1, R2), (0, R2), (2, 3), (R1, 1)])
def test_theorem_7_variance_is_exact(r1: int, r2: int) -> None:
    """E‖X̃ − X‖² = (k − 1) ‖X − X Q1 Q1ᵀ‖², within 2% over 4,000 draws."""
    x = activations(M, N, s=3, tail=1.0, seed=10 * r1 + r2)
    errors = (draws(x, r1, r2, 4000) - x).square().sum((1, 2))
    k = (N - r1) / r2
    assert errors.mean().item() == pytest.approx((k - 1) * tail_energy(x, r1), rel=0.02)


def test_pac_error_is_the_tail() -> None:
    """PAC (r2 = 0) errs by the energy it leaves out, exactly, and without randomness."""
    x = activations(M, N)
    first, second = draws(x, R1, 0, 2)
    assert torch.equal(first, second)
    assert (first - x).square().sum().item() == pytest.approx(tail_energy(x, R1), rel=1e-9)


def test_rac_variance_exceeds_prac_by_the_predicted_factor() -> None:
    """Table 1 on a degenerate spectrum: (n/r − 1)‖X‖² against ((n − r1)/r2 − 1) tail, same r."""
    x = activations(M, N, s=R1)
    r = R1 + R2
    prac = (draws(x, R1, R2, 2000) - x).square().sum((1, 2)).mean().item()
    rac = (draws(x, 0, r, 2000) - x).square().sum((1, 2)).mean().item()
    predicted = (N / r - 1) * x.square().sum().item() / (((N - R1) / R2 - 1) * tail_energy(x, R1))
    assert predicted > 100
    assert rac / prac == pytest.approx(predicted, rel=0.05)


def test_lower_bound_of_the_appendix_is_attained() -> None:
    """With s large and n − s equal singular values, PRAC's variance is ((n − s)/(r − s) − 1) q."""
    s, r = 3, 9
    x = activations(M, N, s=s)
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    sigma[s:] = 0.3
    x = (u * sigma) @ vh
    q = sigma[s:].square().sum().item()
    errors = (draws(x, s, r - s, 4000) - x).square().sum((1, 2))
    assert errors.mean().item() == pytest.approx(((N - s) / (r - s) - 1) * q, rel=0.02)


def weight_gradients(count: int, r1: int, r2: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = activations(M, N, tail=1.0)
    weight = torch.randn(13, N, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(M, 13, generator=generator, dtype=torch.float64)
    samples = []
    for seed in range(count):
        y = linear(x, weight, None, subspace(r1, r2, seed=seed))
        (grad,) = torch.autograd.grad(y, weight, dy)
        samples.append(grad)
    return torch.stack(samples), dy.T @ x, dy, x


def test_lemma_3_weight_gradient_is_unbiased_and_bounded() -> None:
    """E[dW] = dYᵀX, and E‖dW − dYᵀX‖² ≤ σ² ‖dY‖₂² with σ² from Theorem 7 (tight up to the spectrum of dY)."""
    samples, exact, dy, x = weight_gradients(3000, R1, R2)
    assert_mean(samples, exact)
    sigma_squared = ((N - R1) / R2 - 1) * tail_energy(x, R1)
    variance = (samples - exact).square().sum((1, 2)).mean().item()
    bound = sigma_squared * torch.linalg.matrix_norm(dy, 2).item() ** 2
    smallest = sigma_squared * torch.linalg.svdvals(dy)[-1].item() ** 2
    assert 0.05 * bound < variance <= bound
    assert smallest > 0


def test_the_two_thin_products_are_the_reconstruction() -> None:
    """(dYᵀ Z) Pᵀ = dYᵀ X̃: the weight gradient never needs X̃ but equals what it would give."""
    x = activations(M, N)
    dy = torch.randn(M, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = subspace(R1, R2)
    kept = s.keep(x)
    torch.testing.assert_close(kept.weight_grad(dy), dy.T @ kept.reconstruct(), rtol=1e-12, atol=1e-12)


def run_proposition_1(n: int, r1: int, r2: int, steps: int = 4000) -> tuple[float, torch.Tensor]:
    """SGD on E(w_1 − 3ξ)² + w_2² + … + w_n², ξ Bernoulli(½), its gradient projected as G P Pᵀ.

    The paper's example is n = 2. A refresh sees the root mean square of each coordinate's
    gradient over ξ, of which the first is always the largest: at least 3 against at most 2.

    Returns the mean of w_1 over the second half, and the largest |w_2|, …, |w_n| in it.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.ones(n, dtype=torch.float64)
    w[0] = 0.0
    s = subspace(r1, r2, T1=1, T2=1)
    history = []
    for t in range(steps):
        magnitude = 2 * w
        magnitude[0] = 2 * ((w[0] ** 2 + (w[0] - 3) ** 2) / 2).sqrt()
        s.clock.step = t
        s.update(torch.diag(magnitude))
        xi = torch.bernoulli(torch.tensor(0.5, dtype=torch.float64), generator=generator)
        gradient = 2 * w
        gradient[0] = 2 * (w[0] - 3 * xi)
        w = w - 0.5 / (t + 10) ** 0.75 * (gradient @ s.p_NR) @ s.p_NR.T  # Robbins-Monro
        history.append(w)
    late = torch.stack(history[steps // 2 :])
    return late[:, 0].mean().item(), late[:, 1:].abs().amax(0)


@pytest.mark.parametrize("n", [2, 6])
def test_proposition_1_both_ways(n: int) -> None:
    """Principal-only never moves w_2 from 1; PRAC converges, and RAC does with more noise."""
    w1, rest = run_proposition_1(n, 1, 0)
    assert w1 == pytest.approx(1.5, abs=0.1)
    assert (rest == 1.0).all()
    w1, prac = run_proposition_1(n, 1, 1)
    assert w1 == pytest.approx(1.5, abs=0.1)
    assert (prac < 0.01).all()
    w1, rac = run_proposition_1(n, 0, 1)
    assert w1 == pytest.approx(1.5, abs=0.3)
    assert ((prac < rac) & (rac < 0.25)).all()
