"""Modules without numbers: how to see what such a module computes, and how to make one.

A tensor is hollow if it has a shape but no numbers: on the meta device, or made under torch's ``FakeTensorMode``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only


def is_hollow(tensor: Tensor) -> bool:
    """Whether it has no numbers."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextmanager
def tangible(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, or a copy of it on the CPU with random weights if its own are hollow.

    Inside the block no fake mode is active, so that what the copy computes are numbers. One layer
    at a time is copied, and only for as long as the block runs.
    """
    with unset_fake_temporarily():
        hollow = [t for t in (*module.parameters(), *module.buffers()) if is_hollow(t)]
        if not hollow:
            yield module
            return
        generator = torch.Generator().manual_seed(0)
        memo: dict[int, object] = {}  # deepcopy takes these for the copies of the hollow ones
        for tensor in hollow:
            dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
            values = _random(tensor.shape, generator).to(dtype)
            memo[id(tensor)] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values.to(tensor.dtype)
        yield copy.deepcopy(module, memo)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in ±½. Of a large one, pieces repeat: nothing is computed with it but whether two formulas agree."""
    count = shape.numel()
    piece = torch.rand(min(count, 65_537), generator=generator, device="cpu", dtype=torch.float32).sub_(0.5)
    return piece.repeat(-(-count // max(1, len(piece))))[:count].view(shape)


@contextmanager
def hollow(model: nn.Module, *inputs: Any) -> Iterator[tuple[Any, ...]]:
    """Copies of ``model`` and ``inputs`` that hold no numbers, to be run inside the block; nothing is allocated.

    They believe to be on the CPU, where every operation has a fake; the meta device lacks attention.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), _no_packed_sequences():
        memo: dict[int, Any] = {id(buffer): fake(buffer) for buffer in model.buffers()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(fake(p), requires_grad=p.requires_grad)
        yield copy.deepcopy(model, memo), *(tree_map_only(Tensor, fake, each) for each in inputs)


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
