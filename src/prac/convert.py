"""``prac.compress``: find what can be compressed, find what shares an input, swap the layers."""

from __future__ import annotations

import fnmatch
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prac.clock import Clock
from prac.config import Config
from prac.estimator import Estimator
from prac.handle import Handle
from prac.layers import Compressed, Match, attention, overrides_forward, recognise, swap
from prac.loss import ChunkedLoss
from prac.plan import Plan
from prac.presets import as_config
from prac.structure import Example, Structure, example_for, probe
from prac.tangible import hollow

Filter = str | Sequence[str] | Callable[[nn.Module, str], bool]


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
    together with the norm before them. Which do is found by running the model once on ``example``;
    Hugging Face models make their own. Without one it is found during the first forward pass,
    save for attention and for norms that could be kept at a rank.

    Embeddings are left alone, and so are, unless ``include`` names them, output heads and
    layers that see one row per sample, such as a pooler.

    Args:
        model: any module.
        config: a :class:`prac.Config` or the name of a preset (:data:`prac.PRESETS`).
        include: compress only these layers: a pattern on module names
            (``"*.mlp.*"``), several, or a predicate ``(module, name) -> bool``.
        exclude: leave these layers alone, likewise.
        example: a small input to watch the model on: a tensor, a sequence of positional
            arguments or a mapping of keyword arguments. Only its shape matters.
        loss: ``"chunked"`` to train a causal language model of transformers without its logits as
            well, exactly (see :class:`prac.ChunkedLoss`).

    Returns:
        A handle with ``summary()``, ``restore()``, ``state_dict()`` and more.

    Raises:
        ValueError: nothing matched, the model is compressed already, the preset is unknown,
            a rank does not fit a layer (the message names it), ``config.layers`` names what keeps nothing, or
            the loss cannot be chunked. The model is then unchanged.

    >>> model = nn.TransformerEncoderLayer(64, 4, 128, activation=nn.GELU())
    >>> handle = compress(model, "paper", example=torch.zeros(2, 8, 64))
    >>> print(handle.summary())
    """
    config = as_config(config)
    if loss not in (None, "chunked"):
        raise ValueError(f'loss must be "chunked" or None, got {loss!r}.')
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise ValueError("this model is compressed already; call handle.restore() on the handle you have first.")
    included, excluded = _predicate(include), _predicate(exclude)
    modules = dict(model.named_modules())
    found = {name: recognise(module) for name, module in modules.items()}
    matches = {name: match for name, match in found.items() if isinstance(match, Match)}

    example = example if example is not None else example_for(model)
    if example is None:
        structure = Structure()
    elif any(p.is_meta for p in model.parameters()):
        with hollow(model, example) as (twin, its_example):
            structure = probe(twin, list(matches), its_example)
    else:
        structure = probe(model, list(matches), example)
    for name, widths in structure.attention.items():
        if name not in found or not isinstance(found[name], Match):
            matches[name] = attention.match(widths)
    heads = structure.heads | _output_embeddings(model, modules)

    def why_not(name: str, match: Match) -> str | None:
        """The reason to leave a layer alone although it could be compressed."""
        module, kind = modules[name], match.layer.kind
        parent = modules.get(name.rpartition(".")[0])
        width = structure.width.get(name) or next(iter(match.inputs.values()))
        if kind == "attention":
            if config.keep(kind) is None:
                return ""  # nothing to say of it: nobody asked
            if overrides_forward(module):
                return "its forward was replaced on the instance; compress first"
        if excluded(module, name):
            return "excluded"
        if include is not None:
            if not included(module, name):
                return "not included"
        elif match.shareable and name in heads:
            return "output head"
        elif name in structure.per_sample:
            return "sees one row per sample, not per token"
        by_kind = config.keep(kind) is None and not (config.group is not None and kind != "activation")
        if by_kind and name not in config.layers:
            return f"the config leaves {kind} layers alone"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention uses its weights without calling it"
        if width is not None and width < config.min_width:
            return f"width {width} is below min_width = {config.min_width}"
        return None

    if config.attention_bits is not None and example is not None and not structure.attention:
        warnings.warn(
            f"attention_bits = {config.attention_bits} has no effect on this {type(model).__name__}: "
            "no module of it calls torch's scaled_dot_product_attention. With transformers, load it with "
            "attn_implementation='sdpa'.",
            stacklevel=2,
        )
    reasons = {name: why_not(name, match) for name, match in matches.items()}
    chosen = {name: match for name, match in matches.items() if reasons[name] is None}
    plan = Plan(config, chosen, structure)
    reasons |= plan.left_to_others
    chosen = {name: match for name, match in chosen.items() if reasons[name] is None}
    if not chosen:
        skipped = sorted({reason for reason in reasons.values() if reason}) or ["no known layer in it"]
        raise ValueError(f"nothing to compress in this {type(model).__name__}: {'; '.join(skipped)}.")

    clock = Clock(model)
    layers = {name: plan.layer(name, clock) for name in chosen}
    plan.check_named()
    # All that may raise comes before the model is changed, and the loss takes itself out again where it does not fit.
    chunked = ChunkedLoss(model) if loss == "chunked" else None
    for name, (match, estimators) in layers.items():
        swap(modules[name], match, estimators)
    for group in plan.groups():
        members = [modules[name] for name in group]
        for member in members:
            member._prac_group = members
    if example is None:
        _share_at_first_call([modules[name] for name, match in chosen.items() if match.shareable])

    notes = {name: why or reasons.get(name) for name, why in found.items() if not isinstance(why, Match)}
    notes |= {name: reason for name, reason in reasons.items() if reason}
    return Handle(
        model, config, clock, {name: match for name, (match, _) in layers.items()}, notes, plan.sources(), chunked
    )


def _predicate(filter: Filter | None) -> Callable[[nn.Module, str], bool]:
    if filter is None:
        return lambda module, name: False
    if callable(filter):
        return filter
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return lambda module, name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _output_embeddings(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    # Where the model changes its logits after the head (soft-capping), the probe cannot see it.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {name for name, module in modules.items() if module is head}


def _share_at_first_call(layers: Sequence[nn.Module]) -> None:
    """Let each layer, when first called, adopt the estimator of the layer that read its input before."""
    seen: dict[int, tuple[weakref.ref[Tensor], Estimator]] = {}

    def adopt(layer: nn.Module, args: tuple[Any, ...]) -> None:
        # Found by itself rather than by a handle: copies of the layer have the hook too.
        layer._forward_pre_hooks = type(layer._forward_pre_hooks)(
            (key, hook) for key, hook in layer._forward_pre_hooks.items() if hook is not adopt
        )
        x = args[0] if args else None
        if not isinstance(layer, Compressed) or not isinstance(x, Tensor):
            return
        reader, estimator = seen.get(id(x), (None, None))
        if reader is not None and estimator is not None and reader() is x:
            layer.estimators["x"] = estimator
        else:
            seen[id(x)] = (weakref.ref(x), layer.estimators["x"])

    adopt = torch.compiler.disable(adopt, reason="prac watches the first forward pass")
    for layer in layers:
        layer.register_forward_pre_hook(adopt)
