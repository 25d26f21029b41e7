"""What a model looks like from inside: which layers read the same tensor, which is the head.

Found by running the model and watching, so that no architecture has to be known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass
class Structure:
    """What one forward pass showed, by module name."""

    reads: dict[str, int] = field(default_factory=dict)  # a number for the tensor it read first
    writes: dict[str, int] = field(default_factory=dict)  # and for the one it returned
    width: dict[str, int] = field(default_factory=dict)  # features of what it read
    heads: set[str] = field(default_factory=set)  # its output is an output of the model
    per_sample: set[str] = field(default_factory=set)  # it saw one row per sample, not per token
    edges: dict[str, int] = field(default_factory=dict)  # how many operations use its output
    keeps_input: set[str] = field(default_factory=set)  # what it read is kept by something else as well
    keeps_output: set[str] = field(default_factory=set)  # and so is what it returned
    # Modules that call torch's attention, with the features of its q, k and v, all heads together.
    attention: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def readers(self, name: str) -> list[str]:
        """The modules that read what ``name`` returned."""
        return [reader for reader, x in self.reads.items() if x == self.writes.get(name) and reader != name]


def probe(model: nn.Module, names: Sequence[str], example: Example) -> Structure:
    """Run ``model`` forward once on ``example`` and watch the modules called ``names``.

    In eval mode; modes and random state are put back. With autograd on, because its graph tells
    what modules cannot: how often a tensor is used, and what else is kept.
    """
    reads: dict[str, Tensor] = {}
    writes: dict[str, Any] = {}
    inside: list[str] = []  # the watched modules that are running
    structure = Structure()
    kept_by_others: dict[int, Tensor] = {}

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: inside.append(name)

    def leave(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            inside.pop()
            if not args or not isinstance(args[0], Tensor) or name in reads:
                return None
            if isinstance(output, Tensor) and output.is_floating_point():
                # Makes the graph go through here also where no weight below needs a gradient, and gives
                # the output a node of its own, whose edges are its uses.
                output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            reads[name], writes[name] = args[0], output
            return output

        return hook

    def pack(tensor: Tensor) -> Tensor:
        if not inside:
            kept_by_others[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks: list[Any] = []
    for name in names:
        module = model.get_submodule(name)
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    try:
        with (
            in_mode(model, training=False),
            torch.enable_grad(),
            torch.random.fork_rng(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            running(model) as stack,
            _WatchAttention(lambda widths: structure.attention.setdefault(stack[-1], widths)),
        ):
            output = call(model, example)
    finally:
        for hook in hooks:
            hook.remove()

    outputs = tensors_in(output)
    results = {id(t) for t in outputs}
    samples = {t.shape[0] for t in tensors_in(example) if t.dim() > 0}
    tokens = max((t.numel() // t.shape[-1] for t in reads.values()), default=0)
    uses = _uses(outputs)
    for name, x in reads.items():
        # The tensors are alive until here, so equal ids mean the same tensor.
        structure.reads[name] = id(whole(x))
        structure.width[name] = x.shape[-1]
        if x.untyped_storage()._cdata in kept_by_others:
            structure.keeps_input.add(name)
        y = writes[name]
        if isinstance(y, Tensor):
            structure.writes[name] = id(y)
            structure.edges[name] = uses.get(y.grad_fn, 0)
            if y.untyped_storage()._cdata in kept_by_others:
                structure.keeps_output.add(name)
        if id(y) in results:
            structure.heads.add(name)
        if x.numel() // x.shape[-1] in samples and tokens not in samples:
            structure.per_sample.add(name)
    return structure


def whole(x: Tensor) -> Tensor:
    """The tensor of which ``x`` is another view with the same rows, such as tokens folded into one dimension."""
    base = x._base
    if base is None or x.numel() != base.numel() or not x.is_contiguous() or x.shape[-1] != base.shape[-1]:
        return x
    return base


class _WatchAttention(TorchFunctionMode):
    """Calls ``seen(widths)`` whenever ``F.scaled_dot_product_attention`` is called."""

    def __init__(self, seen: Callable[[tuple[int, int, int]], Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
            if q.dim() == k.dim() == v.dim() == 4:
                self.seen((q.shape[1] * q.shape[3], k.shape[1] * k.shape[3], v.shape[1] * v.shape[3]))
        return func(*args, **kwargs)


def _uses(outputs: Sequence[Tensor]) -> dict[Any, int]:
    """For every node of the autograd graph below ``outputs``, the number of edges that lead into it."""
    uses: dict[Any, int] = {}
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                uses[node] = uses.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    return uses


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
def running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules of ``model`` that run, the innermost last, kept up to date inside the block.

    It begins with ``""`` for what runs outside of them. Layers that run as one operation do so also while they are
    watched.
    """
    names = [""]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            names.append(name)

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        names.pop()

    leave.only_counts = True  # type: ignore[attr-defined]
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield names
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode, each module's own mode put back afterwards."""
    with modes_kept(model):
        model.train(training)
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module's own mode back, whatever the block changes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists and mappings."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [t for item in tree for t in tensors_in(item)] if isinstance(tree, list | tuple) else []
