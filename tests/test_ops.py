"""Algorithm 2: every op against float64 autograd, on odd shapes, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_mean, loss, odd_shapes, relative, subspace
from torch import Tensor

from prac import ops
from prac.ops import ACTIVATIONS


@dataclass(frozen=True)
class Op:
    """An op, what torch computes for the same arguments, and the shapes of those."""

    ours: Callable[..., Tensor]  # (tensors, estimators...)
    torchs: Callable[..., Tensor]
    shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]]
    estimators: int = 1


def rms(x: Tensor, w: Tensor | None, offset: float = 0.0) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if w is None else w + offset, 1e-5)


OPS = {
    "linear": Op(lambda x, w, e: ops.linear(x, w, None, e), F.linear, lambda s: [s, (13, s[-1])]),
    "linear+bias": Op(lambda x, w, b, e: ops.linear(x, w, b, e), F.linear, lambda s: [s, (13, s[-1]), (13,)]),
    "rms_norm": Op(lambda x, w, e: ops.rms_norm(x, w, 1e-5, e), rms, lambda s: [s, s[-1:]]),
    "rms_norm, 1 + weight": Op(
        lambda x, w, e: ops.rms_norm(x, w, 1e-5, e, offset=1.0), lambda x, w: rms(x, w, 1.0), lambda s: [s, s[-1:]]
    ),
    "rms_norm, no weight": Op(lambda x, e: ops.rms_norm(x, None, 1e-5, e), lambda x: rms(x, None), lambda s: [s]),
    "layer_norm": Op(
        lambda x, w, b, e: ops.layer_norm(x, w, b, 1e-5, e),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5),
        lambda s: [s, s[-1:], s[-1:]],
    ),
    "layer_norm, no bias": Op(
        lambda x, w, e: ops.layer_norm(x, w, None, 1e-5, e),
        lambda x, w: F.layer_norm(x, x.shape[-1:], w, None, 1e-5),
        lambda s: [s, s[-1:]],
    ),
    "layer_norm, plain": Op(
        lambda x, e: ops.layer_norm(x, None, None, 1e-5, e),
        lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
        lambda s: [s],
    ),
    **{
        name: Op(lambda x, e, f=f: ops.activation(x, f, e), f.forward, lambda s: [s]) for name, f in ACTIVATIONS.items()
    },
    **{
        f"glu, {name}": Op(
            lambda g, u, a, b, f=f: ops.glu(g, u, f, a, b),
            lambda g, u, f=f: f.forward(g) * u,
            lambda s: [s, s],
            estimators=2,
        )
        for name, f in ACTIVATIONS.items()
    },
}
every_op = pytest.mark.parametrize("name", OPS)


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in OPS[name].shapes(shape)
    ]


def run(name: str, tensors: list[Tensor], r1: int, r2: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of our op, with fresh subspaces."""
    op = OPS[name]
    estimators = [subspace(r1, r2, seed=seed, name=f"e{i}") for i in range(op.estimators)]
    y = op.ours(*tensors, *estimators)
    return y, list(torch.autograd.grad(loss(y), tensors))


