"""Modules without numbers: how to see what such a module computes, and how to make one.

A tensor is fake, as torch calls it, if it has a shape but no numbers: on the meta device, or made under
``FakeTensorMode``.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prac.runtime.whole_numbers import WholeNumbers, is_whole


def is_fake(tensor: Tensor) -> bool:
    """Whether it has no numbers."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextmanager
def with_numbers(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, or a copy of it on the CPU with random weights if its own are fake.

    Inside the block no fake mode is active, so that what the copy computes are numbers. One layer
    at a time is copied, and only for as long as the block runs.
    """
    with unset_fake_temporarily():
        fakes = [t for t in (*module.parameters(), *module.buffers()) if is_fake(t)]
        if not fakes:
            yield module
            return
        generator = torch.Generator().manual_seed(0)
        memo: dict[int, object] = {}  # deepcopy takes these for the copies of the fake ones
        for tensor in fakes:
            dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
            values = _random(tensor.shape, generator).to(dtype)
            memo[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values.to(tensor.dtype)
        yield copy.deepcopy(module, memo)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in ±½. Of a large one, pieces repeat: nothing is computed with it but whether two formulas agree."""
    count = shape.numel()
    piece = torch.rand(min(count, 65_537), generator=generator, device="cpu", dtype=torch.float32).sub_(0.5)
    return piece.repeat(-(-count // max(1, len(piece))))[:count].view(shape)


class NeedsNumbers(ValueError):
    """What a model computes depends on the numbers in its tensors, and here there are none."""


@contextmanager
def faked(model: nn.Module, *inputs: Any) -> Iterator[tuple[Any, ...]]:
    """Copies of ``model`` and ``inputs`` that hold no numbers, to be run inside the block; little is allocated.

    Whole numbers and truth values are kept (:mod:`prac.runtime.whole_numbers`): models ask for them, as for places
    of images in a text.

    They believe to be on the CPU, where every operation has a fake; the meta device lacks attention. Autograd is on,
    also under ``no_grad`` and in inference mode.

    Raises:
        NeedsNumbers: if the block runs into an operation whose result is a number or whose shape depends on one.
    """

    def fake(tensor: Tensor) -> Tensor:
        if is_whole(tensor) and not is_fake(tensor):
            with unset_fake_temporarily():
                return tensor.detach().to("cpu", copy=True)
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")

    with (
        torch.inference_mode(False),
        # A kernel that asks for the address of a tensor without numbers is refused, not given 0.
        torch._functorch.config.patch(fake_tensor_allow_unsafe_data_ptr_access=False),
        FakeTensorMode(allow_non_fake_inputs=True),
        _GroupedProducts(),
        WholeNumbers(),
        torch.device("cpu"),
        _no_packed_sequences(),
        _no_complaints(),
    ):
        # Also what a forward pass left on its modules: deepcopy refuses tensors that have a graph.
        left = [t for module in model.modules() for t in tree_leaves(list(vars(module).values()))]
        memo: dict[int, Any] = {id(t): fake(t) for t in left if isinstance(t, Tensor)}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(fake(p), requires_grad=p.requires_grad)
        try:
            yield copy.deepcopy(model, memo), *(tree_map_only(Tensor, fake, each) for each in inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            experts = " For its experts, model.set_experts_implementation('grouped_mm') does without."
            raise NeedsNumbers(
                f"what this {type(model).__name__} computes depends on the numbers in its tensors ({error.func}), so a "
                "step cannot be followed without them. Run a real one: prac.measure(model, batch)."
                f"{experts if hasattr(model, 'set_experts_implementation') else ''}"
            ) from error


class _GroupedProducts(TorchDispatchMode):
    """Lets products with a matrix for each group of rows (experts) be followed in every dtype.

    Kernels take float32 too; torch's fake of the operation takes bfloat16 alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return _grouped_mm(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """The result of that operation without its numbers: of groups of rows, of columns, or of whole matrices."""
    groups: tuple[int, ...] = ()
    if a.dim() == b.dim():
        groups = a.shape[:-2] if offs is None else tuple(offs.shape)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


@contextmanager
def _no_complaints() -> Iterator[None]:
    """Leave out of the log what torch finds wrong with a stranger's operation: it is raised too, and caught or told."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Let transformers take a batch for what it is nearly always: sequences that are not packed into rows.

    It looks at the positions to know, cannot with fake ones, and would then build a mask that real training has not.
    """
    masks = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    original = getattr(masks, name, None)
    if original is not None:
        setattr(masks, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(masks, name, original)
