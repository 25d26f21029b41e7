"""A norm and those that read it from what it keeps: exact against float64 autograd, and unbiased where promised."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Steps, assert_mean, odd_shapes, relative
from models import Block, N
from torch import Tensor, nn

import prac
from prac.config import Bits, Rank
from prac.estimators.codes import Codes, load
from prac.estimators.rounded import Stored
from prac.estimators.subspace import Subspace
from prac.ops import ACTIVATIONS, Norm, Normed, linear, norm_mlp, normalise

FULL = Bits(32)
EPS = 1e-5


def tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def plain_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    n = x.shape[-1:]
    if norm.centered:
        return F.layer_norm(x, n, weight, bias, norm.eps)
    return F.rms_norm(x, n, None if weight is None else weight + norm.offset, norm.eps)


def lossless(kind: str, name: str = "") -> Any:
    """An estimator that loses nothing: x̂ in full, or at full rank and so with the exact scalar."""
    if kind == "bits":
        return Stored(FULL, Steps(), unbiased=True, name=name)
    return Subspace(Rank(0.0, 1.0), Steps(), name=name)


def norms(n: int) -> list[tuple[Norm, Tensor | None, Tensor | None]]:
    weight, bias = tensor(n, seed=1), tensor(n, seed=2)
    return [
        (Norm(EPS, 0.0, False), weight, None),
        (Norm(EPS, 1.0, False), weight, None),
        (Norm(EPS, 0.0, False), None, None),
        (Norm(EPS, 0.0, True), weight, bias),
        (Norm(EPS, 0.0, True), weight, None),
        (Norm(EPS, 0.0, True), None, None),
    ]


def read(y: Tensor, normed: Normed, layers: list[Any]) -> list[Tensor]:
    """The outputs of linear layers that have y from what the norm keeps, and bring it the exact scalar."""
    kept = normed.kept(y.dtype)
    own = [Stored(FULL, Steps(), unbiased=True) for _ in layers]
    return [linear(y, *p, kept, scalars_M2=normed.scalars_M2, keep_y=e) for p, e in zip(layers, own, strict=True)]


def compare(got: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-9) -> None:
    """Same value and same gradients of a random projection of it."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=got.dtype)
    ours = torch.autograd.grad((got * dy).sum(), leaves)
    theirs = torch.autograd.grad((expected * dy).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("kind", ["bits", "rank"])
@pytest.mark.parametrize("shape", odd_shapes())
@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("biases", [False, True])
def test_norm_and_linears_against_autograd(kind: str, shape: tuple[int, ...], which: int, biases: bool) -> None:
    """Three layers of different widths and a stranger who reads the norm's output too."""
    n = shape[-1]
    x = tensor(*shape)
    norm, weight, bias = norms(n)[which]
    layers = [(tensor(o, n, seed=o), tensor(o, seed=o + 1) if biases else None) for o in (7, n, 13)]
    y, normed = normalise(x, weight, bias, norm, lossless(kind), torch.float64)
    outputs = read(y, normed, layers)
    got = torch.cat([*outputs, y.sin()], dim=-1)
    y_plain = plain_norm(x, weight, bias, norm)
    expected = torch.cat([*(F.linear(y_plain, *layer) for layer in layers), y_plain.sin()], dim=-1)
    leaves = [t for t in (x, weight, bias, *itertools.chain(*layers)) if t is not None]
    compare(got, expected, leaves)


def hidden(bits: Bits, gated: bool = True) -> list[Stored]:
    """What keeps g and u, or a."""
    return [Stored(bits, Steps(), unbiased=False) for _ in range(1 + gated)]


@pytest.mark.parametrize("kind", ["bits", "rank"])
@pytest.mark.parametrize("function", ACTIVATIONS)
@pytest.mark.parametrize("form", ["gated", "fused", "fused, up first", "no gate"])
@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("biases", [False, True])
def test_mlp_against_autograd(kind: str, function: str, form: str, which: int, biases: bool) -> None:
    n, m, o = 19, 23, 11
    x = tensor(3, 7, n)
    norm, weight, bias = norms(n)[which]
    widths = {"gated": (m, m), "no gate": (m,)}.get(form, (2 * m,))
    into = [(tensor(w, n, seed=i + 3), tensor(w, seed=i + 5) if biases else None) for i, w in enumerate(widths)]
    down = (tensor(o, m, seed=8), tensor(o, seed=9) if biases else None)
    y, normed = normalise(x, weight, bias, norm, lossless(kind), torch.float64)
    keep = hidden(FULL, gated=form != "no gate")
    got = norm_mlp(y, normed, into, down, function, keep, gate_first=form != "fused, up first")
    zs = [F.linear(plain_norm(x, weight, bias, norm), *layer) for layer in into]
    f = ACTIVATIONS[function].forward
    if form == "no gate":
        h = f(zs[0])
    else:
        g, u = zs if form == "gated" else zs[0].chunk(2, -1)[:: 1 if form == "fused" else -1]
        h = f(g) * u
    leaves = [t for t in (x, weight, bias, *itertools.chain(*into), *down) if t is not None]
    compare(got, F.linear(h, *down), leaves)


def test_frozen_parts_get_no_gradient_and_the_rest_the_right_one() -> None:
    x, weight = tensor(5, 19), tensor(19, seed=1)
    layers = [(tensor(7, 19, seed=2).requires_grad_(False), None), (tensor(9, 19, seed=3), None)]
    for frozen in (x, weight):
        frozen.requires_grad_(False)
        y, normed = normalise(x, weight, None, Norm(EPS, 0.0, False), lossless("rank"), torch.float64)
        z = read(y, normed, layers)
        y_plain = plain_norm(x, weight, None, Norm(EPS, 0.0, False))
        expected = torch.cat([F.linear(y_plain, w) for w, _ in layers], -1)
        leaves = [t for t in (x, weight, layers[1][0]) if t.requires_grad]
        compare(torch.cat(z, -1), expected, leaves)


def test_the_exact_scalar_is_what_saves_a_norm_at_low_rank() -> None:
    """Where the gradient has no component along x̂, the exact c is 0 and dL/dx exact; c from x̃ is noise along x̂."""
    n = 64
    x, weight = tensor(300, n), tensor(n, seed=1)
    norm, layer = Norm(EPS, 0.0, False), (tensor(n, n, seed=3), None)
    y, normed = normalise(x, weight, None, norm, Subspace(Rank(0.2, 0.2), Steps()), torch.float64)
    (exact,) = read(y, normed, [layer])
    noisy, truth = F.linear(y, layer[0]), F.linear(plain_norm(x, weight, None, norm), layer[0])
    z = truth.detach()
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    dz -= z * (dz * z).sum(-1, keepdim=True) / z.square().sum(-1, keepdim=True)
    dx = [torch.autograd.grad(z, x, dz, retain_graph=True)[0] for z in (exact, noisy, truth)]
    assert relative(dx[0], dx[2]) < 1e-9
    assert relative(dx[1], dx[2]) > 0.05


def test_a_rounded_xhat_needs_no_exact_scalar() -> None:
    """With c from x̃ in 4 bits, c's error moves dL/dx by less than a tenth of what the rounding itself does."""
    n = 256
    x = tensor(200, n)
    g = tensor(200, n, seed=2).detach() + plain_norm(x, None, None, Norm(EPS, 0.0, False)).detach()
    y, normed = normalise(x, None, None, Norm(EPS, 0.0, False), Stored(Bits(4), Steps(), unbiased=True), torch.float64)
    (got,) = torch.autograd.grad(y, x, g)
    rho_M1 = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + EPS)
    xhat, rounded = x.detach() * rho_M1, normed.xhat.reconstruct()
    with_exact = rho_M1 * (g - rounded * (g * xhat).mean(-1, keepdim=True))
    truth = rho_M1 * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    assert relative(got, with_exact) < 0.1 * relative(with_exact, truth)


