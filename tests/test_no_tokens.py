"""Layers that get no tokens, as an expert may: they train as plain ones do, and are none the worse for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prac
from prac.config import Bits, Config, Factors, Rank

WIDTH = 64


class Gated(nn.Module):
    """SwiGLU, as experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.down_proj, self.act_fn = nn.Linear(96, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    first = nn.RMSNorm(WIDTH) if kind.startswith("rms") else nn.LayerNorm(WIDTH)
    if kind.endswith("gated"):
        return nn.Sequential(first, Gated())
    return nn.Sequential(first, nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))


def everywhere(keep: Rank | Bits | Factors) -> Config:
    return Config(linear=keep, norm=keep, activation=keep)


CONFIGS = prac.PRESETS | {
    "2 bits": everywhere(Bits(2)),
    "8 bits": everywhere(Bits(8)),
    "16 bits": everywhere(Bits(16)),
    "32 bits": everywhere(Bits(32)),
    "odd groups": everywhere(Bits(4, group=48)),
    "rotated": everywhere(Bits(4, 32, rotate=True)),
    "companded": everywhere(Bits(4)).replace(activation=Bits(4, compand=True)),
    "factors": everywhere(Factors(0.25, iterations=1)),
    "factors, gaussian": everywhere(Factors(0.25, sketch="gaussian")),
    "in 4 bits": everywhere(Rank(0.2, 0.2, bits=Bits(4))),
    "gaussian": everywhere(Rank(0.2, 0.2, orthonormal=False)),
    "factored": everywhere(Rank(0.2, 0.2)).replace(factored=True),
}

CASES = [(name, "layer mlp") for name in CONFIGS]
CASES += [(name, "rms gated") for name, config in CONFIGS.items() if config.group is None]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.requires_grad_()
    model(x).square().sum().backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:attention_bits")
@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_zeros_as_plain(name: str, kind: str, example: bool) -> None:
    plain = build(kind).train()
    model = copy.deepcopy(plain)
    prac.compress(model, CONFIGS[name], include="*", example=torch.zeros(2, 40, WIDTH) if example else None)
    for shape in ((0, WIDTH), (2, 0, WIDTH)):
        expected, found = gradients(plain, torch.randn(shape)), gradients(model, torch.randn(shape))
        for key, gradient in expected.items():
            assert found[key].shape == gradient.shape, key
            assert not found[key].any(), key


@pytest.mark.parametrize("name", ["paper", "rac", "gaussian"])
def test_an_empty_batch_makes_no_subspace_and_spoils_none(name: str) -> None:
    """A model whose first batch is empty, and one that never saw it, train the same from then on."""
    models = [build("layer mlp").train() for _ in range(2)]
    handles = [prac.compress(m, CONFIGS[name].replace(T1=1, T2=1), include="*") for m in models]
    torch.manual_seed(1)
    batches = [torch.randn(80, WIDTH) for _ in range(3)]
    gradients(models[0], torch.randn(0, WIDTH))
    assert all(s.p_NR is None and s.refreshes == 0 for s in handles[0].subspaces())
    for t, x in enumerate(batches):
        for handle in handles:
            handle._clock.step = t
        found, expected = (gradients(m, x.clone()) for m in models)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        handles[0]._clock.step = t + 1
        gradients(models[0], torch.randn(0, WIDTH))  # where a refresh is due: put off, without a word
    assert {s.refreshes for handle in handles for s in handle.subspaces()} == {3}
