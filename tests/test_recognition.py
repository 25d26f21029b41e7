"""What is recognised as an MLP, a norm or an activation, and what only looks like one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import agree, relative
from models import FeedForward, M, N
from torch import Tensor, nn

import prac
from prac.layers.find_mlp import recognise

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


class Dropped(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Noisy(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class Skipped(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < 0.1 else super().forward(x)


class Cut(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x).clamp(max=7.0)) * self.w3(x).clamp(-7.0, 7.0))


class Detached(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x).detach())


class Scaled(FeedForward):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Buffered(FeedForward):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.alpha


class Counting(FeedForward):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * (1 if self.count < 100 else 2)


@pytest.mark.parametrize("kind", [Dropped, Noisy, Skipped, Cut, Detached, Scaled, Buffered, Counting])
def test_what_only_looks_like_an_mlp_is_none(kind: type[nn.Module]) -> None:
    """In eval mode, on ordinary tokens, or in its values: an MLP. In training, on large ones, in its gradients: not."""
    torch.manual_seed(0)
    assert isinstance(recognise(FeedForward()), prac.layers.Match)
    assert recognise(kind()) is None
    model = nn.Sequential(nn.RMSNorm(N), kind()).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    agree(model, plain, X)


class StoppedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).detach()


class NoisyNorm(StoppedNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x) if self.training else x
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class PassedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (F.gelu(x) - x).detach()


@pytest.mark.parametrize("kind", [StoppedNorm, NoisyNorm, PassedGELU])
def test_what_only_looks_like_a_norm_or_an_activation_is_none(kind: type[nn.Module]) -> None:
    assert not isinstance(prac.layers.recognise(kind()), prac.layers.Match)


def test_of_like_blocks_one_is_tried_and_of_others_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []
    try_it = prac.layers.find_mlp._computed_by
    monkeypatch.setattr(prac.layers.find_mlp, "_computed_by", lambda m, roles: tried.append(m) or try_it(m, roles))
    torch.manual_seed(0)
    model = nn.Sequential(*(FeedForward() for _ in range(6))).train()
    with torch.no_grad():
        model[1].w2.weight.mul_(3)
    model[2].limit = 5
    model[3].register_buffer("scale", torch.ones(()))
    handle = prac.compress(model, "lean", include="*", example=X)
    assert tried == [model[0], model[2]]
    assert [row.name for row in handle.rows() if row.what == "activation"] == ["0", "1", "2", "4", "5"]


class Squared(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(N, M, bias=False), act or nn.Identity(), nn.Linear(M, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.act(self.fc1(x))).square())


class Times(FeedForward):
    factor = 0.85

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize("act", [None, nn.GELU()])
def test_weights_of_zero_are_no_mlp_of_a_known_formula(act: nn.Module | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), Squared(act), nn.RMSNorm(N), Squared(act)).train()
    nn.init.zeros_(model[1].fc2.weight)
    plain = copy.deepcopy(model)
    handle = prac.compress(model, EXACT, include="*", example=X)
    assert "weights of zero" in {row.name: row for row in handle.rows()}["1"].note
    with torch.no_grad():
        for m in (model, plain):
            m[1].fc2.weight.copy_(m[3].fc2.weight)
    agree(model, plain, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_a_factor(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert recognise(Times().to(dtype)) is None
    found = recognise(FeedForward().to(dtype))
    assert isinstance(found, prac.layers.Match) and found.facts == recognise(FeedForward()).facts


class Posted(FeedForward):
    """Its last step is None in one block, and in another a module that it has already."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.post = self.act if post else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.w2(self.act(self.w1(x)) * self.w3(x))
        return y if self.post is None else self.post(y)


class Marked(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.w2.weight, "scale", 1.0)


def test_blocks_that_only_look_alike_are_tried_each() -> None:
    torch.manual_seed(0)
    marked = Marked()
    marked.w2.weight.scale = 3.0
    for first, second in ((Posted(False), Posted(True)), (Marked(), marked)):
        model = nn.Sequential(nn.RMSNorm(N), first, nn.RMSNorm(N), second).train()
        plain = copy.deepcopy(model)
        if hasattr(second.w2.weight, "scale"):
            plain[3].w2.weight.scale = 3.0
        prac.compress(model, EXACT, include="*", example=X)
        agree(model, plain, X)


class TypedRMSNorm(nn.Module):
    """An RMSNorm whose output is of its input's dtype, of its weight's, or of the wider one."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.weight, self.eps, self.rule = nn.Parameter(torch.ones(N)), 1e-6, rule

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if self.rule == "input":
            return (self.weight.float() * y).type_as(x)
        return self.weight * y.to(self.weight.dtype if self.rule == "weight" else x.dtype)


class TypedBlock(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.norm, self.a, self.b = TypedRMSNorm(rule), nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.a(h.to(self.a.weight.dtype)) * self.b(h.to(self.b.weight.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rule", ["input", "weight", "wider"])
def test_a_norm_has_the_dtype_that_it_had(rule: str, autocast: bool) -> None:
    torch.manual_seed(0)
    for x_dtype, weight_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = TypedBlock(rule).train()
        model.norm.to(weight_dtype)
        plain = copy.deepcopy(model)
        x = X.to(x_dtype)
        prac.compress(model, EXACT, include="*", example=x)
        assert isinstance(model.norm, prac.layers.SharedNorm)
        found: list[torch.dtype] = []
        for m in (model, plain):
            m.norm.register_forward_hook(lambda module, args, output, found=found: found.append(output.dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                m(x).float().sum().backward()
        assert found[0] == found[1]
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert relative(p.grad.float(), q.grad.float()) < 0.03