def block_gradients(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    block.zero_grad(set_to_none=True)
    x.grad = None
    block(x).backward(dy)
    return {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def test_unbiased_through_a_whole_block_with_the_exact_scalar() -> None:
    """dX and every dW of a transformer block over 600 draws, against float64 autograd: within 4 standard errors.

    x̂ of both groups at rank 0.4n, a fresh Q2 for each draw; the outputs that the scalar needs, and the inputs
    of the two projections, rounded without bias; g and u exact, since a nonlinearity of noise has a bias.
    """
    torch.manual_seed(0)
    block = Block().double().train()
    for p in block.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, dy = tensor(2, 9, N), tensor(2, 9, N, seed=1).detach()
    truth = block_gradients(block, x, dy)
    config = prac.Config(group=Rank(0.2, 0.2), linear=Bits(4), norm=Bits(4), activation=None, T1=1, T2=1, min_width=1)
    handle = prac.compress(block, config, example=x.detach())
    draws: dict[str, list[Tensor]] = {name: [] for name in truth}
    for _ in range(600):
        handle.tick()
        for name, gradient in block_gradients(block, x, dy).items():
            draws[name].append(gradient.clone())
    for name, expected in truth.items():
        samples = torch.stack(draws[name])
        assert relative(samples[0], expected) > 1e-4 or name == "mlp.w2.weight" or "wo" in name, name
        assert_mean(samples, expected)


def test_without_the_exact_scalar_a_low_rank_is_biased() -> None:
    """The check above can fail: the same kind of draws with c from x̃, and a gradient orthogonal to x̂."""
    x = tensor(6, N)
    xhat = plain_norm(x, None, None, Norm(0.0, 0.0, False)).detach()
    g = tensor(6, N, seed=2).detach()
    g -= xhat * (g * xhat).mean(-1, keepdim=True)
    (truth,) = torch.autograd.grad(plain_norm(x, None, None, Norm(0.0, 0.0, False)), x, g)
    samples = []
    for seed in range(600):
        subspace = Subspace(Rank(0.1, 0.1), Steps(), seed=seed)
        y, _ = normalise(x, None, None, Norm(0.0, 0.0, False), subspace, torch.float64)
        samples.append(torch.autograd.grad(y, x, g)[0])
    with pytest.raises(AssertionError):
        assert_mean(torch.stack(samples), truth)


def test_rounded_gate_and_up_are_off_by_no_more_than_said() -> None:
    """8 bits: about half a percent; 4 bits: about a tenth."""
    n, m = 64, 172
    x, into = tensor(100, n), [(tensor(m, n, seed=i) / 8, None) for i in (1, 2)]
    into = [(w.detach().requires_grad_(), b) for w, b in into]
    down = (tensor(n, m, seed=3), None)
    grads = {}
    for bits in (32, 8, 4):
        y, normed = normalise(x, None, None, Norm(EPS, 0.0, False), lossless("bits"), torch.float64)
        out = norm_mlp(y, normed, into, down, "silu", hidden(Bits(bits)))
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads[bits] = torch.autograd.grad(out, [x, into[0][0], into[1][0], down[0]], dy)
    for bits, bound in ((8, 0.01), (4, 0.15)):
        errors = [relative(a, b) for a, b in zip(grads[bits], grads[32], strict=True)]
        assert min(errors) > 1e-4 and max(errors) < bound, errors


def test_what_is_kept_is_what_was_asked() -> None:
    """The stored x̂ is x̂: within its step of the true one."""
    x = tensor(20, 40)
    _, normed = normalise(x, None, None, Norm(EPS, 0.0, True), Stored(Bits(8), Steps(), unbiased=False), torch.float64)
    codes, *rest = normed.xhat.tensors
    xhat = load(Codes((codes, *rest), Bits(8), 40), torch.float64)
    torch.testing.assert_close(xhat, F.layer_norm(x, (40,), eps=EPS).detach(), atol=0.02, rtol=0)


def test_a_decoded_output_is_held_for_as_long_as_somebody_will_ask() -> None:
    """And no longer: not beyond the last who was announced, nor beyond the pass in which one of them stayed away."""
    from prac.ops.shared_norm import Decoded

    made = []

    def make() -> Tensor:
        made.append(tensor(3, 4))
        return made[-1]

    decoded = Decoded()
    for uses in (2, 1):
        decoded.expect(uses)

    class Reader(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, asks):
            ctx.asks = asks
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            for _ in range(ctx.asks):
                decoded.get(torch.float64, make)
            seen.append(decoded._y_MN is not None)
            return dy, None

    for asks, count, held in ((3, 1, [False]), (2, 2, [True]), (3, 3, [False])):
        seen: list[bool] = []
        Reader.apply(tensor(2), asks).sum().backward()
        assert (len(made), seen, decoded._y_MN) == (count, held, None)


def test_compiled_autograd_has_each_reader_decode_for_itself() -> None:
    """Its passes have no end at which to let go of what is shared."""
    from torch._dynamo import compiled_autograd

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(N), nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return (self.a(h) * self.b(h)).square().mean()

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 7, N)
    prac.compress(model, prac.Config(linear=FULL, norm=FULL, group=FULL, min_width=1), example=x)
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
