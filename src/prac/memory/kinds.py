"""What the activations of a module are counted under."""

from __future__ import annotations

from torch import Tensor, nn

# Of activations, in the order in which tables and plots show them.
KEPT_KINDS = ("norm", "attention", "linear", "activation", "embedding", "logits", "checkpoint", "other")
# Of everything else.
OTHER_KINDS = ("parameters", "optimizer", "gradients", "subspaces", "batch", "step", "temporary")


def kinds(model: nn.Module) -> dict[str, str]:
    """One of :data:`KEPT_KINDS` for the name of each module.

    By what a module is, so that a sum over a kind says what would be saved by treating that kind differently. Norm
    groups of prac count under the norm that they begin with, MLPs under ``activation``, the output head and whatever
    the model itself does after it (the loss) under ``logits``.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    modules = model.named_modules()
    return {name: "logits" if not name or module is head else _kind(name, module) for name, module in modules}


def _kind(name: str, module: nn.Module) -> str:
    of_class = type(module).__name__.lower()
    if getattr(module, "gradient_checkpointing", False):
        return "checkpoint"  # a block of transformers, which then keeps its inputs and nothing else by itself
    if "embedding" in of_class or "rotary" in of_class:
        return "embedding"
    if "norm" in of_class:
        return "norm"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return {1: "norm", 2: "linear"}.get(weight.dim(), "other")
    if "attn" in name or "attention" in name.lower():
        return "attention"
    if not any(part.isdigit() for part in name.split(".")) or name.split(".")[-1].isdigit():
        return "other"
    return "activation"
