"""What a model looks like from inside: which layers read the same tensor, which is the head.

Found by watching the model run, so that no architecture has to be known by name.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from prac.layers.marks import may_be_kept, remark, saving_hooks
from prac.ops.attention import Call, choose
from prac.runtime.quiet import quietly, without_node
from prac.runtime.running import running, tensors_in
from prac.runtime.under_way import UnderWay


@dataclass
class Structure:
    """What one forward pass showed, by module name."""

    reads: dict[str, int] = field(default_factory=dict)  # a number for the tensor it read first
    writes: dict[str, int] = field(default_factory=dict)  # and for the one it returned
    width: dict[str, int] = field(default_factory=dict)  # features of what it read
    calls: dict[str, int] = field(default_factory=dict)  # how often it was called, in the order of the last calls
    heads: set[str] = field(default_factory=set)  # its output is an output of the model
    per_sample: set[str] = field(default_factory=set)  # it saw one row per sample, not per token
    edges: dict[str, int] = field(default_factory=dict)  # how many operations use its output
    keeps_input: set[str] = field(default_factory=set)  # what it read is kept by something else as well
    from_keeper: set[str] = field(default_factory=set)  # namely by the operation that made it
    keeps_output: set[str] = field(default_factory=set)  # and so is what it returned
    # Modules that call torch's attention, with the features of its q, k and v, all heads together, or why prac cannot
    # stand in for it.
    attention: dict[str, tuple[int, int, int] | str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)  # it ran where checkpointing hides what is kept
    of_training: bool = True  # False where the model only ran in eval mode

    def readers(self, name: str) -> list[str]:
        """The modules that read what ``name`` returned."""
        return [reader for reader, x in self.reads.items() if x == self.writes.get(name) and reader != name]


def probe(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Structure:
    """Call ``model`` once and watch the modules called ``names``.

    Quietly (:func:`prac.runtime.quiet.quietly`), as in training and then in eval mode. What training does counts (a
    dropout between a norm and its readers); eval mode shows modules that training left out at random, and what
    checkpointing hides. With autograd on, because its graph tells what modules cannot: how often a tensor is used, and
    what else is kept.
    """
    failed: Exception | None = None
    seen: dict[bool, Structure] = {}
    with quietly(model), torch.enable_grad():
        for training in (True, False):
            if training != model.training:  # modules that were set otherwise stay so where the model trains
                model.train(training)
            try:
                with Watch(model, names) as watch:
                    seen[training] = watch.structure(model(*args, **kwargs), args, kwargs)
            except Exception as error:  # a stranger's forward; the other mode may do
                failed = error
    try:
        if failed is not None and not seen:
            raise failed
    finally:
        failed = None  # its traceback holds this frame
    if False not in seen:
        return seen[True]
    return _together(seen[True], seen[False]) if True in seen else dataclasses.replace(seen[False], of_training=False)


def _together(training: Structure, evaluation: Structure) -> Structure:
    """What training showed, and from evaluation what it did not."""
    skipped = {name for name in evaluation.reads if name not in training.reads}
    unseen = skipped | training.hidden
    found = Structure(attention=evaluation.attention | training.attention)
    for part in ("reads", "writes", "width", "calls"):
        ours, theirs = getattr(training, part), getattr(evaluation, part)
        # Tensors are numbered in each run for itself.
        others = {n: -i if part in ("reads", "writes") else i for n, i in theirs.items() if n in skipped}
        both = ours | others
        # In the order of evaluation, in which the modules that training left out have their place.
        order = [*(n for n in theirs if n in both), *(n for n in both if n not in theirs)]
        setattr(found, part, {n: both[n] for n in order})
    found.edges = training.edges | {n: edges for n, edges in evaluation.edges.items() if n in unseen}
    for part in ("heads", "per_sample"):
        setattr(found, part, getattr(training, part) | (getattr(evaluation, part) & skipped))
    for part in ("keeps_input", "from_keeper", "keeps_output"):
        setattr(found, part, (getattr(training, part) - unseen) | (getattr(evaluation, part) & unseen))
    return found


class Watch:
    """Watches a forward pass of ``model``, from entering to :meth:`structure` and leaving.

    Where it is entered in one hook and left in another, ``call`` tells that the second never came.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], call: UnderWay | None = None) -> None:
        self.names, self.call, self._model = names, call, weakref.ref(model)
        self._reads: dict[str, Tensor] = {}
        self._writes: dict[str, Any] = {}
        self._inside: list[str] = []  # the watched modules that are running
        self._attention: dict[str, tuple[int, int, int] | str] = {}
        # Storages that operations outside of the watched modules keep, by address. Held, so that no other takes it.
        self._kept: dict[int, Tensor] = {}
        self._hidden: set[str] = set()
        self._calls: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        model = self._model()
        assert model is not None
        modules = dict(model.named_modules())  # also those that an attribute hides from get_submodule
        with ExitStack() as stack:
            for name in self.names:
                for hook in (
                    modules[name].register_forward_pre_hook(self._entering(name), with_kwargs=True),
                    modules[name].register_forward_hook(self._leaving(name), with_kwargs=True, always_call=True),
                ):
                    stack.callback(hook.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            names = stack.enter_context(running(model))
            self._mode = stack.enter_context(_WatchAttention(lambda seen: self._attention.setdefault(names[-1], seen)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        self._reads, self._writes, self._kept = {}, {}, {}

    def abandon(self) -> None:
        """The same, where nobody leaves; and leave if nothing was entered since."""
        self.forget()
        hooks, modes = saving_hooks(), _get_current_function_mode_stack()
        if hooks is not None and hooks[0] == self._pack and modes and modes[-1] is self._mode:
            self._stack.close()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inside.append(name)
            hooks = saving_hooks()
            if not torch.is_grad_enabled() or hooks is None or hooks[0] != self._pack:
                self._hidden.add(name)

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    def _leaving(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self._inside.pop()
            self._calls[name] = self._calls.pop(name, 0) + 1  # the last call comes last
            inputs = [*args, *kwargs.values()]
            if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].dim() or name in self._reads:
                return None
            if isinstance(output, Tensor) and output.is_floating_point():
                # Makes the graph go through here also where no weight below needs a gradient, and gives
                # the output a node of its own, whose edges are its uses.
                zero = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
                output = remark(output + zero, output)
            self._reads[name], self._writes[name] = inputs[0], output
            return output

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    def _pack(self, tensor: Tensor) -> Tensor:
        tensor = without_node(tensor)
        if self.call is not None and self.call.is_over():
            self.forget()
        elif not self._inside:
            self._kept[_storage(tensor)] = tensor.detach()
        return tensor

    def structure(self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Structure:
        """What was seen, given what the model returned for these."""
        found = Structure(attention=self._attention, hidden=self._hidden, calls=self._calls)
        outputs = tensors_in(output)
        results = {id(t) for t in outputs}
        samples = _samples(args, kwargs)
        tokens = max((_rows(t) for t in self._reads.values()), default=0)
        uses = _uses(outputs)
        for name, x in self._reads.items():
            # The tensors are alive until here, so equal ids mean the same tensor.
            found.reads[name] = id(whole(x))
            found.width[name] = x.shape[-1]
            # Where rows of x have no address of their own, a copy of it would be kept.
            if _storage(x) in self._kept and _storage(x.flatten(end_dim=-2)) in self._kept:
                found.keeps_input.add(name)
                if may_be_kept(x):
                    found.from_keeper.add(name)
            y = self._writes[name]
            if isinstance(y, Tensor):
                found.writes[name] = id(y)
                found.edges[name] = uses.get(y.grad_fn, 0)
                if _storage(y) in self._kept:
                    found.keeps_output.add(name)
            if id(y) in results:
                found.heads.add(name)
            if _rows(x) == samples != tokens:
                found.per_sample.add(name)
        return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The number of samples in a batch, where that can be told.

    It is the first size that all of its tensors share. Where they do not (patches of images beside sentences), only
    what the model says is its main input tells: token ids, a row a sample.
    """
    first = {t.shape[0] for t in tensors_in([*args, *kwargs.values()]) if t.dim() > 0}
    if len(first) == 1:
        return first.pop()
    ids = kwargs.get("input_ids")
    return ids.shape[0] if isinstance(ids, Tensor) and ids.dim() == 2 else None


def whole(x: Tensor) -> Tensor:
    """The tensor of which ``x`` is another view with the same rows, such as tokens folded into one dimension."""
    base = x._base
    if base is None or x.numel() != base.numel() or not x.is_contiguous() or x.shape[-1] != base.shape[-1]:
        return x
    return base


class _WatchAttention(TorchFunctionMode):
    """Calls ``seen(widths)``, or ``seen(why not)``, whenever ``F.scaled_dot_product_attention`` is called."""

    def __init__(self, seen: Callable[[tuple[int, int, int] | str], Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen(_widths(*args, **kwargs))
        return func(*args, **kwargs)


def _widths(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[int, int, int] | str:  # fmt: skip
    """Features of q, k and v, all heads together, or why prac cannot stand in for this call."""
    chosen = choose(Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    if isinstance(chosen, str):
        return chosen
    q, k, v = (t.shape[1] * t.shape[3] for t in (query, key, value))
    return q, k, v


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
