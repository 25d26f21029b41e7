"""AdamW in the subspace: against AdamW, CompAct's and RSO's definitions; and where its state makes steps biased."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Steps, activations, assert_mean
from models import FAMILIES, IDS
from torch import Tensor, nn

import prac
from prac.config import Rank
from prac.estimators.subspace import Subspace
from prac.ops import linear
from prac.optim import FactoredGradient, SubspaceAdamW

HOW: dict[str, Any] = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)


def data(step: int) -> tuple[Tensor, Tensor]:
    return activations(23, 11, seed=step, tail=2.0), activations(23, 5, seed=100 + step, tail=2.0)


def random_subspace(interval: int | None, rank: int = 4, seed: int = 0, **kwargs: Any) -> Subspace:
    clock = Steps()
    return Subspace(Rank(0, rank, **kwargs), clock, T1=interval, T2=interval, seed=seed, name="layer", factored=True)


def take_step(
    w: nn.Parameter, subspace: Subspace, optimizer: torch.optim.Optimizer, step: int
) -> tuple[Tensor, Tensor]:
    """One optimizer step on the data of ``step``, which it returns."""
    subspace.clock.step = step
    x, dy = data(step)
    linear(x, w, None, subspace).backward(dy)
    optimizer.step()
    optimizer.zero_grad()
    return x, dy


def test_at_full_rank_in_the_identity_basis_it_is_adamw() -> None:
    """And what comes without factors is stepped by AdamW itself."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 7, dtype=torch.float64, generator=generator)) for _ in range(2)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    first, second = SubspaceAdamW(ours, **HOW), torch.optim.AdamW(theirs, **HOW)
    eye = torch.eye(7, dtype=torch.float64)
    for _ in range(5):
        gradients = [torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2)]
        ours[0].grad, ours[1].grad = FactoredGradient(gradients[0], eye), gradients[1]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g
        first.step()
        second.step()
        assert isinstance(ours[0].grad, FactoredGradient)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_rso(transposed: bool) -> None:
    """min over B of f(W + B Pᵀ) by Adam from B = 0 for K steps; merge; draw P and start anew: the same weights."""
    interval, how = 3, HOW | {"weight_decay": 0.0}
    subspace = random_subspace(interval, orthonormal=False)
    w0 = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = nn.Parameter(w0.mT.clone() if transposed else w0.clone())
    optimizer = SubspaceAdamW([ours], **how, at_refresh="reset")
    reference, b, inner, p = w0.clone(), None, None, None
    for step in range(8):
        x, dy = data(step)
        subspace.clock.step = step
        (linear(x, ours.mT if transposed else ours, None, subspace) * dy).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

        if step % interval == 0:
            if b is not None:
                reference = reference + b.detach() @ p.T
            p = subspace.p_NR.clone()
            b = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
            inner = torch.optim.Adam([b], lr=how["lr"], betas=how["betas"], eps=how["eps"])
        y = x @ reference.T + (x @ p) @ b.T
        (y * dy).sum().backward()
        inner.step()
        inner.zero_grad()
    torch.testing.assert_close(ours.mT if transposed else ours, reference + b.detach() @ p.T, rtol=1e-9, atol=1e-9)


def test_it_is_compact() -> None:
    """Adam on G P, the update brought back by Pᵀ: written out, in one subspace."""
    subspace = random_subspace(None, orthonormal=False)
    w = nn.Parameter(torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    expected = w.detach().clone()
    optimizer = SubspaceAdamW([w], **HOW)
    m = v = torch.zeros(5, 4, dtype=torch.float64)
    (beta1, beta2), lr = HOW["betas"], HOW["lr"]
    for step in range(6):
        x, dy = take_step(w, subspace, optimizer, step)
        g = dy.T @ x @ subspace.p_NR
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        expected = expected * (1 - lr * HOW["weight_decay"])
        expected = expected - lr * (m_hat / (v_hat.sqrt() + HOW["eps"])) @ subspace.p_NR.T
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)


