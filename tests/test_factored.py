"""Gradients in factors: everything that is done to gradients, against full matrices in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Steps, activations, assert_mean, subspace
from models import FAMILIES, IDS
from torch import Tensor, nn

import prac
from prac.config import Factors, Rank
from prac.estimators.subspace import Subspace
from prac.ops import linear
from prac.optim import FactoredGradient


def factored(o: int, n: int, r: int, seed: int = 0, transposed: bool = False) -> FactoredGradient:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, r, generator=generator, dtype=torch.float64) for size in (o, n))
    return FactoredGradient(left, right, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g.mT,
        lambda g: g.detach(),
        lambda g: g.clone(),
        lambda g: g * 3,
        lambda g: torch.tensor(0.5) * g,
        lambda g: g / 7,
        lambda g: -g,
        lambda g: g + g,
        lambda g: torch.add(g, g, alpha=-0.3),
        lambda g: g.norm(),
        lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
        lambda g: torch.linalg.vector_norm(g, 1),
        lambda g: g.float(),
        lambda g: g.sum(0),
        lambda g: torch.stack([g, g]),
        lambda g: g.square().mean(),
        lambda g: torch.zeros_like(g),
    ],
)
def test_operations_are_those_of_the_matrix(operation: Callable[[Any], Any], transposed: bool) -> None:
    g = factored(5, 7, 3, transposed=transposed)
    found, expected = operation(g), operation(g.dense())
    dense = found.dense() if isinstance(found, FactoredGradient) else found
    assert found.dtype == expected.dtype
    torch.testing.assert_close(dense, expected, rtol=1e-5 if found.dtype == torch.float32 else 1e-10, atol=1e-10)


def test_what_stays_in_factors() -> None:
    g, other = factored(5, 7, 2), factored(5, 7, 3, seed=1)
    assert (g + g).rank == 2
    both = g + other
    assert isinstance(both, FactoredGradient) and both.rank == 5
    torch.testing.assert_close(both.dense(), g.dense() + other.dense())
    before = g.dense()
    both.mul_(2).add_(g).div_(4)
    torch.testing.assert_close(both.dense(), (2 * (before + other.dense()) + before) / 4)
    torch.testing.assert_close(g.dense(), before)  # bases and coefficients are shared, and never written to
    cast = g.float() + g.float()
    assert cast.rank == 2  # copies of one basis are known to be the same subspace
    assert not both.zero_().dense().any()


def test_writing_entries_is_refused() -> None:
    with pytest.raises(RuntimeError, match="kept in factors"):
        factored(5, 7, 2).clamp_(0, 1)


def weights(transposed: bool) -> tuple[nn.Parameter, FactoredGradient]:
    w = nn.Parameter(torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
    return w, factored(7, 5, 3, transposed=True) if transposed else factored(5, 7, 3)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_optimizer_steps_as_on_the_matrix(name: str, transposed: bool) -> None:
    (ours, g), (theirs, _) = weights(transposed), weights(transposed)
    first, second = OPTIMIZERS[name]([ours]), OPTIMIZERS[name]([theirs])
    for scale in (1.0, -0.3, 2.0):
        ours.grad, theirs.grad = g * scale, g.dense() * scale
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"fused": True}])
def test_one_layer_is_expanded_at_a_time(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next full matrix is made, that of the layer before is gone: several of a layer, none of two."""
    made: list[tuple[int, weakref.ref[Tensor]]] = []
    seen_together = set()
    expand = FactoredGradient.dense

    def watched(g: FactoredGradient) -> Tensor:
        seen_together.add(frozenset({size for size, ref in made if ref() is not None} | {g.shape[0]}))
        full = expand(g)
        made.append((g.shape[0], weakref.ref(full)))
        return full

    monkeypatch.setattr(FactoredGradient, "dense", watched)
    layers = [nn.Parameter(torch.ones(o, 7, dtype=torch.float64)) for o in range(5, 11)]
    for w in layers:
        w.grad = factored(w.shape[0], 7, 2)
    torch.optim.AdamW(layers, **how).step()
    assert {frozenset({o}) for o in range(5, 11)} == seen_together


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_is_that_of_the_matrix(foreach: bool | None) -> None:
    (ours, g), (theirs, _) = weights(False), weights(False)
    ours.grad, theirs.grad = g.clone(), g.dense()
    others = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for each in others:
        each.grad = torch.full_like(each, 2.0)
    norms = [
        nn.utils.clip_grad_norm_([w, b], 0.7, foreach=foreach) for w, b in zip((ours, theirs), others, strict=True)
    ]
    torch.testing.assert_close(norms[0], norms[1])
    assert isinstance(ours.grad, FactoredGradient)
    torch.testing.assert_close(ours.grad.dense(), theirs.grad)
    torch.testing.assert_close(others[0].grad, others[1].grad)


@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_loss_scaling(value: float) -> None:
    """torch.amp.GradScaler's way: the scale is taken off, and an overflow found."""
    g = factored(5, 7, 3).float()
    before = g.dense() if value == 1.0 else None
    g = g * value
    found_inf = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([g], found_inf, torch.tensor([0.25]))
    assert bool(found_inf) == (value != 1.0)
    if before is not None:
        torch.testing.assert_close(g.dense(), before / 4)


