"""What one training step shows: the tensors that are kept, and the gradients that are computed from them."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, IDS, PAPER, build
from torch import Tensor, nn

import prac
from prac.allocation.calibration import GROUP, watched_step
from prac.config import Config
from prac.layers import Compressed

LEAN = prac.PRESETS["lean"].replace(min_width=8)
CONFIGS = {"lean": LEAN, "attention in 8 bits": LEAN.replace(attention_bits=8), "paper": PAPER}


def exact(model: nn.Module, batch: dict[str, Tensor], readers: dict[str, list[str]]) -> dict[str, float]:
    """Σ ‖dW‖² of the layers that read each tensor, by plain autograd."""
    output = model(**batch)
    value = output.loss if hasattr(output, "loss") else output.square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True), strict=True))
    return {
        name: sum(grads[f"{layer}.weight"].square().sum().item() for layer in layers)
        for name, layers in readers.items()
    }


@pytest.mark.filterwarnings("ignore:attention_bits")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "phi3", "t5", "plain", "encoder"])
def test_what_is_measured_are_the_gradients_of_the_model(family: str, config: Config) -> None:
    model = build(family)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)  # its part of the gradient is exact, and not what is counted
    batch = FAMILIES[family][1]
    batch = (
        batch | {"labels": torch.zeros(4, dtype=torch.long) if family == "bert" else IDS}
        if "input_ids" in batch
        else batch
    )
    loss = None if "labels" in batch else lambda y: y.square().mean()
    group = None if config.group is None else GROUP
    handle = prac.compress(model, config.replace(group=group), example=batch)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Compressed)}
    readers: dict[str, list[str]] = {}
    for name, layer in layers.items():
        for estimator in handle.read_by(name) if layer.kind == "linear" else []:
            readers.setdefault(estimator.name, []).append(name)
    found = watched_step(handle, batch, objective=loss)
    handle.restore()
    assert found
    energies = exact(model, batch, {tensor.name: readers[tensor.name] for tensor in found})
    for tensor in found:
        assert tensor.energy == pytest.approx(energies[tensor.name], rel=2e-3)
        gram_NN = tensor.x_MN.mT @ tensor.x_MN
        assert gram_NN.shape == tensor.second_NN.shape
        torch.testing.assert_close(sum(half.gram_NN for half in tensor.halves), gram_NN, rtol=1e-3, atol=1e-3)
        assert tensor.weight_M.shape == tensor.x_MN.shape[:1]


class Twice(nn.Module):
    """One layer that runs twice: its gradients add up before they are squared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(13, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_that_runs_twice(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, x_MN = Twice().double(), torch.randn(40, 13, dtype=torch.float64)
    if checkpointed:
        inner = model.a
        model.a = nn.Sequential(inner)
        model.a.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    handle = prac.compress(model, Config(min_width=1), include="*", example=x_MN)
    found = {
        tensor.name.removesuffix(".0"): tensor
        for tensor in watched_step(handle, x_MN, objective=lambda y: y.square().mean())
    }
    handle.restore()
    model(x_MN).square().mean().backward()
    for name, layer in (("a", model.a[0] if checkpointed else model.a), ("b", model.b)):
        assert found[name].energy == pytest.approx(layer.weight.grad.square().sum().item(), rel=1e-9)
        assert len(found[name].x_MN) == (80 if name == "a" else 40)