def moments(basis: Tensor, m: Tensor, v: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both, after a step with no gradient in the new basis that leaves them as they are."""
    w = nn.Parameter(torch.zeros(m.shape[0], basis.shape[0], dtype=torch.float64))
    optimizer = SubspaceAdamW([w], lr=0.0, betas=(0.0, 0.0))
    w.grad = FactoredGradient(torch.zeros_like(m), basis)
    optimizer.step()
    state = optimizer.state[w]
    state["exp_avg"], state["exp_avg_sq"] = m.clone(), v.clone()
    optimizer.param_groups[0]["betas"] = (1.0 - 1e-16, 1.0 - 1e-16)
    w.grad = FactoredGradient(torch.zeros(m.shape[0], new.shape[1], dtype=torch.float64), new)
    optimizer.step()
    return state["exp_avg"], state["exp_avg_sq"]


def test_reprojection() -> None:
    """m P⁺P′; v by squares inside of the old span, by the row's mean outside; nothing changes where P does not."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(11, 11, dtype=torch.float64, generator=generator)).Q
    m, v = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    v, old = v.square(), 1.7 * q[:, :4]
    same = moments(old, m, v, old.clone())
    torch.testing.assert_close(same[0], m)
    torch.testing.assert_close(same[1], v)
    # A permuted basis of other lengths: coordinates move along, scaled.
    turned = moments(old, m, v, 2 * old[:, [2, 0, 3, 1]])
    torch.testing.assert_close(turned[0], 2 * m[:, [2, 0, 3, 1]])
    torch.testing.assert_close(turned[1], 4 * v[:, [2, 0, 3, 1]])
    # Nothing in common: no momentum, and of v the mean of the row.
    away = moments(old, m, v, 1.7 * q[:, 4:8])
    assert away[0].abs().max() < 1e-12
    torch.testing.assert_close(away[1], v.mean(1, keepdim=True).expand(5, 4))
    # Halfway.
    half = (q[:, :1] + q[:, 4:5]) / 2**0.5
    between = moments(old, m, v, 1.7 * half)
    torch.testing.assert_close(between[0], m[:, :1] / 2**0.5)
    torch.testing.assert_close(between[1], (v[:, :1] + v.mean(1, keepdim=True)) / 2)


def test_reset_starts_anew() -> None:
    subspace = random_subspace(2)
    w = nn.Parameter(torch.zeros(5, 11, dtype=torch.float64))
    optimizer = SubspaceAdamW([w], **HOW, at_refresh="reset")
    counts = []
    for step in range(5):
        take_step(w, subspace, optimizer, step)
        counts.append(int(optimizer.state[w]["step"]))
    assert counts == [1, 2, 1, 2, 1]


# --- where the state makes a step biased ------------------------------------------------------


def steps_of(way: str, seed: int) -> Tensor:
    """What two steps add to a weight of zeros, to be compared with what full gradients would."""
    interval = 1 if way == "re-projected momentum" else None
    subspace = random_subspace(interval, seed=seed)
    w = nn.Parameter(torch.zeros(5, 11, dtype=torch.float64))
    optimizer: torch.optim.Optimizer
    if way == "gradient descent":
        optimizer = torch.optim.SGD([w], lr=1.0)
    else:
        # A large eps turns Adam's quotient off: a step is then m̂ / eps, momentum alone.
        eps = 1e-12 if way == "Adam's quotient" else 1e6
        optimizer = SubspaceAdamW([w], lr=eps if eps > 1 else 1.0, betas=(0.5, 0.999), eps=eps, weight_decay=0.0)
    for step in range(2):
        take_step(w, subspace, optimizer, step)
    return -w.detach()


@pytest.mark.parametrize(
    ("way", "unbiased"),
    [("gradient descent", True), ("momentum", True), ("re-projected momentum", False), ("Adam's quotient", False)],
)
def test_where_the_state_makes_a_step_biased(way: str, unbiased: bool) -> None:
    """E over the random subspaces of two steps against those of full gradients: 800 draws, 4 standard errors."""
    g = [dy.T @ x for x, dy in (data(0), data(1))]
    m1, m2 = 0.5 * g[0], 0.25 * g[0] + 0.5 * g[1]
    expected = {
        "gradient descent": g[0] + g[1],
        "momentum": m1 / 0.5 + m2 / 0.75,
        "re-projected momentum": m1 / 0.5 + m2 / 0.75,
        "Adam's quotient": g[0].sign()
        + (m2 / 0.75) / (0.001 * (0.999 * g[0] ** 2 + g[1] ** 2) / (1 - 0.999**2)).sqrt(),
    }[way]
    found = torch.stack([steps_of(way, seed) for seed in range(800)])
    if unbiased:
        assert_mean(found, expected)
        return
    with pytest.raises(AssertionError):
        assert_mean(found, expected)
    if way == "re-projected momentum":
        # What is lost is known: of the old momentum's share (a third of the second step), r/n is left.
        assert_mean(found, m1 / 0.5 + (0.25 * 4 / 11 * g[0] + 0.5 * g[1]) / 0.75)


# --- in training ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["compact", "rso"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_and_resuming(preset: str, family: str) -> None:
    """The loss falls; states are o × r; saved and loaded halfway, the weights end the same."""

    def start() -> tuple[nn.Module, prac.Handle, SubspaceAdamW]:
        torch.manual_seed(0)
        model = FAMILIES[family][0]().double().train()
        handle = prac.compress(model, prac.PRESETS[preset].replace(T1=4, T2=4, min_width=8))
        at_refresh: Any = "reset" if preset == "rso" else "reproject"
        return model, handle, SubspaceAdamW(model.parameters(), lr=3e-3, at_refresh=at_refresh)

    def train(model: nn.Module, optimizer: SubspaceAdamW, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, handle, optimizer = start()
    first = train(model, optimizer, 6)
    saved = copy.deepcopy((model.state_dict(), handle.state_dict(), optimizer.state_dict()))
    last = train(model, optimizer, 6)
    assert last[-1] < first[0] - 0.3
    inside = [s for s in optimizer.state.values() if "basis" in s]
    assert inside and all(s["exp_avg"].shape[1] == s["basis"].shape[1] for s in inside)

    again, other_handle, other = start()
    again.load_state_dict(saved[0])
    other_handle.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert train(again, other, 6) == last
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors() -> None:
    with pytest.raises(ValueError, match='at_refresh must be "reproject" or "reset"'):
        SubspaceAdamW([nn.Parameter(torch.zeros(2, 2))], at_refresh="forget")  # type: ignore[arg-type]
