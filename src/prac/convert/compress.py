"""``prac.compress``: find what can be compressed, find what shares an input, swap the layers."""

from __future__ import annotations

from typing import Literal

from torch import nn

from prac.config import Config
from prac.convert.chunked_loss import ChunkedLoss
from prac.convert.conversion import Conversion, Filter
from prac.convert.example import example_for
from prac.convert.first_batch import FirstBatch, structure_of
from prac.convert.handle import Handle
from prac.layers import Compressed
from prac.presets import as_config
from prac.runtime.running import Example


def compress(
    model: nn.Module,
    config: Config | str = "lean",
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    example: Example | None = None,
    loss: Literal["chunked"] | None = None,
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
        config: a :class:`prac.Config` or the name of a preset (:data:`prac.PRESETS`).
        include: compress only these layers: a pattern on module names
            (``"*.mlp.*"``), several, or a predicate ``(module, name) -> bool``.
        exclude: leave these layers alone, likewise.
        example: a small input to watch the model on: a tensor, a sequence of positional
            arguments or a mapping of keyword arguments. Only its shape matters, and no memory of its size is
            taken where the model can be run without numbers.
        loss: ``"chunked"`` to train a causal language model of transformers without its logits as
            well, exactly (see :class:`prac.ChunkedLoss`).

    Returns:
        A handle with ``summary()``, ``restore()``, ``state_dict()`` and more.

    Raises:
        TypeError: ``model`` is no module, or ``config`` or ``example`` is of another kind.
        ValueError: nothing matched, the model is compressed already, the preset is unknown,
            a rank does not fit a layer (the message names it), ``config.layers`` names what keeps nothing,
            the model fails on ``example``, or the loss cannot be chunked. The model is then unchanged.

    >>> model = nn.TransformerEncoderLayer(64, 4, 128, activation=nn.GELU())
    >>> handle = compress(model, "paper", example=torch.zeros(2, 8, 64))
    >>> print(handle.summary())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prac.compress takes a model (an nn.Module), got {type(model).__name__}.")
    config = as_config(config)
    if loss not in (None, "chunked"):
        raise ValueError(f'loss must be "chunked" or None, got {loss!r}.')
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise ValueError("this model is compressed already; call handle.restore() on the handle you have first.")
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
    chunked = ChunkedLoss(model) if loss == "chunked" else None
    conversion.swap(model, plan)
    if structure is None:
        FirstBatch(conversion).attach(model)
    return Handle(model, conversion, chunked)