def reference(name: str, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y = OPS[name].torchs(*doubles)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    return y, list(torch.autograd.grad((y * weights.double()).sum(), doubles))


@every_op
@pytest.mark.parametrize("shape", odd_shapes())
def test_nothing_is_lost_at_full_rank(name: str, shape: tuple[int, ...]) -> None:
    """With r1 = n the gradients are autograd's, to float64 accuracy; also with r1 + r2 = n."""
    tensors = arguments(name, shape)
    y, expected = reference(name, tensors)
    n = shape[-1]
    tokens = tensors[0].numel() // n
    for r1 in {min(n, tokens), n // 3}:
        ours, grads = run(name, tensors, r1, n - r1)
        torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@every_op
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients keep their dtype and are float64's to that dtype's rounding."""
    tensors = arguments(name, (5, 13, 24), dtype)
    y, expected = reference(name, tensors)
    ours, grads = run(name, tensors, 24, 0)
    assert ours.dtype == dtype
    assert relative(ours, y) < TOLERANCE[dtype]
    for tensor, got, want in zip(tensors, grads, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == tensor.shape
        assert relative(got, want) < TOLERANCE[dtype]


@every_op
def test_exact_output_at_any_rank(name: str) -> None:
    """The forward pass is torch's, to the bit: only gradients are estimates."""
    tensors = arguments(name, (3, 11, 23), torch.float32)
    ours, _ = run(name, tensors, 2, 3)
    assert torch.equal(ours, OPS[name].torchs(*tensors))


@pytest.mark.parametrize("name", [*ACTIVATIONS, *(f"glu, {name}" for name in ACTIVATIONS)])
def test_gradients_of_the_reconstruction(name: str) -> None:
    """At a low rank the gradients are the formula's at x̃, with statistics and weights exact.

    The reference is autograd on x̃ for the element-wise ops, where that is the whole of
    Algorithm 2; linear layers and norms have their own references below.
    """
    tensors = arguments(name, (29, 17))
    kept = []
    for i, t in enumerate(tensors):
        s = subspace(4, 5, name=f"e{i}")
        kept.append(s.keep(t.detach()).reconstruct().view(t.shape))
    _, expected = reference(name, kept)
    _, grads = run(name, tensors, 4, 5)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_exact_but_for_its_weight(bias: bool) -> None:
    name = "linear+bias" if bias else "linear"
    tensors = arguments(name, (3, 11, 23))
    _, expected = reference(name, tensors)
    _, (dx, dw, *db) = run(name, tensors, 2, 3)
    torch.testing.assert_close(dx, expected[0], rtol=1e-10, atol=1e-10)
    assert relative(dw, expected[1]) > 0.1
    if bias:
        torch.testing.assert_close(db[0], expected[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("centered", [True, False])
def test_norm_formula_with_exact_statistics(centered: bool) -> None:
    """Dx and dγ from x̂ = (x̃ − μ)ρ with the μ and ρ of the true x; dβ exact."""
    name = "layer_norm" if centered else "rms_norm"
    tensors = arguments(name, (29, 17))
    x, gamma = (t.detach() for t in tensors[:2])
    y, grads = run(name, tensors, 4, 5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    g = weights.double()
    mu = x.mean(-1, keepdim=True) if centered else torch.zeros_like(x[:, :1])
    rho = 1 / ((x - mu).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    s = subspace(4, 5, name="e0")
    hat = (s.keep(x).reconstruct() - mu) * rho
    inner = gamma * g
    dx = rho * (inner - hat * (inner * hat).mean(-1, keepdim=True))
    if centered:
        dx = dx - rho * inner.mean(-1, keepdim=True)
        torch.testing.assert_close(grads[2], g.sum(0))
    torch.testing.assert_close(grads[0], dx)
    torch.testing.assert_close(grads[1], (g * hat).sum(0))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_weight_gradient_of_a_norm_is_unbiased(name: str) -> None:
    tensors = arguments(name, (29, 17))
    _, expected = reference(name, tensors)
    samples = torch.stack([run(name, tensors, 4, 5, seed)[1][1] for seed in range(2000)])
    assert_mean(samples, expected[1])


@every_op
def test_inputs_that_are_not_contiguous(name: str) -> None:
    tensors = arguments(name, (11, 7, 23), torch.float64)
    _, expected = reference(name, tensors)
    twisted = [t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach() for t in tensors]
    assert not twisted[0].is_contiguous()
    _, grads = run(name, [t.requires_grad_() for t in twisted], 23, 0)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_under_autocast(dtype: torch.dtype, bias: bool) -> None:
    """As ``F.linear``: output in the autocast dtype, gradients in the parameters' own."""
    name = "linear+bias" if bias else "linear"
    tensors = arguments(name, (5, 13, 24), torch.float32)
    s = subspace(24, 0)
    with torch.autocast("cpu", dtype=dtype):
        y = OPS[name].ours(*tensors, s)
        plain = OPS[name].torchs(*tensors)
        assert s.keep(tensors[0], dtype).tensors[0].dtype == dtype
    assert y.dtype == plain.dtype == dtype
    assert torch.equal(y, plain)
    # Backward may run inside or outside the region: the same.
    outside = torch.autograd.grad(loss(y), tensors, retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        inside = torch.autograd.grad(loss(y), tensors)
    for a, b, want in zip(outside, inside, torch.autograd.grad(loss(plain), tensors), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert relative(a, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "gelu", "silu", "glu, silu"])
def test_other_ops_under_autocast_match_torch(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = arguments(name, (5, 13, 24), dtype)
        estimators = [subspace(24, 0) for _ in range(OPS[name].estimators)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, plain = OPS[name].ours(*tensors, *estimators), OPS[name].torchs(*tensors)
        assert y.dtype == plain.dtype
        assert torch.equal(y, plain)
        pairs = zip(torch.autograd.grad(loss(y), tensors), torch.autograd.grad(loss(plain), tensors), strict=True)
        for got, want in pairs:
            assert got.dtype == want.dtype
            assert relative(got, want) < 4e-2


def saved_bytes(run: Callable[[], Tensor], *not_counted: Tensor) -> int:
    """Bytes saved for backward, each storage once, those of ``not_counted`` left out."""
    sizes = {}
    skip = {t.untyped_storage().data_ptr() for t in not_counted}
    alive = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skip:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


@every_op
def test_what_is_kept_is_z_and_statistics(name: str) -> None:
    """To the byte: M (r1 + r2) values for each estimator, and one or two numbers per token for norms."""
    tensors = arguments(name, (3, 11, 23), torch.float32)
    op, tokens = OPS[name], 33
    estimators = [subspace(4, 5) for _ in range(op.estimators)]
    statistics = 4 * tokens * {"layer": 2, "rms": 1}.get(name.split("_")[0], 0)
    kept = saved_bytes(lambda: op.ours(*tensors, *estimators), *tensors)
    assert kept == op.estimators * tokens * 9 * 4 + statistics


@every_op
def test_nothing_is_kept_where_nothing_needs_it(name: str) -> None:
    """No gradient wanted: no subspace is even made. Only the weights': the input's is not computed."""
    tensors = [t.detach() for t in arguments(name, (3, 11, 23), torch.float32)]
    op = OPS[name]
    estimators = [subspace(4, 5) for _ in range(op.estimators)]
    with torch.no_grad():
        assert saved_bytes(lambda: op.ours(*tensors, *estimators)) == 0
    if name.startswith("linear"):
        tensors[0].requires_grad_()  # frozen weight: the input need not be kept
        assert saved_bytes(lambda: op.ours(*tensors, *estimators), *tensors) == 0
        assert estimators[0].p_NR is None


def test_shared_input_is_kept_once() -> None:
    x, *weights = arguments("linear", (3, 11, 23), torch.float32)
    s = subspace(4, 5)
    kept = saved_bytes(lambda: sum(ops.linear(x, w, None, s) for w in weights * 3), x, *weights)
    assert kept == 33 * 9 * 4


@every_op
def test_double_backward_is_an_error(name: str) -> None:
    tensors = arguments(name, (29, 17))
    estimators = [subspace(4, 5) for _ in range(OPS[name].estimators)]
    y = OPS[name].ours(*tensors, *estimators)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*handle\.restore"):
        torch.autograd.grad(loss(y), tensors[:1], create_graph=True)
