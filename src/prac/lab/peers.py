"""What runs on a block beside plain training: the peers that a user would pick instead, and the presets of prac."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from prac.config import Config
from prac.convert import compress
from prac.handle import Handle
from prac.lab.blocks import Block
from prac.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEERS = ("plain", "checkpoint", "selective", "compile")
COMPILED = "+compile"  # after the name of a preset: in a block that torch.compile compiles
METHODS = (*PEERS, *PRESETS, *(f"{name}{COMPILED}" for name in PRESETS))
DEFAULTS = (*PEERS, *(name for name in ("paper", "lean", "fast", "small") if name in PRESETS))

aten = torch.ops.aten
# What selective checkpointing keeps: matrix products and attention, the expensive ones. The rest is done again.
SAVED = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def variants(methods: Sequence[str], attention_bits: int | None = None) -> dict[str, Config | None]:
    """Every row to measure by name, plain first, with the config of those that are a preset.

    Raises:
        ValueError: for an unknown method, or if ``attention_bits`` is given and none of them can use it.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(
            f"unknown method {unknown[0]!r}; choose from {', '.join((*PEERS, *PRESETS))}, or a preset with {COMPILED}."
        )
    found = {method: PRESETS.get(method.removesuffix(COMPILED)) for method in dict.fromkeys(("plain", *methods))}
    if attention_bits is None:
        return found
    grouped = {name: config for name, config in found.items() if config is not None and config.group is not None}
    if not grouped:
        raise ValueError("attention_bits goes with a preset that keeps norm groups, and none of these methods is one.")
    rows: dict[str, Config | None] = {}
    for name, config in found.items():
        rows[name] = config
        if (
            name in grouped
            and not name.endswith(COMPILED)
            and (more := grouped[name].replace(attention_bits=attention_bits)) != config
        ):
            rows[f"{name}+attention{attention_bits}"] = more
    return rows


def checkpoint_blocks(model: PreTrainedModel, *, selective: bool = False, reentrant: bool = False) -> None:
    """Turn on gradient checkpointing in a model of transformers, of whole blocks or of all but :data:`SAVED`."""
    how: dict[str, Any] = {"use_reentrant": reentrant}
    if selective:
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(SAVED))
    # The second name is that before transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)


def apply(block: Block, method: str, config: Config | None, x: Tensor) -> Handle | None:
    """Put a method to work on ``block``, in place; returns the handle where it is one of prac's.

    Args:
        block: a fresh one.
        method: a name that :func:`variants` gave.
        config: the config that came with it.
        x: the block's input, as an example.
    """
    if config is not None:
        handle = compress(block, config, example=x)
        if method.endswith(COMPILED):
            block.around = torch.compile(block.run, dynamic=False)
        return handle
    if method == "checkpoint":
        block.around = functools.partial(checkpoint, block.run, use_reentrant=False)
    elif method == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, list(SAVED))
        block.around = functools.partial(checkpoint, block.run, use_reentrant=False, context_fn=contexts)
    elif method == "compile":
        # fullgraph: fail rather than quietly run parts of it in eager.
        block.around = torch.compile(block.run, fullgraph=True, dynamic=False)
    return None
