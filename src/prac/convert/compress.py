"""``prac.compress``: find what can be compressed, find what shares an input, swap the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prac.config import Config
from prac.convert.chunked_loss import ChunkedLoss, has_chunked, is_chunked
from prac.convert.conversion import Conversion, Filter
from prac.convert.example import example_for
from prac.convert.first_batch import FirstBatch, structure_of
from prac.convert.handle import Handle
from prac.layers import layers_of
from prac.presets import as_config
from prac.runtime.running import Example


class Step(TypedDict, total=False):
    """What of a training step decides whether it fits a budget, as :func:`prac.predict` takes it; and ``check``."""

    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]] | None
    autocast: torch.dtype | None
    objective: Callable[[Any], Tensor] | None
    check: bool | None


def compress(
    model: nn.Module,
    config: Config | str | None = None,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    example: Example | None = None,
    loss: Literal["chunked"] | None = None,
    budget: int | float | str | None = None,
    batch: Example | None = None,
    **step: Unpack[Step],
) -> Handle:
    """Make ``model`` keep compressed activations for backward, in place.

    Outputs stay what they were (to the bit, or with ``config.group`` to rounding); gradients
    become estimates. Parameters, hooks, names and ``state_dict`` do not change, so any optimizer,
    trainer and checkpoint works as before. Compress before ``torch.compile``, DDP or FSDP wrap the
    model, and after PEFT.

    Layers that read the same tensor (q, k, v; gate, up) keep it once, and with ``config.group``
    together with the norm before them. Which do is found by running the model once on ``example``,
    without a trace on it; for Hugging Face models prac makes one up. Where neither is to be had, the
    first batch that the model trains on shows it, on a copy without numbers, before anything is kept.

    Embeddings are left alone, and so are, unless ``include`` names them, output heads and
    layers that see one row per sample, such as a pooler.

    Args:
        model: any module.
        config: a :class:`prac.Config` or the name of a preset (:data:`prac.PRESETS`); ``"lean"`` by default, and with a
            budget what fits it.
        include: compress only these layers: a pattern on module names
            (``"*.mlp.*"``), several, or a predicate ``(module, name) -> bool``.
        exclude: leave these layers alone, likewise.
        example: a small input to watch the model on: a tensor, a sequence of positional
            arguments or a mapping of keyword arguments. Only its shape matters, and no memory of its size is
            taken where the model can be run without numbers.
        loss: ``"chunked"`` to train a causal language model of transformers without its logits as
            well, exactly (see :class:`prac.ChunkedLoss`).
        budget: the memory that a training step may take, in bytes or as text (``"22GiB"``), in place of a config: the
            mildest way whose predicted peak fits is taken, and where the model is on CUDA tried once. ``handle.choice``
            and the summary say which it is, what it gives up, and what the next one would take.
        batch: for a budget, the batch of a step, of whatever size is to fit; only its shapes matter for a prediction.
        **step: for a budget, what else :func:`prac.predict` takes of a step: ``optimizer`` (a function of the model),
            ``autocast`` (a dtype), and as ``objective`` the scalar to differentiate, a function of the model's output.
            ``check`` says whether the choice is tried on a real step.

    Returns:
        A handle with ``summary()``, ``restore()``, ``state_dict()`` and more.

    Raises:
        TypeError: ``model`` is no module, ``config`` or ``example`` is of another kind, or what is for a budget alone
            is given without one.
        ValueError: nothing matched, the model is compressed already, the preset is unknown,
            a rank does not fit a layer (the message names it), ``config.layers`` names what keeps nothing,
            the model fails on ``example``, the loss cannot be chunked, or nothing fits the budget: then the message
            says by how much, the largest batch that fits, and what else to try. The model is then unchanged.

    >>> model = nn.TransformerEncoderLayer(64, 4, 128, activation=nn.GELU())
    >>> handle = compress(model, "paper", example=torch.zeros(2, 8, 64))
    >>> print(handle.summary())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prac.compress takes a model (an nn.Module), got {type(model).__name__}.")
    chunks = is_chunked(loss)
    if layers_of(model):
        raise ValueError("this model is compressed already; call handle.restore() on the handle you have first.")
    if unknown := step.keys() - Step.__annotations__.keys():
        raise TypeError(f"prac.compress has no option {' or '.join(sorted(unknown))}.")
    if budget is not None:
        given = {"config": config, "example": example, "loss": loss}
        if unwanted := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"a budget takes the place of {' and '.join(unwanted)}: give one or the other.")
        if batch is None:
            raise ValueError('a budget is for steps on some batch: prac.compress(model, budget="22GiB", batch=batch).')
        if has_chunked(model):
            raise ValueError(
                "this model has the chunked loss already: remove() it first, or restore() the handle it is from."
            )
        from prac.memory.budget import compress_within  # beside the column: it predicts, by compressing copies

        return compress_within(model, batch, budget, include=include, exclude=exclude, **step)
    if batch is not None or step:
        alone = [*(["batch"] if batch is not None else []), *step]
        raise TypeError(f"prac.compress takes {', '.join(alone)} for a budget alone; to show a batch give example=.")
    config = as_config("lean" if config is None else config)
    conversion = Conversion(model, config, include, exclude)
    found = conversion.found(model)
    names = conversion.names(model, found)
    if example is not None:
        structure = structure_of(model, names, example)
    else:
        made_up = example_for(model)
        structure = None if made_up is None else structure_of(model, names, made_up, is_made_up=True)
    # All that may raise comes before the model is changed, and the loss takes itself out again where it does not fit.
    plan = conversion.plan(model, structure, found)
    chunked = ChunkedLoss(model) if chunks else None
    conversion.swap(model, plan)
    if structure is None:
        FirstBatch(conversion).attach(model)
    return Handle(model, conversion, chunked)
