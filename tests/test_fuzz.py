"""Any shape, stride, dtype and config: the output stays what it is, gradients come out whole.

200 examples with every change; ``make test-long`` runs 2,000 (``PRAC_FUZZ`` sets another number).
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prac


class Gated(nn.Module):
    def __init__(self, n: int, m: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(n, m, bias), nn.Linear(n, m, bias), nn.Linear(m, n, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Norm, two readers, and an MLP behind a norm: what prac groups."""

    def __init__(self, n: int, m: int, bias: bool, norm: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(n), norm(n)
        self.a, self.b = nn.Linear(n, n, bias), nn.Linear(n, n, bias)
        self.mlp = Gated(n, m, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + torch.tanh(self.a(h)) * self.b(h)
        return x + self.mlp(self.norm2(x))


MODULES = {
    "linear": lambda n, m, bias: nn.Linear(n, m, bias),
    "linear, GELU, linear": lambda n, m, bias: nn.Sequential(nn.Linear(n, m, bias), nn.GELU(), nn.Linear(m, n, bias)),
    "gated MLP": Gated,
    "LayerNorm block": lambda n, m, bias: Block(n, m, bias, nn.LayerNorm),
    "RMSNorm block": lambda n, m, bias: Block(n, m, bias, nn.RMSNorm),
}
BITS = st.sampled_from([2, 4, 6, 8, 16, 32]).flatmap(
    lambda bits: st.builds(
        prac.Bits, st.just(bits), st.sampled_from([16, 32, 64, 128]), st.booleans() if bits <= 8 else st.just(False)
    )
)
SHARES = st.sampled_from([(0.1, 0.1), (0.3, 0.3), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.1, 0.8)])
RANKS = st.builds(lambda shares, bits: prac.Rank(*shares, bits=bits), SHARES, st.none() | BITS)
CONFIGS = st.builds(
    prac.Config, linear=RANKS | BITS | st.none(), norm=RANKS | BITS | st.none(), activation=BITS | RANKS | st.none(),
    group=st.none() | BITS | RANKS, T1=st.integers(1, 3), T2=st.integers(1, 3), seed=st.integers(0, 9),
    min_width=st.just(1),
)  # fmt: skip
LAYOUTS = ("contiguous", "transposed", "expanded", "every other", "from the middle")


def laid_out(shape: tuple[int, ...], n: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Random numbers of (*shape, n) in some layout."""
    generator = torch.Generator().manual_seed(sum(shape) + n)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if layout == "transposed":
        return numbers(n, *shape).movedim(0, -1)
    if layout == "expanded":
        return numbers(1, *shape[1:], n).expand(*shape, n)
    if layout == "every other":
        return numbers(*shape, 2 * n)[..., ::2]
    if layout == "from the middle":
        return numbers(*shape, n + 3)[..., 2:-1]
    return numbers(*shape, n)


def check(
    kind: str, n: int, m: int, bias: bool, shape: tuple[int, ...], layout: str, dtype: torch.dtype, config: prac.Config
) -> None:
    torch.manual_seed(0)
    plain = MODULES[kind](n, m, bias).to(dtype).train()
    model = copy.deepcopy(plain)
    x = laid_out(shape, n, layout, dtype)
    assert x.shape == (*shape, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            handle = prac.compress(model, config, include="*", example=x)
            ours = x.detach().requires_grad_()
            y = model(ours)
        except ValueError as error:
            known = ("nothing to compress", "tokens cannot span", "exceeds the width", "0 directions")
            assert any(words in str(error) for words in known), error
            return
    theirs = x.detach().requires_grad_()
    expected = plain(theirs)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    # To the bit, or where an operation of prac computes the norm, to rounding.
    exact = config.group is None
    torch.testing.assert_close(y, expected, **({"rtol": 0, "atol": 0} if exact else rounding(dtype)))
    dy = torch.ones_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert ours.grad is not None
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.shape == p.shape
        assert p.grad.dtype == p.dtype
        assert p.grad.isfinite().all(), name
    if kind == "linear":  # the input's gradient and the bias' never pass through what is kept
        torch.testing.assert_close(ours.grad, theirs.grad, **rounding(dtype))
        if bias:
            torch.testing.assert_close(model.bias.grad, plain.bias.grad, **rounding(dtype))
    assert ours.grad.isfinite().all()
    handle.restore()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


def rounding(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}


ARGUMENTS = {
    "kind": st.sampled_from(list(MODULES)),
    "n": st.integers(1, 70),
    "m": st.integers(1, 90),
    "bias": st.booleans(),
    "shape": st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    "layout": st.sampled_from(LAYOUTS),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    "config": CONFIGS,
}
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=200, **COMMON)
@given(**ARGUMENTS)
def test_anything(**how: Any) -> None:
    check(**how)


@pytest.mark.long
@settings(max_examples=int(os.environ.get("PRAC_FUZZ", "2000")), **(COMMON | {"derandomize": False}), print_blob=True)
@given(**ARGUMENTS)
def test_anything_at_length(**how: Any) -> None:
    check(**how)
