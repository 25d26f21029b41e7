"""What ``prac.compress`` returns: a view of the compressed model, and the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prac import saving
from prac.clock import Clock
from prac.config import Config
from prac.estimator import Estimator, Kept
from prac.layers import Compressed, Match, unswap
from prac.loss import ChunkedLoss
from prac.plan import Source
from prac.stored import Stored
from prac.structure import Example, call, in_mode
from prac.subspace import Subspace
from prac.summary import Row, is_leaf, table, why_left


class Handle:
    """A compressed model's summary, state and undo.

    Attributes:
        model: the compressed model.
        config: what it was compressed with.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        clock: Clock,
        matches: dict[str, Match],
        notes: dict[str, str | None],
        sources: dict[str, Source],
        chunked: ChunkedLoss | None = None,
    ) -> None:
        self.model, self.config, self._chunked = model, config, chunked
        self._clock, self._matches, self._notes, self._sources = clock, matches, notes, sources

    @property
    def step(self) -> int:
        """Optimizer steps taken since compression; refreshes follow it."""
        return self._clock.step

    def tick(self) -> None:
        """Count an optimizer step by hand, where no ``torch.optim`` optimizer takes it."""
        self._clock.tick()

    def __repr__(self) -> str:
        return f"<prac.Handle: {len(self._matches)} compressed layers of {type(self.model).__name__}, step {self.step}>"

    # --- looking ---------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Every module with parameters of its own or of a known kind: compressed, or why not."""
        described: dict[Estimator | Source, str] = {}  # who first keeps it
        rows = []
        for name, module in self.model.named_modules():
            if isinstance(module, Compressed):
                rows.append(self._compressed_row(name, module, described))
            elif self._notes.get(name) or is_leaf(module):
                rows.append(
                    Row(name, type(module).__name__, "-", "", None, None, self._notes.get(name) or why_left(module))
                )
        return rows

    def summary(self) -> str:
        """The rows as a table, repeated blocks folded, with totals."""
        return table(self.rows())

    def _compressed_row(self, name: str, layer: Compressed, described: dict[Estimator | Source, str]) -> Row:
        module = type(layer).__name__.removeprefix("Prac")
        weight = getattr(layer, "weight", None)
        dtype = weight.dtype if weight is not None else next(self.model.parameters()).dtype
        if name in self._sources:
            return self._reader_row(name, layer, module, dtype, described)
        if layer.kind == "linear" and weight is not None and not weight.requires_grad:
            return Row(name, module, layer.kind, "", 0, 0, "frozen weight: nothing is kept")
        estimators = list(layer.estimators.values())
        if any(e.width is None for e in estimators):
            return Row(name, module, layer.kind, "as its input", None, None, "width known after the first step")
        label = estimators[0].label()
        if estimators[0] in described:
            other = _short(described[estimators[0]], name)
            return Row(name, module, layer.kind, label, 0, 0, f"shares the Z of {other}")
        described.update(dict.fromkeys(estimators, name))
        statistics = layer.statistics * torch.promote_types(dtype, torch.float32).itemsize
        before = sum((e.width or 0) * dtype.itemsize for e in estimators) + statistics
        after = sum(e.bytes_per_token(dtype.itemsize) for e in estimators) + statistics
        return Row(name, module, layer.kind, label, before, after, "")

    def _reader_row(
        self, name: str, layer: Compressed, module: str, dtype: torch.dtype, described: dict[Estimator | Source, str]
    ) -> Row:
        """A layer that has its input from what others keep."""
        source = self._sources[name]
        if not source.name:
            attention, estimators = self._attention_around(name)
            label = estimators[0].label() if estimators else "in full"
            note = (
                f"from the output of {attention.rpartition('.')[2]}" if attention else f"{source.what} keeps it anyway"
            )
            return Row(name, module, layer.kind, label, 0, 0, note)
        maker = self.model.get_submodule(source.name)
        assert isinstance(maker, Compressed)
        estimator = next(iter(maker.estimators.values()))
        # The tensor itself was kept once, by the first that reads it.
        first = source not in described
        described[source] = name
        width = (
            layer.estimators["x"].width or getattr(layer, "in_features", 0) or layer.get_parameter("weight").shape[0]
        )
        outputs = layer.estimators.get("y")
        after = 0
        if isinstance(outputs, Stored) and outputs.bits is not None:
            outputs.width = layer.get_parameter("weight").numel() // width
            after = outputs.bytes_per_token(dtype.itemsize)
        # A module is called by its own name where it is the parent, as an MLP is of its down projection.
        maker_name = source.name.rpartition(".")[2] if name.startswith(f"{source.name}.") else _short(source.name, name)
        note = f"from {source.what} of {maker_name}"
        return Row(name, module, layer.kind, estimator.label(), width * dtype.itemsize if first else 0, after, note)

    def reconstruction_error(self, example: Example) -> dict[str, float]:
        """‖X̃ − X‖² / ‖X‖² of every compressed tensor, by name, on one batch.

        Uses the subspaces as they are, refreshes nothing and changes no state. For PRAC it is
        about (k − 1) times the share of energy outside Q1 (Theorem 7).

        Raises:
            RuntimeError: before the first training step, when there is no subspace yet.
        """
        errors: dict[str, float] = {}

        def look(estimator: Estimator, x: Tensor, kept: Kept) -> None:
            error, energy = squares(x, kept)
            errors[estimator.name] = error / max(energy, torch.finfo(torch.float32).tiny)

        with in_mode(self.model, training=True), torch.enable_grad(), torch.random.fork_rng(), self.observed(look):
            call(self.model, example)
        return errors

    @contextmanager
    def observed(self, look: Callable[[Estimator, Tensor, Kept], None]) -> Iterator[None]:
        """Inside the block ``look`` is called with each tensor that is kept, nothing is refreshed, no state changes.

        Raises:
            RuntimeError: before the first training step, when there is no subspace yet.
        """
        subspaces = list(self.subspaces())
        if subspaces and all(s.p_NR is None for s in subspaces):
            raise RuntimeError("no subspace yet: run at least one training step first.")
        ready = [e for e in self._estimators() if not isinstance(e, Subspace) or e.p_NR is not None]
        draws = [(each, each.draws) for e in ready for each in ([e, e.storage] if isinstance(e, Subspace) else [e])]
        for estimator in ready:
            estimator.observer = functools.partial(look, estimator)
        try:
            yield
        finally:
            for estimator in ready:
                estimator.observer = None
            for each, drawn in draws:
                each.draws = drawn

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block the model trains as it did before: everything is kept in full, gradients are exact."""
        layers = self._layers().values()
        for layer in layers:
            layer.suspended = True
        try:
            yield
        finally:
            for layer in layers:
                layer.suspended = False

    def read_by(self, name: str) -> list[Estimator]:
        """The estimators that keep what a compressed layer reads: its own, or those of the layer that it reads from."""
        source = self._sources.get(name)
        if source is not None and not source.name:
            return self._attention_around(name)[1]
        layer = self.model.get_submodule(name if source is None else source.name)
        return list(layer.estimators.values()) if isinstance(layer, Compressed) else []

    def _attention_around(self, name: str) -> tuple[str, list[Estimator]]:
        """The compressed attention that a layer is part of, and how its output is kept; ``""`` and none without."""
        while name:
            name = name.rpartition(".")[0]
            module = self.model.get_submodule(name)
            if isinstance(module, Compressed) and module.kind == "attention":
                return name, [module.estimators["out"]]
        return "", []

    # --- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and every subspace: save it beside the model to resume exactly.

        Plain containers, numbers and tensors; ``torch.save`` it and ``torch.load`` it with
        ``weights_only=True``. The model's own ``state_dict`` does not contain it.
        """
        layers = self._layers()
        return {
            "step": self.step,
            "shared": {n: {t: e.name for t, e in layer.estimators.items()} for n, layer in layers.items()},
            "subspaces": {s.name: s.state_dict() for s in self.subspaces()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: if it is of another model or config; the message says what differs.
        """
        layers = self._layers()
        if set(state["shared"]) != set(layers):
            odd = sorted(set(state["shared"]) ^ set(layers))
            raise ValueError(f"the saved state is of other layers than this model's: {', '.join(odd[:5])}.")
        by_name = {e.name: e for e in self._estimators()}
        if missing := sorted(set(state["subspaces"]) - set(by_name)):
            raise ValueError(f"the saved state has subspaces that this model lacks: {', '.join(missing[:5])}.")
        for name, layer in layers.items():
            layer.estimators = {tensor: by_name[leader] for tensor, leader in state["shared"][name].items()}
        for subspace in self.subspaces():
            subspace.load_state_dict(state["subspaces"][subspace.name])
        self._clock.step = state["step"]

    def save(self, folder: str | Path) -> None:
        """Write :meth:`state_dict` into ``folder``, as ``prac.pt``; with several processes, a file each."""
        saving.save(self.state_dict(), Path(folder))

    def load(self, folder: str | Path) -> None:
        """Take up what :meth:`save` wrote, also in another number of processes.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: if it is damaged, or of another model or config.
        """
        self.load_state_dict(saving.load(Path(folder)))

    def restore(self) -> nn.Module:
        """Undo the compression: every module gets its own class back, the model its loss. Returns the model."""
        for name, layer in self._layers().items():
            unswap(layer, self._matches[name])
        self._matches = {}
        if self._chunked is not None:
            self._chunked.remove()
            self._chunked = None
        return self.model

    def _layers(self) -> dict[str, Compressed]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, Compressed)}

    def _estimators(self) -> Iterator[Estimator]:
        yield from dict.fromkeys(e for layer in self._layers().values() for e in layer.estimators.values())

    def subspaces(self) -> Iterator[Subspace]:
        """Every subspace, once."""
        yield from (e for e in self._estimators() if isinstance(e, Subspace))


def squares(x: Tensor, kept: Kept) -> tuple[float, float]:
    """‖X̃ − X‖² and ‖X‖²."""
    x_MN = x.detach().reshape(-1, x.shape[-1]).float()
    return (kept.reconstruct().float() - x_MN).square().sum().item(), x_MN.square().sum().item()


def _short(name: str, neighbour: str) -> str:
    """A module's name, seen from a neighbour in the same block."""
    ours, theirs = name.split("."), neighbour.split(".")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    return ".".join(ours[same:])
