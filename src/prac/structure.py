"""What a model looks like from inside: which layers read the same tensor, which is the head.

Found by running the model and watching, so that no architecture has to be known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass
class Structure:
    """What one forward pass showed, by module name."""

    reads: dict[str, int] = field(default_factory=dict)  # a number for the tensor it read first
    width: dict[str, int] = field(default_factory=dict)  # features of that tensor
    heads: set[str] = field(default_factory=set)  # its output is an output of the model
    per_sample: set[str] = field(default_factory=set)  # it saw one row per sample, not per token


def probe(model: nn.Module, names: Sequence[str], example: Example) -> Structure:
    """Run ``model`` once on ``example`` and watch the modules called ``names``.

    In eval mode and without gradients; modes and random state are put back.
    """
    reads: dict[str, Tensor] = {}
    writes: dict[str, Any] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                reads.setdefault(name, args[0])
                writes.setdefault(name, output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with in_mode(model, training=False), torch.no_grad(), torch.random.fork_rng():
            output = call(model, example)
    finally:
        for hook in hooks:
            hook.remove()

    structure = Structure()
    results = {id(t) for t in _tensors(output)}
    samples = {t.shape[0] for t in _tensors(example) if t.dim() > 0}
    tokens = max((t.numel() // t.shape[-1] for t in reads.values()), default=0)
    for name, x in reads.items():
        # The tensors are alive until here, so equal ids mean the same tensor.
        structure.reads[name] = id(x)
        structure.width[name] = x.shape[-1]
        if id(writes[name]) in results:
            structure.heads.add(name)
        if x.numel() // x.shape[-1] in samples and tokens not in samples:
            structure.per_sample.add(name)
    return structure


def example_for(model: nn.Module) -> Example | None:
    """A small input, for models that follow Hugging Face's conventions; None for others."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    parameter = next(model.parameters(), None)
    if config is None or parameter is None:
        return None
    device = parameter.device
    if main == "input_ids" and getattr(config, "vocab_size", None):
        ids = torch.arange(2 * 9, device=device).reshape(2, 9) % config.vocab_size
        return {main: ids, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {main: ids}
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {main: torch.zeros(shape, device=device, dtype=parameter.dtype)}
    return None


def call(model: nn.Module, example: Example) -> Any:
    """``model(tensor)``, ``model(*sequence)`` or ``model(**mapping)``."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(example) if isinstance(example, Tensor) else model(*example)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode, each module's own mode put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, list | tuple) else []