CONFIGS = {
    "RSVD": prac.Config(linear=Factors(5, sketch="gaussian"), norm=None, activation=None, factored=True, min_width=8),
    "RP": prac.Config(linear=Rank(0, 5), norm=None, activation=None, factored=True, min_width=8),
    "PRAC": prac.Config(linear=Rank(3, 4), norm=None, activation=None, factored=True, min_width=8),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_accumulates_clips_and_steps_as_with_full_gradients(name: str, family: str) -> None:
    """Two micro-batches, clipping, three steps of AdamW, in float64: the same weights as without factors."""
    ends = []
    for way in (True, False):
        torch.manual_seed(0)
        model = FAMILIES[family][0]().double().train()
        prac.compress(model, CONFIGS[name].replace(factored=way))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            for half in IDS.chunk(2):
                model(input_ids=half, labels=half).loss.backward()
            kinds = [isinstance(p.grad, FactoredGradient) for p in model.parameters()]
            assert any(kinds) == way
            ranks = {p.grad.rank for p in model.parameters() if isinstance(p.grad, FactoredGradient)}
            # One subspace serves both micro-batches; factors of each forward pass are put side by side.
            assert ranks <= ({10} if name == "RSVD" else {5, 7})
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-7, atol=1e-9, msg=key)


def test_under_autocast_micro_batches_share_their_subspace() -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"][0]().train()
    prac.compress(model, CONFIGS["RP"])
    for half in IDS.chunk(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=half, labels=half).loss
        loss.backward()
    found = [p.grad for p in model.parameters() if isinstance(p.grad, FactoredGradient)]
    assert found and {g.rank for g in found} == {5} and {g.dtype for g in found} == {torch.float32}


@pytest.mark.parametrize(("r1", "r2", "orthonormal"), [(0, 6, True), (4, 5, True), (0, 6, False), (4, 5, False)])
def test_the_factored_gradient_is_unbiased_when_the_activation_is(r1: int, r2: int, orthonormal: bool) -> None:
    """E[(dYᵀZ) Pᵀ] = dYᵀX, which the review of co-compression asked to be proven; 600 draws, 4 standard errors.

    So is the sum over two micro-batches of one subspace, which are added by their coefficients.
    """
    x, dy = activations(31, 13), activations(31, 5, seed=1)
    w = torch.zeros(5, 13, dtype=torch.float64, requires_grad=True)
    found = []
    for seed in range(600):
        s = Subspace(Rank(r1, r2, orthonormal=orthonormal), Steps(), seed=seed, name="layer", factored=True)
        w.grad = None
        for rows in (slice(0, 17), slice(17, 31)):
            s.update(x)  # of all tokens, so that both micro-batches see the same principal directions
            linear(x[rows], w, None, s).backward(dy[rows])
        assert isinstance(w.grad, FactoredGradient) and w.grad.rank == r1 + r2
        found.append(w.grad.dense())
    assert_mean(torch.stack(found), dy.T @ x)


def test_factors_of_a_biased_activation_are_biased() -> None:
    """RSVD keeps what it keeps: the same bias whatever is drawn, as PAC's (and unlike RP's)."""
    x, dy = activations(31, 13, s=2, tail=5.0), activations(31, 5, seed=1, tail=3.0)
    w = torch.zeros(5, 13, dtype=torch.float64, requires_grad=True)
    s = subspace(6, 0, factored=True)
    linear(x, w, None, s).backward(dy)
    q = torch.linalg.svd(x).Vh[:6].T
    torch.testing.assert_close(w.grad.dense(), dy.T @ x @ q @ q.T)
    assert (w.grad.dense() - dy.T @ x).norm() > 0.05 * (dy.T @ x).norm()


def test_memory_of_the_gradients() -> None:
    """(o + n) r numbers in place of o n, P not counted: it is there anyway."""
    torch.manual_seed(0)
    model = FAMILIES["llama"][0]().train()
    prac.compress(model, CONFIGS["RP"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if isinstance(p.grad, FactoredGradient):
            assert p.grad.coefficients_OR.shape == (p.shape[0], 5), name


def test_factored_needs_a_rank_and_no_group() -> None:
    with pytest.raises(ValueError, match="factored gradients come of linear layers"):
        prac.Config(linear=prac.Bits(8), factored=True)
    with pytest.raises(ValueError, match="factored gradients come of linear layers"):
        prac.Config(group=prac.Bits(4), factored=True)


def test_detached_view(tmp_path: Any) -> None:
    g = factored(3, 4, 2)
    assert repr(g) == "FactoredGradient((3, 4), rank 2, torch.float64)"
    copied: Tensor = torch.empty(3, 4, dtype=torch.float64).copy_(g)
    torch.testing.assert_close(copied, g.dense())
    g.copy_(copied * 2)  # as DistributedDataParallel does
    torch.testing.assert_close(g.dense(), copied * 2)
