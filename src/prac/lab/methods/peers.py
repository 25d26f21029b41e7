"""What a user would pick instead, put to work: on a whole model of transformers, or on one block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from prac.convert.compress import compress
from prac.convert.handle import Handle
from prac.lab.materials.blocks import Block
from prac.lab.methods.naming import COMPILED, Method, parse
from prac.memory.predict import enable_checkpointing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

DEFAULTS = ("plain", "checkpoint", "selective", "compile", "paper", "lean", "fast", "small")

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
KEEP_SAVED = functools.partial(create_selective_checkpoint_contexts, list(SAVED))  # a checkpoint's ``context_fn``


def variants(names: Sequence[str], attention_bits: int | None = None) -> dict[str, Method]:
    """Every row to measure by name, plain first.

    Args:
        names: of methods.
        attention_bits: add each preset that keeps norm groups once more, with attention's inputs in so many bits.

    Raises:
        ValueError: for an unknown method, or if ``attention_bits`` is given and none of them can use it.
    """
    found: dict[str, Method] = {}
    grouped = 0
    for name in dict.fromkeys(("plain", *names)):
        found[name] = method = parse(name)
        if attention_bits is None or method.config is None or method.config.group is None:
            continue
        grouped += 1
        if not name.endswith(COMPILED) and method.config.attention_bits != attention_bits:
            found[f"{name}+attention{attention_bits}"] = parse(f"{name}+attention{attention_bits}")
    if attention_bits is not None and not grouped:
        raise ValueError("attention_bits goes with a preset that keeps norm groups, and none of these methods is one.")
    return found


def checkpoint_blocks(
    model: PreTrainedModel, *, every: int = 1, selective: bool = False, reentrant: bool = False
) -> None:
    """Turn on gradient checkpointing in a model of transformers, of whole blocks or of all but :data:`SAVED`.

    Args:
        model: changed in place.
        every: checkpoint blocks 0, k, 2k, … and leave the others alone.
        selective: keep matrix products and attention, compute the rest again.
        reentrant: torch's older way.
    """
    how: dict[str, Any] = {"use_reentrant": reentrant}
    if selective:
        how["context_fn"] = KEEP_SAVED
    enable_checkpointing(model, how)
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not hasattr(m, "layers")]
    for index, block in enumerate(blocks):
        if index % every:
            block.gradient_checkpointing = False


def offload(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, with all that autograd saves in it kept in CPU memory until backward asks for it."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*args, **kwargs)

    return run


def limit_compiled_memory(budget: float | None) -> None:
    """Let torch.compile keep this share of the activations that it would, for all that is compiled from now on."""
    functorch.activation_memory_budget = 1.0 if budget is None else budget


def adapt(model: nn.Module, velora: bool = False) -> nn.Module:
    """Freeze ``model`` and give its linear layers LoRA adapters of rank 8; or VeLoRA's, as peft has them."""
    from peft import LoraConfig, VeloraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", velora_config=VeloraConfig() if velora else None
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def recompute(model: PreTrainedModel, method: Method) -> None:
    """Turn on the checkpointing that a method asks for, if any."""
    if method.checkpoint or method.selective:
        checkpoint_blocks(model, every=method.checkpoint or 1, selective=method.selective)


def wrap(model: PreTrainedModel, method: Method) -> None:
    """Put checkpointing and offloading to work on a model that is compressed already, where it is to be."""
    recompute(model, method)
    if method.offload:
        model.forward = offload(model.forward)


def check_device(method: Method, device: torch.device) -> None:
    """Refuse what makes no sense there.

    Raises:
        ValueError: for offloading where there is no GPU to take memory off.
    """
    if method.offload and device.type == "cpu":
        raise ValueError(f"{method.name}: offload moves what a GPU keeps to CPU memory, and this runs on the CPU.")


def apply(block: Block, method: Method, x: Tensor) -> Handle | None:
    """Put a method to work on ``block``, in place; returns the handle where prac compresses.

    Optimizers have no part in a block's step, and one block has no second one to leave out of checkpointing.

    Args:
        block: a fresh one.
        method: what to do.
        x: the block's input, as an example.

    Raises:
        ValueError: for adapters, which go with a whole model.
    """
    if method.lora:
        raise ValueError("adapters go with a whole pretrained model: use prac train.")
    handle = None if method.config is None else compress(block, method.config, example=x)
    run: Callable[[Tensor], Tensor] = block.run
    if method.selective:
        run = functools.partial(checkpoint, block.run, use_reentrant=False, context_fn=KEEP_SAVED)
    elif method.checkpoint:
        run = functools.partial(checkpoint, block.run, use_reentrant=False)
    if method.offload:
        run = offload(run)
    if method.compiled:
        # fullgraph: fail rather than quietly run parts of it in eager; what prac compresses is never in a graph.
        run = torch.compile(run, fullgraph=handle is None, dynamic=False)
    if run != block.run:
        block.around = run
    return handle
