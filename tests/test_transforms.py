"""Where something else is at work that prac's ops do not know, a model trains exactly, or says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from models import FeedForward, N
from test_promises import Two, X
from torch import Tensor, nn

import prac


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("given", [True, False])
def test_transforms_of_torch_func(given: bool) -> None:
    """Gradients of each sample, and forward-mode derivatives: exact, and said."""
    from torch.autograd import forward_ad
    from torch.func import functional_call, grad, jvp, vmap

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), Two(), FeedForward()).train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, "lean", **({"example": X} if given else {}))

    def each(m: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(m, parameters, (x,)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(m.named_parameters()), X)

    def forward_mode(m: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(m(forward_ad.make_dual(X, torch.ones_like(X)))).tangent

    with pytest.warns(UserWarning, match="within a transform of torch.func") as caught:
        got = each(model)
        tangents = jvp(model, (X,), (torch.ones_like(X),))[1], forward_mode(model)
    assert sum("torch.func" in str(w.message) for w in caught) == 1 and "torch.func" in handle.summary()
    for name, expected in each(plain).items():
        torch.testing.assert_close(got[name], expected)
    for tangent in tangents:
        torch.testing.assert_close(tangent, forward_mode(plain))
    model(X).sum().backward()
    assert "torch.func" not in handle.summary()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("given", [True, False])
def test_torchscript(given: bool) -> None:
    """What is traced in training trains as plain does; what would be compiled says what to do."""
    torch.manual_seed(0)
    model = nn.Sequential(Two(), FeedForward()).train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, "lean", **({"example": X} if given else {}))
    with pytest.warns(UserWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(model, X, check_trace=False)
    traced(X).square().sum().backward()
    plain(X).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(TypeError, match=r"0\.norm is compressed by prac.*handle.restore"):
        torch.jit.script(model)
    handle.restore()
    torch.jit.trace(model, X)
