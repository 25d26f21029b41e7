"""What norms have of their own: the estimate scaled to its exact length, and the dtype of what they keep."""

from __future__ import annotations

import pytest
import torch
from helpers import relative, subspace

from prac import ops


@pytest.mark.parametrize("centered", [True, False])
def test_a_renormalised_norm(centered: bool) -> None:
    """dx is that of x̂ scaled to its exact length, a token at a time; dγ is that of the estimate as it is."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(3, 7, 23, dtype=torch.float64, generator=generator) for _ in range(2))
    x, eps = (x * 1e-2).requires_grad_(), 1e-5  # so small that eps counts
    w = torch.rand(23, dtype=torch.float64, generator=generator).requires_grad_()
    e = subspace(4, 5)
    e.renormalise = True
    y = ops.layer_norm(x, w, None, eps, e) if centered else ops.rms_norm(x, w, eps, e)
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    tilde = e.keep(x.detach()).reconstruct().view_as(x)
    mean = x.detach().mean(-1, keepdim=True) if centered else torch.zeros(3, 7, 1, dtype=torch.float64)
    rho = ((x.detach() - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    estimate, exact = (tilde - mean) * rho, (x.detach() - mean) * rho
    scaled = estimate * exact.norm(dim=-1, keepdim=True) / estimate.norm(dim=-1, keepdim=True)
    g = w.detach() * dy
    expected = g - scaled * (g * scaled).mean(-1, keepdim=True)
    if centered:
        expected = expected - g.mean(-1, keepdim=True)
    torch.testing.assert_close(dx, expected * rho)
    torch.testing.assert_close(dw, (dy * estimate).sum((0, 1)))
    assert relative(scaled, estimate) > 0.1


def test_a_renormalised_norm_of_zeros() -> None:
    """A token of zeros has no direction: its gradient is that of a constant, and no number is lost."""
    x = torch.randn(40, 23, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    x.requires_grad_()
    e = subspace(4, 5)
    e.renormalise = True
    (dx,) = torch.autograd.grad(ops.rms_norm(x, None, 1e-5, e).sum(), x)
    assert torch.isfinite(dx).all()


def test_a_norm_under_autocast_keeps_as_linear_layers_do() -> None:
    """In bfloat16, whose range is that of float32; in float16 an outlier would overflow, so in the dtype of x."""
    x = torch.randn(50, 23, requires_grad=True)
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        e = subspace(4, 5)
        with torch.autocast("cpu", dtype):
            ops.rms_norm(x, None, 1e-5, e)
        assert e.kept_in == kept
    e = subspace(4, 5)
    with torch.autocast("cpu", torch.bfloat16):  # what is left when a large mean is taken off would be its rounding
        ops.layer_norm(x, None, None, 1e-5, e)
    assert e.kept_in == torch.float32
