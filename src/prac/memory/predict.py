"""The memory of a training step, known before it is run and without allocating it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prac.config import Config
from prac.convert.chunked_loss import ChunkedLoss, is_chunked
from prac.convert.compress import compress
from prac.convert.conversion import Filter
from prac.convert.state import subspaces_of
from prac.layers import layers_of
from prac.memory.breakdown import Breakdown
from prac.memory.kinds import KEPT_KINDS
from prac.memory.tracker import Tracker
from prac.runtime.fake import faked
from prac.runtime.running import Example, call, loss_of, tensors_in

OptimizerFactory = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]


def adamw(model: nn.Module) -> list[Optimizer]:
    """AdamW as one kernel, whose step needs no memory beyond its two states; none where nothing is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(trained, fused=True)] if trained else []


def _check(make: Any, autocast: Any) -> None:
    """Raises TypeError if ``make`` is no function of a model, or ``autocast`` no dtype; None may be either."""
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast takes a dtype such as torch.bfloat16, got {autocast!r}.")
    if make is not None and (not callable(make) or isinstance(make, type)):
        what = make.__name__ if isinstance(make, type) else type(make).__name__
        raise TypeError(
            f"optimizer is a function that makes one for a model, such as lambda model: AdamW(model.parameters()); "
            f"got {what}."
        )


def switch_of(model: nn.Module) -> str:
    """The method by which a model of transformers is told to compute its blocks again; "" where it has none."""
    # What version 6 calls it, and what it was called before.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    name = next((n for n in names if hasattr(model, n)), "")
    return name if getattr(model, "supports_gradient_checkpointing", False) else ""


def recomputes(model: nn.Module) -> bool:
    """Whether it does so already."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def enable_checkpointing(model: nn.Module, *how: Any) -> None:
    """Have a model of transformers compute its blocks again in backward; ``how`` is what its switch takes.

    Raises:
        ValueError: if it has none.
    """
    switch = switch_of(model)
    if not switch:
        raise ValueError(f"this {type(model).__name__} has no switch for gradient checkpointing.")
    getattr(model, switch)(*how)


def _without_caches(model: nn.Module) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):  # it turns that off by itself, and says so each time
            config.use_cache = False


def predict(
    model: nn.Module,
    batch: Example,
    config: Config | str | None = None,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    loss: Literal["chunked"] | None = None,
    checkpoint: bool = False,
    offload: bool = False,
    optimizer: OptimizerFactory | None = adamw,
    autocast: torch.dtype | None = None,
    objective: Callable[[Any], Tensor] | None = None,
) -> Breakdown:
    """The peak memory of one training step: forward, backward, optimizer step.

    Runs the step on fake tensors, which have shapes and no numbers. So it allocates nothing, needs no GPU, and
    sees exactly the operations that the model will run. Any size will do, also a model on the meta device.

    What it leaves out: scratch space inside of kernels, memory that an allocator holds and does not use, and what
    CUDA itself takes. What it approximates: attention is taken as torch's flash kernel for CPU, which keeps the same
    as the one for CUDA.

    Args:
        model: any module, on any device, with real weights or on meta. It is not changed.
        batch: its input, as for :func:`prac.compress`; only shapes and dtypes matter, so ``torch.empty`` on the
            meta device will do.
        config: how to compress; None for the model as it is.
        include: compress only these layers, as :func:`prac.compress` takes it.
        exclude: leave these layers alone, likewise.
        loss: ``"chunked"`` to train without logits, as :func:`prac.compress` takes it.
        checkpoint: as if a model of transformers computed its blocks again in backward, by its own switch.
        offload: as if what autograd saves went to another memory until backward asks for it, as with torch's
            ``save_on_cpu``; saved one by one, so a tensor that is saved twice comes back twice.
        optimizer: makes the optimizer, or several, for a model; None to leave it and its state out.
        autocast: run the forward pass under autocast to this dtype.
        objective: the scalar to differentiate, of the model's output; by default its ``loss``, or itself.

    Raises:
        ValueError: if the model is compressed already, its output has no loss, its loss cannot be chunked, it has no
            switch for checkpointing, or what it computes depends on the numbers in the batch.
        TypeError: if ``optimizer`` makes none, or ``autocast`` is no dtype.

    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(config)
    ...     ids = torch.empty(128, 256, dtype=torch.long)
    >>> print(predict(model, {"input_ids": ids, "labels": ids}, "lean"))
    """
    if layers_of(model):
        raise ValueError("predict takes the model before compress, and the config; call handle.restore() first.")
    chunks = is_chunked(loss)
    _check(optimizer, autocast)
    with faked(model, batch) as (model, batch):
        if checkpoint:
            _without_caches(model)
            enable_checkpointing(model)
        if chunks:
            ChunkedLoss(model, strict=True)
        if config is not None:
            compress(model, config, include=include, exclude=exclude, example=batch)
        model.train()
        step = partial(_factored_gradients, model, batch, objective, autocast) if _is_factored(model) else None
        optimizers = [] if optimizer is None else _started(optimizer, model, step)
        tracker = Tracker(model)
        tracker.label(model.buffers(), "parameters")
        tracker.label(model.parameters(), "parameters")
        for each in optimizers:
            tracker.label(tensors_in(list(each.state.values())), "optimizer")
        tracker.label(tensors_in(batch), "batch")
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: tracker.label([p.grad], "gradients"))
            for p in model.parameters()
            if p.requires_grad
        ]
        with tracker:
            with _autocast(autocast), _elsewhere() if offload else nullcontext():
                value = loss_of(call(model, batch), objective)
            tracker.label(subspaces_of(model), "subspaces")
            end_of_forward = tracker.now()
            tracker.name_rest()
            value.backward()
            del value
            tracker.phase = "the optimizer's step"
            for each in optimizers:
                each.step()
        for hook in hooks:
            hook.remove()
    kept = {k: n for k, n in tracker.at(end_of_forward).items() if k in KEPT_KINDS}
    return Breakdown(tracker.highest, tracker.peak_where, tracker.at(tracker.peak_time), kept)


def _started(make: OptimizerFactory, model: nn.Module, gradients: Callable[[], None] | None = None) -> list[Optimizer]:
    """The optimizers after a first step, with all of their state."""
    made = make(model)
    optimizers = [made] if isinstance(made, Optimizer) else list(made) if isinstance(made, Sequence) else [made]
    if wrong := [each for each in optimizers if not isinstance(each, Optimizer)]:
        what = type(wrong[0]).__name__
        raise TypeError(f"optimizer has to make a torch.optim.Optimizer or several, it made a {what}.")
    if gradients is not None:
        gradients()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
        each.zero_grad(set_to_none=True)
    return optimizers


def _is_factored(model: nn.Module) -> bool:
    estimators = (e for layer in layers_of(model).values() for e in layer.estimators.values())
    return any(getattr(e, "factored", False) for e in estimators)


def _factored_gradients(
    model: nn.Module, batch: Example, objective: Callable[[Any], Tensor] | None, autocast: torch.dtype | None
) -> None:
    """Those of a step: an optimizer may make its state as narrow as they are."""
    with _autocast(autocast):
        value = loss_of(call(model, batch), objective)
    value.backward()


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _elsewhere() -> AbstractContextManager[Any]:
    """What is saved takes no memory here until it is asked for."""

    def away(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.size(), tensor.stride(), tensor.dtype

    def back(saved: tuple[Any, ...]) -> Tensor:
        return torch.empty_strided(saved[0], saved[1], dtype=saved[2], device="cpu")

    return torch.autograd.graph.saved_tensors_hooks(away, back)
