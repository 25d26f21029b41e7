"""What autograd promises of any layer, whatever keeps its input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import agree, gradients, relative
from liveness import live_bytes
from models import BATCH, FeedForward, N, build
from torch import Tensor, nn

import prac
from prac.runtime.fake import is_fake

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
# Ranks that lose nothing, so that the exact scalar is used.
RANK = EXACT.replace(group=prac.Rank(0.0, 1.0), linear=FULL)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """A norm with two readers, of which a call may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.out = nn.LayerNorm(N), *(nn.Linear(N, N) for _ in range(3))

    def forward(self, x: Tensor, use: str = "ab", seen: list[Tensor] | None = None) -> Tensor:
        h = self.norm(x)
        if seen is not None:
            h.retain_grad()
            seen.append(h)
        return self.out(sum(torch.tanh(getattr(self, name)(h)) for name in use))


@pytest.mark.parametrize("config", [EXACT, RANK])
@pytest.mark.parametrize("use", ["ab", "a", "b"])
def test_none_where_plain_gives_none_and_gradients_at_the_norm(config: prac.Config, use: str) -> None:
    torch.manual_seed(0)
    plain = Two().train()
    model = copy.deepcopy(plain)
    prac.compress(model, config, example=X)
    outputs: list[list[Tensor]] = [[], []]
    for m, seen in zip((model, plain), outputs, strict=True):
        m(X.clone().requires_grad_(), use, seen).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or relative(p.grad, q.grad) < 1e-4, name
    assert relative(outputs[0][0].grad, outputs[1][0].grad) < 1e-5


