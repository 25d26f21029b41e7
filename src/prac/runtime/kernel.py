"""Element-wise work in one pass over memory, through ``torch.compile`` where that pays.

A function decorated with :func:`fused` is plain PyTorch, and tested as such. On tensors large
enough to be worth it, ``torch.compile`` turns it into one kernel: C++ on CPU, Triton on CUDA.
Small tensors run as written, and so does everything where no compiler is found (one warning says
so) or where the environment says ``PRAC_COMPILE=0``.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prac.runtime.warn import warn

# Below this many elements the kernels are not what takes the time.
WORTHWHILE = 2**16
# A kernel made for one number of tokens is up to four times as fast (on CPU) as one for any; but
# batches whose length changes at every step must not compile at every step.
EXACT_LENGTHS = 4
# Inductor writes a value with several readers to memory once it takes more than so many operations. Its own threshold
# is 30 on CUDA, and on CPU before torch 2.13: there, codes that are packed two to a byte would lie in memory in
# float32 first, as large as the tensor that they stand for.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"realize_opcount_threshold": 50}

_broken = False
_runner: Callable[..., Any] | None = None


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function whose first argument is a tensor of (tokens, features).

    There is a kernel for each combination of features, dtypes, devices and other arguments, and for
    each of the first :data:`EXACT_LENGTHS` numbers of tokens; one more takes any number of tokens.
    """
    kernels: dict[Any, Callable[..., Any]] = {}
    lengths: dict[Any, set[int]] = {}

    def by_kernel(args: tuple[Any, ...]) -> Any:
        if not torch.is_grad_enabled():  # as in an op: a kernel would be made anew for inputs that need a gradient
            args = _detached(args)
        key, tokens = tuple(_static(a) for a in args), args[0].shape[0]
        seen = lengths.setdefault(key, set())
        if tokens in seen or len(seen) < EXACT_LENGTHS:
            seen.add(tokens)
            key = (key, tokens)
        else:
            _free_tokens(args, tokens)
        if key in kernels:
            return kernels[key](*args)
        # What the compiler warns of while it works is its own affair, and no error under -W error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch.compile counts its kernels by code object and gives up after a few; a copy has its own count.
            kernels[key] = torch.compile(_copy(function), dynamic=False, options=OPTIONS)
            return kernels[key](*args)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not _worthwhile(args[0]):
            return function(*args)
        if _runner is not None:
            return _runner(function, args)
        # A surrounding compilation takes the function in by itself.
        if type(args[0]) is not Tensor or torch.compiler.is_compiling():
            return function(*args)
        try:
            return by_kernel(args)
        except Exception as error:  # whatever the compiler may raise: the plain function does the same
            result = function(*args)
            _give_up(function.__name__, error)
            return result

    return run


def _copy(function: Any) -> Callable[..., Any]:
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _worthwhile(x: Tensor) -> bool:
    return (
        x.numel() >= WORTHWHILE
        and x.device.type in ("cpu", "cuda")
        and not _broken
        and os.environ.get("PRAC_COMPILE", "1") != "0"
    )


@contextmanager
def run_by(runner: Callable[..., Any]) -> Iterator[None]:
    """Inside the block ``runner(function, args)`` calls what would run as one kernel.

    For those who follow the operations of a step, and would otherwise see those that a kernel is written in.
    """
    global _runner
    _runner, before = runner, _runner
    try:
        yield
    finally:
        _runner = before


def _give_up(name: str, error: Exception) -> None:
    global _broken
    _broken = True
    reason = (str(error).strip() or "no message").splitlines()[0]
    warn(
        f"prac runs without fused kernels, more slowly: torch.compile failed on {name} "
        f"({type(error).__name__}: {reason}). On CPU it needs a C++ compiler. PRAC_COMPILE=0 silences this."
    )


def _static(value: Any) -> Any:
    """What of an argument decides the kernel."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[1:]), value.dtype, value.device, value.is_contiguous())
    if isinstance(value, tuple):
        return tuple(_static(v) for v in value)
    return value


def _detached(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(_detached(v) for v in value)
    return value.detach() if isinstance(value, Tensor) else value


def _free_tokens(args: tuple[Any, ...], tokens: int) -> None:
    for a in args:
        if isinstance(a, tuple):
            _free_tokens(a, tokens)
        elif isinstance(a, Tensor) and a.dim() > 1 and a.shape[0] == tokens:
            torch._dynamo.maybe_mark_dynamic(a, 0)
