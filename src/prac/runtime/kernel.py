"""Element-wise work in one pass over memory: by hand where somebody wrote that, or else through ``torch.compile``.

A function decorated with :func:`fused` is plain PyTorch, tested as such: it is what every other version of it has to
compute. A call takes the first of these that applies:

1. as it is written, where kernels are off or the tensor is too small to be worth one;
2. whoever follows the operations of a step (:func:`run_by`);
3. a version by hand for the device (:meth:`Kernel.by_hand`) that gives no reason why not;
4. ``torch.compile``: C++ on CPU, Triton on CUDA;
5. as it is written.

A version that fails is given up, with one warning, and the next one takes its place. ``PRAC_KERNELS`` is ``auto``,
``compile`` for nothing by hand, or ``eager`` for everything as it is written.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
MODES = ("auto", "compile", "eager")

Function = Callable[..., Any]

_compiles = True
_runner: Function | None = None


class ByHand(NamedTuple):
    """A version of a function for one kind of device."""

    device: str
    why_not: Callable[..., str]
    function: Function


class Kernel:
    """A function whose first argument is, or begins with, a tensor of (tokens, features)."""

    __name__: str
    __wrapped__: Function

    def __init__(self, function: Function) -> None:
        functools.update_wrapper(self, function)
        self._by_hand: list[ByHand] = []
        self._compiled: dict[Any, Function] = {}
        self._lengths: dict[Any, set[int]] = {}

    def by_hand(self, device: str, why_not: Callable[..., str] = lambda *args: "") -> Callable[[Function], Function]:
        """Decorates a version for ``device`` ("cuda"), of the same arguments and results.

        ``why_not`` is given the arguments too, and says why this version cannot take them, or "". Of several versions
        the one that was registered last is asked first.
        """

        def register(function: Function) -> Function:
            self._by_hand.insert(0, ByHand(device, why_not, function))
            return function

        return register

    def __call__(self, *args: Any) -> Any:
        """What the function gives for these."""
        x, mode = _first_tensor(args), _mode()
        if mode == "eager" or x.numel() < WORTHWHILE or x.device.type not in ("cpu", "cuda"):
            return self.__wrapped__(*args)
        if _runner is not None and _compiles:
            return _runner(self.__wrapped__, args)
        # A surrounding compilation takes the function in by itself.
        if type(x) is not Tensor or torch.compiler.is_compiling():
            return self.__wrapped__(*args)
        for version in list(self._by_hand) if mode == "auto" else ():
            if version.device == x.device.type:
                try:
                    if not version.why_not(*args):
                        return version.function(*args)
                except torch.OutOfMemoryError:  # says nothing of the kernel
                    raise
                except Exception as error:  # whatever a kernel may raise: the next version does the same
                    self._by_hand.remove(version)
                    warn(f"prac leaves out a kernel by hand for {self.__name__}, which failed ({_told(error)}).")
        if not _compiles:
            return self.__wrapped__(*args)
        try:
            return self._compile(args)
        except Exception as error:  # whatever the compiler may raise: the plain function does the same
            result = self.__wrapped__(*args)
            _give_up(self.__name__, error)
            return result

    def _compile(self, args: tuple[Any, ...]) -> Any:
        """By the kernel for this combination of features, dtypes, devices and other arguments.

        There is one for each of the first :data:`EXACT_LENGTHS` numbers of tokens; one more takes any number of tokens.
        """
        if not torch.is_grad_enabled():  # as in an op: a kernel would be made anew for inputs that need a gradient
            args = _detached(args)
        key, tokens = tuple(_static(a) for a in args), len(_first_tensor(args))
        seen = self._lengths.setdefault(key, set())
        if tokens in seen or len(seen) < EXACT_LENGTHS:
            seen.add(tokens)
            key = (key, tokens)
        else:
            _free_tokens(args, tokens)
        if key in self._compiled:
            return self._compiled[key](*args)
        # What the compiler warns of while it works is its own affair, and no error under -W error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch.compile counts its kernels by code object and gives up after a few; a copy has its own count.
            self._compiled[key] = torch.compile(_copy(self.__wrapped__), dynamic=False, options=OPTIONS)
            return self._compiled[key](*args)


def fused(function: Function) -> Kernel:
    """Decorates a plain function: see the module."""
    return Kernel(function)


@contextmanager
def run_by(runner: Function) -> Iterator[None]:
    """Inside the block ``runner(function, args)`` calls what would run as one kernel.

    For those who follow the operations of a step, and would otherwise see those that a kernel is written in.
    """
    global _runner
    _runner, before = runner, _runner
    try:
        yield
    finally:
        _runner = before


def as_written(function: Function, args: tuple[Any, ...]) -> Any:
    """For :func:`run_by`: no kernel at all."""
    return function(*args)


def _mode() -> str:
    mode = os.environ.get("PRAC_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"the environment's PRAC_KERNELS must be one of {', '.join(MODES)}, got {mode!r}.")
    return mode


def _copy(function: Any) -> Function:
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _give_up(name: str, error: Exception) -> None:
    global _compiles
    _compiles = False
    warn(
        f"prac runs without fused kernels, more slowly: torch.compile failed on {name} ({_told(error)}). On CPU it "
        "needs a C++ compiler. PRAC_KERNELS=eager silences this."
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    first = args[0]
    return first if isinstance(first, Tensor) else _first_tensor(first)


def _static(value: Any) -> Any:
    """What of an argument decides the kernel."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[1:]), value.dtype, value.device, value.is_contiguous())
    if isinstance(value, tuple):
        return tuple(_static(v) for v in value)
    return value


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        inside = (_detached(v) for v in value)
        return value._make(inside) if hasattr(value, "_make") else tuple(inside)
    return value.detach() if isinstance(value, Tensor) else value


def _free_tokens(args: tuple[Any, ...], tokens: int) -> None:
    for a in args:
        if isinstance(a, tuple):
            _free_tokens(a, tokens)
        elif isinstance(a, Tensor) and a.dim() > 1 and a.shape[0] == tokens:
            torch._dynamo.maybe_mark_dynamic(a, 0)