@pytest.mark.parametrize("config", [EXACT, RANK])
@pytest.mark.parametrize("stranger", ["none", "reads", "hook"])
def test_the_exact_scalar_knows_what_it_does_not_cover(config: prac.Config, stranger: str) -> None:
    """Where somebody else reads a norm's output, or changes its gradient, the norm's own gradient is still right."""
    torch.manual_seed(0)
    plain = Two().train()
    model = copy.deepcopy(plain)
    prac.compress(model, config, example=X)

    def step(m: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        h = m.norm(x)
        if stranger == "hook":
            h.register_hook(lambda g: 2 * g + 0.3)
        y = m.a(h).tanh() + m.b(h)
        y = y + h.sin() if stranger == "reads" else y
        y.square().sum().backward()
        return x.grad

    # Readers keep their outputs in 4 bits for the exact scalar: 0.13 / √n of it.
    assert relative(step(model), step(plain)) < (0.05 if config is RANK and stranger == "none" else 1e-4)


@pytest.mark.parametrize("preset", ["lean", "small", "fast", "paper"])
def test_changes_in_place(preset: str) -> None:
    """Of an output as in plain PyTorch; of a norm's input between it and its readers, with the right gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.mid, self.out = nn.LayerNorm(N), *(nn.Linear(N, N) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            h[:, 0] = 0
            y = F.relu(self.fc(h), inplace=True)
            z = self.mid(y)
            z[:, 1] += 1.0
            return self.out(z)

    model = Net().train()
    plain = copy.deepcopy(model)
    prac.compress(model, prac.PRESETS[preset].replace(min_width=8), include="*", example=X)
    torch.testing.assert_close(model(X), plain(X))
    assert gradients(model, X).keys() == gradients(plain, X).keys()

    def modified(m: nn.Module, copied: bool) -> Tensor:
        leaf = X.clone().requires_grad_()
        x = leaf * 1
        h = m.norm(x)
        x = 2 * x if copied else x.mul_(2)
        (m.fc(h) * x).sum().backward()
        return leaf.grad

    if preset in ("lean", "fast"):
        exact = copy.deepcopy(plain)
        prac.compress(exact, EXACT, include="*", example=X)
        assert relative(modified(exact, False), modified(plain, True)) < 1e-4


@pytest.mark.parametrize("preset", ["lean", "fast", "paper"])
def test_ways_to_call_a_layer(preset: str) -> None:
    model = build("llama")
    prac.compress(model, prac.PRESETS[preset].replace(min_width=8))
    layer = model.model.layers[0]
    assert torch.equal(layer.input_layernorm(hidden_states=X), layer.input_layernorm(X))
    assert torch.equal(layer.self_attn.o_proj(input=X), layer.self_attn.o_proj(X))
    assert layer.mlp(x=X).shape == X.shape
    empty = X[:, :0].requires_grad_()
    layer.mlp(layer.post_attention_layernorm(empty)).sum().backward()
    assert empty.grad.shape == empty.shape
    with pytest.raises(TypeError, match=r"positional argument"):
        layer.self_attn.o_proj(X, X)


def test_tensors_that_are_not_rows_of_features_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)).train()
    prac.compress(model, "lean", include="*", example=X)
    jagged = torch.nested.nested_tensor([X[0, :3], X[1, :5]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"0: its input is a nested tensor.*exclude='0'"):
        model(jagged)


def replica(network: nn.Module) -> nn.Module:
    """What ``nn.parallel.replicate`` makes for each device, on the CPU."""
    modules = list(network.modules())
    number = {m: i for i, m in enumerate(modules)}
    copies = [m._replicate_for_data_parallel() for m in modules]
    for module, twin in zip(modules, copies, strict=True):
        twin._former_parameters = {}
        for name, child in module._modules.items():
            setattr(twin, name, None if child is None else copies[number[child]])
        for name, p in module._parameters.items():
            if p is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, p.view_as(p))
        twin._buffers = dict(module._buffers)
    return copies[0]


@pytest.mark.parametrize("config", [EXACT, prac.PRESETS["paper"].replace(min_width=8)])
def test_replicas_of_a_model(config: prac.Config) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    prac.compress(model, config)
    torch.testing.assert_close(replica(model)(**BATCH).loss, plain(**BATCH).loss)
    replica(model)(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    if config is EXACT:
        assert all(relative(p.grad, q.grad) < 1e-3 for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_an_output_that_is_saved_undetached_is_a_tensor() -> None:
    model = Two().train()
    prac.compress(model, EXACT, include="*", example=X)
    seen: list[Tensor] = []
    model(X, seen=seen).sum().backward()
    file = io.BytesIO()
    torch.save(seen, file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)
    assert torch.equal(loaded, seen[0])
    model.a(loaded).sum().backward()


class Counted(nn.Module):
    """A parametrisation that counts how often it is evaluated."""

    calls = 0

    def forward(self, w: Tensor) -> Tensor:
        if not is_fake(w):
            Counted.calls += 1
        return 2 * w


@pytest.mark.parametrize("config", [EXACT, RANK])
@pytest.mark.parametrize("trained", [True, False])
def test_parametrised_weights_are_evaluated_as_often_as_in_plain_training(config: prac.Config, trained: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), FeedForward(), nn.LayerNorm(N), Two()).train()
    for module in (model[0], model[1].w1, model[1].w2, model[2], model[3].norm, model[3].a):
        nn.utils.parametrize.register_parametrization(module, "weight", Counted())
        module.requires_grad_(trained)
    spectral = nn.utils.parametrizations.spectral_norm(model[3].b)
    plain = copy.deepcopy(model)
    handle = prac.compress(model, config, include="*", example=X)
    for m in (model, plain):
        Counted.calls = 0
        m(X)
        assert Counted.calls == 6, m is model
    assert handle.summary()
    assert Counted.calls == 6
    for _ in range(2 if config is EXACT else 0):
        agree(model, plain, X)
    for ours, theirs in zip(spectral.buffers(), plain[3].b.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", [EXACT, RANK])
def test_numbers_of_parameters_that_are_exchanged_before_backward(config: prac.Config) -> None:
    """By `.data`, as weight averaging does: the gradients are those of the numbers that forward had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), FeedForward(), nn.LayerNorm(N), Two()).train()
    prac.compress(model, config, include="*", example=X)
    gradients = []
    for exchange in (False, True):
        model.zero_grad()
        loss = model(X).square().sum()
        before = [p.data for p in model.parameters()]
        for p in model.parameters():
            p.data = 1.5 * p.data if exchange else p.data
        loss.backward()
        for p, data in zip(model.parameters(), before, strict=True):
            p.data = data
        gradients.append([p.grad.clone() for p in model.parameters()])
    # What ranks draw differs between the two; numbers exchanged would be off by half.
    assert all(relative(a, b) < (1e-6 if config is EXACT else 0.1) for a, b in zip(*gradients, strict=True))


def test_an_output_that_is_kept_holds_nothing_else_when_backward_has_run() -> None:
    model = nn.Sequential(nn.Linear(N, 2 * N), nn.GELU()).train()
    prac.compress(model, EXACT, include="*", example=X)

    def step() -> Tensor:
        y = model(X)
        y.sum().backward()
        model.zero_grad()
        return y

    step()
    alive, y = live_bytes(step)
    assert alive == y.untyped_storage().nbytes()


def test_a_child_that_an_attribute_hides() -> None:
    """As torch's own decoder has one: its activation is looked up in the instance before it is as a child."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(N, 4, 48, 0.0, activation=nn.GELU(), batch_first=True)
    for given in (True, False):
        model = nn.TransformerDecoder(layer, 2).train()
        plain = copy.deepcopy(model)
        example = {"example": (X, X)} if given else {}
        handle = prac.compress(model, EXACT, include="*", **example)
        agree(model, plain, X, X)
        handle.restore()
