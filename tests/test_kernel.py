"""Compiled kernels give what the plain functions give, and their absence costs nothing but time."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from helpers import relative
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from prac.config import Bits
from prac.estimators.codes import Codes, Coding, dither
from prac.memory.allocator import allocated
from prac.ops import kernels
from prac.runtime import kernel as module
from prac.runtime.kernel import fused


@pytest.fixture(autouse=True)
def small_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTHWHILE", 1)
    monkeypatch.setattr(module, "_compiles", True)
    monkeypatch.delenv("PRAC_KERNELS", raising=False)


def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of functions as they are compiled."""
    calls: list[str] = []
    real = torch.compile

    def spy(function, **kwargs):
        calls.append(function.__name__)
        return real(function, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    return calls


@pytest.mark.skipif(not torch._inductor.config.cpp.cxx[1], reason="no C++ compiler")
@pytest.mark.parametrize(
    ("nonlinear", "n"),
    [(Bits(4), 192), (Bits(4), 57), (Bits(6), 96), (Bits(6, 32, True), 90),
     (Bits(8), 90), (Bits(2, group=16), 90), (Bits(4, 16, True), 80),
     (Bits(4, compand=True), 100), (Bits(8, compand=True), 59)],
)  # fmt: skip
def test_kernels_agree_with_plain_pytorch(nonlinear: Bits, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of an MLP's tensors, at odd widths too, to float32 rounding: the codes are the same."""
    calls = compiled_calls(monkeypatch)
    m = 37
    generator = torch.Generator().manual_seed(0)
    x, g, u, dh = torch.randn(4, m, n, generator=generator)
    weight, bias = torch.randn(2, n, generator=generator)
    bits = dataclasses.replace(nonlinear, compand=False)
    noise = dither(m, n, bits, x.device, generator)

    def everything() -> list[torch.Tensor]:
        y, rho, stored = kernels.normalise(x, weight, bias, 1e-5, True, x.dtype, Coding(bits, noise))
        xhat = Codes(stored, bits, n)
        read = kernels.read_normalised(xhat, weight, bias, x.dtype)
        dx = kernels.norm_input_grad(g, rho, xhat, weight, None, True, x.dtype)
        dw = kernels.norm_weight_grad(g, xhat)
        h, kept_g, kept_u = kernels.gated(g, u, "silu", Coding(nonlinear), Coding(nonlinear))
        back = kernels.gated_backward(dh, Codes(kept_g, nonlinear, n), Codes(kept_u, nonlinear, n), "gelu_tanh", True)
        return [y, rho, read, dx, dw, h, *back, kernels.inner(g, u, bias)]

    fast = everything()
    assert set(calls) >= {"normalise", "read_normalised", "norm_input_grad", "gated", "gated_backward"}
    monkeypatch.setenv("PRAC_KERNELS", "eager")
    count = len(calls)
    plain = everything()
    assert len(calls) == count
    for ours, theirs in zip(fast, plain, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.skipif(not torch._inductor.config.cpp.cxx[1], reason="no C++ compiler")
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_nothing_is_written_but_what_comes_out(bits: int) -> None:
    """One pass over memory: no code lies there in float32 before it is packed."""
    m, n = 2048, 160  # whose groups lie across the two halves of a row
    few, companded = Bits(bits, group=32), Bits(bits, group=32, compand=True)
    generator = torch.Generator().manual_seed(0)
    g, u = torch.randn(2, m, n, generator=generator)
    noise = dither(m, n, few, g.device, generator)
    for kernel in (
        lambda: kernels.gated(g, u, "silu", Coding(few), Coding(few)),
        lambda: kernels.activated(g, "gelu_tanh", Coding(few)),
        lambda: kernels.gated(g, u, "silu", Coding(companded), Coding(companded)),
        lambda: kernels.activated(g, "gelu_tanh", Coding(companded)),
        lambda: kernels.normalise(g, None, None, 1e-5, False, g.dtype, Coding(few, noise)),
    ):
        size = sum(t.nbytes for t in tree_leaves(kernel()))
        with allocated(g.device) as found:
            kernel()
        # Beside it a few numbers for each group, at most; and of a norm the codes of 6 bits in a byte each.
        assert found.peak <= size + (0.32 if bits == 6 else 0.25) * g.nbytes


@pytest.mark.skipif(not torch._inductor.config.cpp.cxx[1], reason="no C++ compiler")
def test_rotated_codes_have_what_they_are_made_of_written_once() -> None:
    """Of a norm x̂ itself, in float32, which goes with the kernel; of what needs no statistics of the token, nothing."""
    m, n, rotated = 2048, 160, Bits(4, group=32, rotate=True)
    generator = torch.Generator().manual_seed(0)
    g, u = torch.randn(2, m, n, generator=generator)
    noise = dither(m, n, rotated, g.device, generator)
    _, rho, stored = kernels.normalise(g, None, None, 1e-5, False, g.dtype, Coding(rotated, noise))
    xhat = Codes(stored, rotated, n)
    for kernel, more in (
        (lambda: kernels.normalise(g, None, None, 1e-5, False, g.dtype, Coding(rotated, noise)), 1),
        (lambda: kernels.norm_input_grad(g, rho, xhat, None, None, False, g.dtype), 1),
        (lambda: kernels.norm_weight_grad(g, xhat), 1),
        (lambda: kernels.read_normalised(xhat, None, None, g.dtype), 0),
        (lambda: kernels.activated(u, "gelu_tanh", Coding(rotated)), 0),
    ):
        size = sum(t.nbytes for t in tree_leaves(kernel()))
        with allocated(g.device) as found:
            kernel()
        assert found.peak <= size + (more + 0.25) * g.nbytes


@pytest.mark.skipif(not torch._inductor.config.cpp.cxx[1], reason="no C++ compiler")
@pytest.mark.parametrize("bits", [Bits(8), Bits(6), Bits(4, 32, rotate=True), Bits(4, compand=True)], ids=repr)
def test_bad_values_stay_visible(bits: Bits) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[3, 5] = float("nan")
    _, stored = kernels.activated(x, "silu", Coding(bits))
    *_, da, _ = kernels.activated_backward(torch.ones_like(x), Codes(stored, bits, 128), "silu", False)
    assert da[3, 5].isnan() and da[[0, 1, 2, *range(4, 64)]].isfinite().all()


@pytest.mark.skipif(not torch._inductor.config.cpp.cxx[1], reason="no C++ compiler")
def test_one_kernel_whatever_needs_a_gradient() -> None:
    torch._dynamo.reset()
    x, other = torch.randn(2, 37, 57)
    leaf = torch.randn(37, 57, requires_grad=True)
    with torch.no_grad():
        kernels.inner(x, other, None)
        made = counters["frames"]["ok"]
        assert made
        for dz in (leaf, leaf.view(37, 57), other):
            torch.testing.assert_close(kernels.inner(dz, other, None), (dz * other).sum(-1, keepdim=True))
    assert counters["frames"]["ok"] == made


def test_any_number_of_tokens_with_a_bounded_number_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiled_calls(monkeypatch)

    one = 1.0

    @fused
    def double(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by * one

    for tokens in range(2, 15):
        x = torch.randn(tokens, 5)
        assert torch.equal(double(x), 2 * x)
    assert module._compiles
    assert len(calls) == module.EXACT_LENGTHS + 1


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function, **kwargs):
        def fail(*args):
            raise RuntimeError("no C++ compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)

    @fused
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.randn(3, 5)
    with pytest.warns(UserWarning, match=r"without fused kernels.*no C\+\+ compiler here"):
        assert torch.equal(double(x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(double(x), 2 * x)


def test_an_error_of_the_function_itself_is_raised_as_it_is() -> None:
    @fused
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        wrong(torch.randn(3, 5))
    assert module._compiles


def test_small_and_fake_tensors_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls = compiled_calls(monkeypatch)

    @fused
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with FakeTensorMode():
        assert double(torch.randn(300, 500)).shape == (300, 500)
    monkeypatch.setattr(module, "WORTHWHILE", 2**16)
    double(torch.randn(3, 5))
    assert not calls
