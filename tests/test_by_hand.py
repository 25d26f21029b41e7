"""Kernels written by hand stand in for the plain function that they are registered on, in a stated order, or not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prac.runtime import kernel as module
from prac.runtime.kernel import Kernel, fused

X = torch.arange(15.0).view(3, 5)


@pytest.fixture(autouse=True)
def small_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTHWHILE", 1)
    monkeypatch.setattr(module, "_compiles", True)
    monkeypatch.delenv("PRAC_KERNELS", raising=False)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which versions ran, in order."""
    ran: list[str] = []

    def compiled(function, **how):
        return lambda *args: ran.append("compiled") or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    return ran


def scaled(said: list[str]) -> Kernel:
    """A plain function of two arguments, with a version by hand for numbers above zero."""

    @fused
    def scale(x: Tensor, by: float) -> Tensor:
        return x * by

    @scale.by_hand("cpu", why_not=lambda x, by: "" if by > 0 else f"by = {by} is not above 0")
    def scale_by_hand(x: Tensor, by: float) -> Tensor:
        said.append("by hand")
        return x.mul(by)

    return scale


def test_a_version_by_hand_comes_before_the_compiler_where_it_can(said: list[str]) -> None:
    scale = scaled(said)
    assert torch.equal(scale(X, 2.0), 2 * X) and said == ["by hand"]
    assert torch.equal(scale(X, -2.0), -2 * X) and said == ["by hand", "compiled"]


@pytest.mark.parametrize(("mode", "expected"), [("auto", ["by hand"]), ("compile", ["compiled"]), ("eager", [])])
def test_the_environment_chooses(mode: str, expected: list[str], said: list[str], monkeypatch) -> None:
    monkeypatch.setenv("PRAC_KERNELS", mode)
    assert torch.equal(scaled(said)(X, 2.0), 2 * X) and said == expected


def test_a_wrong_word_in_the_environment_is_named(monkeypatch) -> None:
    monkeypatch.setenv("PRAC_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, compile, eager, got 'fast'"):
        scaled([])(X, 2.0)


def test_what_is_small_or_watched_or_of_another_device_is_not_done_by_hand(said: list[str], monkeypatch) -> None:
    scale = scaled(said)
    seen = []
    with module.run_by(lambda function, args: seen.append(function.__name__) or function(*args)):
        assert torch.equal(scale(X, 2.0), 2 * X)
    assert seen == ["scale"] and said == []

    @scale.by_hand("cuda")
    def on_another_device(x: Tensor, by: float) -> Tensor:
        raise AssertionError("called for the CPU")

    scale(X, 2.0)
    assert said == ["by hand"]
    monkeypatch.setattr(module, "WORTHWHILE", 16)
    assert torch.equal(scale(X, 2.0), 2 * X) and said == ["by hand"]


def test_one_that_fails_is_given_up_with_one_warning(said: list[str]) -> None:
    scale = scaled(said)

    @scale.by_hand("cpu")
    def broken(x: Tensor, by: float) -> Tensor:
        raise RuntimeError("too many resources requested\nand more")

    with pytest.warns(UserWarning, match="kernel by hand for scale.*RuntimeError: too many resources requested"):
        assert torch.equal(scale(X, 2.0), 2 * X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scale(X, 2.0), 2 * X)
    assert said == ["by hand", "by hand"]


def test_a_reason_that_fails_is_one_that_fails_and_no_memory_says_nothing_of_a_kernel(said: list[str]) -> None:
    scale = scaled(said)

    @scale.by_hand("cpu", why_not=lambda x, by: str(1 / 0))
    def unasked(x: Tensor, by: float) -> Tensor:
        raise AssertionError

    with pytest.warns(UserWarning, match="kernel by hand for scale.*ZeroDivisionError"):
        assert torch.equal(scale(X, 2.0), 2 * X)
    assert said == ["by hand"]
    full = [True]

    @scale.by_hand("cpu")
    def hungry(x: Tensor, by: float) -> Tensor:
        if full:
            raise torch.OutOfMemoryError("of 80 GiB, none")
        said.append("hungry")
        return x * by

    with pytest.raises(torch.OutOfMemoryError):
        scale(X, 2.0)
    full.clear()
    assert torch.equal(scale(X, 2.0), 2 * X) and said == ["by hand", "hungry"]


BY_TRITON = Path(__file__).with_name("by_triton.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_triton_kernel_registers_itself_and_agrees_with_the_plain_function() -> None:
    """Interpreted, so that it needs no GPU."""
    run = subprocess.run(
        [sys.executable, str(BY_TRITON)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "agrees" in run.stdout
