"""The bases of a subspace: the principal one, by decomposition and by iteration, and the random complement."""

from __future__ import annotations

import pytest
import torch
from helpers import activations, captured

import prac.estimators.bases as module
from prac.estimators.bases import gram_matrix, orthonormalise, principal_basis, random_complement


@pytest.mark.parametrize(("m", "n", "r"), [(101, 37, 9), (12, 37, 12), (64, 5, 5), (7, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_principal_basis_is_that_of_the_svd(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    x = activations(m, n, tail=1.0, dtype=dtype)
    q = principal_basis(gram_matrix(x), r)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(q.T @ q, torch.eye(r, dtype=dtype), atol=tolerance, rtol=0)
    best = torch.linalg.svdvals(x.double())[:r].square().sum().item()
    assert captured(x, q) == pytest.approx(best, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrix_of_half_precision_is_exact_to_float32(dtype: torch.dtype) -> None:
    x = activations(77, 13, dtype=dtype) * 300
    assert gram_matrix(x).dtype == torch.float32
    torch.testing.assert_close(gram_matrix(x).double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-3)


def test_gram_matrix_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(101, 7)
    monkeypatch.setattr(module, "TOKENS_PER_SLICE", 17)
    torch.testing.assert_close(gram_matrix(x), x.T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ["1/i", "1/√i", "exp", "outlier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace_iteration_captures_what_eigh_does(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 0.5% of the best: cold, and warm from the best basis of a batch before, which 2% have left."""
    monkeypatch.setattr(module, "EIGH_MAX_WIDTH", 10)
    monkeypatch.setattr(module, "EIGH_MAX_WIDTH_WARM", 10)
    m, n, r = 1501, 251, 60
    generator = torch.Generator().manual_seed(3)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    outlier = torch.where(i == 1, 300.0, i**-0.5)
    sizes = {"1/i": 1 / i, "1/√i": i**-0.5, "exp": torch.exp(-6 * i / n), "outlier": outlier}[shape]
    turned, turn = (torch.randn(n, n, dtype=torch.float64, generator=generator) for _ in range(2))
    axes = torch.linalg.qr(turned).Q
    further = torch.matrix_exp(0.15 * (turn - turn.mT) / n**0.5)

    def batch(axes: torch.Tensor) -> torch.Tensor:
        x_MN = (torch.randn(m, n, dtype=torch.float64, generator=generator) * sizes) @ axes.mT
        return x_MN.to(dtype)

    before, x = batch(axes), batch(axes @ further)
    gram, best = gram_matrix(x), torch.linalg.svdvals(x.double())[:r].square().sum().item()
    old = torch.linalg.eigh(gram_matrix(before)).eigenvectors[:, n - r :]
    if shape != "outlier":
        assert captured(x.double(), old.double()) < 0.98 * best
    unrelated = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=generator)).Q
    for start, is_stale in ((None, False), (old, False), (unrelated, True)):
        q = principal_basis(gram, r, start_NR=start, is_stale=is_stale, generator=torch.Generator().manual_seed(0))
        assert captured(x.double(), q.double()) > 0.995 * best, (start is None, is_stale)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(q.T @ q, torch.eye(r, dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("n", "r", "rank"), [(32, 32, 31), (32, 32, 5), (200, 60, 10), (200, 60, 0), (200, 199, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalising_what_depends_on_each_other(n: int, r: int, rank: int, dtype: torch.dtype) -> None:
    """Columns of a lower rank than they are many, also none at all: an orthonormal basis of as many."""
    generator = torch.Generator().manual_seed(n + r + rank)
    left, right = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((n, rank), (rank, r)))
    sizes = torch.logspace(3, -3, r, dtype=torch.float64)
    a = (left @ right * sizes).to(dtype)
    q = orthonormalise(a, generator)
    assert q.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(q.T @ q, torch.eye(r, dtype=dtype), atol=tolerance, rtol=0)
    if 0 < rank < r:  # and the columns are in it, but for the noise
        inside = torch.linalg.qr(left).Q
        assert (q.double().T @ inside).square().sum() > 0.999 * min(rank, n)


def test_many_tokens_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so-many-th of them; the basis captures as much."""
    monkeypatch.setattr(module, "MOST_TOKENS", 400)
    x = activations(4003, 67, s=10, tail=1.0)
    gram = gram_matrix(x)
    torch.testing.assert_close(gram, x[::10].T @ x[::10])
    assert captured(x, principal_basis(gram, 10)) > 0.995 * torch.linalg.svdvals(x)[:10].square().sum().item()
    torch.testing.assert_close(gram_matrix(x[:799]), x[:799].T @ x[:799])


@pytest.mark.parametrize("length", [8, 16, 12, 60])
def test_sampled_tokens_are_of_every_place(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first token of each sequence lies elsewhere than the rest."""
    monkeypatch.setattr(module, "MOST_TOKENS", 500)
    x = activations(4800, 67, s=10, tail=0.1).view(-1, length, 67)
    x[:, 0] = torch.randn(67, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) * 10
    x = x.flatten(0, 1)
    best = torch.linalg.svdvals(x)[:12].square().sum().item()
    assert captured(x, principal_basis(gram_matrix(x), 12)) > 0.98 * best


@pytest.mark.parametrize(("n", "r1", "r2"), [(23, 5, 6), (23, 22, 1), (64, 32, 32), (300, 299, 1), (9, 0, 9)])
def test_random_complement_is_orthonormal_and_orthogonal(n: int, r1: int, r2: int) -> None:
    q1 = torch.linalg.qr(torch.randn(n, r1, generator=torch.Generator().manual_seed(n))).Q
    q2 = random_complement(q1, r2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(q2.T @ q2, torch.eye(r2), atol=1e-5, rtol=0)
    torch.testing.assert_close(q1.T @ q2, torch.zeros(r1, r2), atol=1e-5, rtol=0)
