"""What ``prac.compress`` returns: a view of the compressed model, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prac.clock import Clock
from prac.config import Config
from prac.estimator import Kept
from prac.layers import Compressed, Match, unswap
from prac.structure import Example, call, in_mode
from prac.subspace import Subspace
from prac.summary import Row, table


class Handle:
    """A compressed model's summary, state and undo.

    Attributes:
        model: the compressed model.
        config: what it was compressed with.
    """

    def __init__(
        self, model: nn.Module, config: Config, clock: Clock, matches: dict[str, Match], notes: dict[str, str | None]
    ) -> None:
        self.model, self.config = model, config
        self._clock, self._matches, self._notes = clock, matches, notes

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
        described: dict[Subspace, str] = {}  # who first keeps it
        rows = []
        for name, module in self.model.named_modules():
            if isinstance(module, Compressed):
                rows.append(self._compressed_row(name, module, described))
            elif self._notes.get(name) or _is_leaf(module):
                rows.append(
                    Row(name, type(module).__name__, "-", "", None, None, self._notes.get(name) or _why(module))
                )
        return rows

    def summary(self) -> str:
        """The rows as a table, repeated blocks folded, with totals."""
        return table(self.rows())

    def _compressed_row(self, name: str, layer: Compressed, described: dict[Subspace, str]) -> Row:
        module = type(layer).__name__.removeprefix("Prac")
        subspaces = list(layer.subspaces.values())
        weight = getattr(layer, "weight", None)
        if layer.kind == "linear" and weight is not None and not weight.requires_grad:
            return Row(name, module, layer.kind, "", 0, 0, "frozen weight: nothing is kept")
        if any(s.width is None for s in subspaces):
            return Row(name, module, layer.kind, "as its input", None, None, "width known after the first step")
        rank = f"{subspaces[0].r1}+{subspaces[0].r2} of {subspaces[0].width}"
        if subspaces[0] in described:
            block = name.rpartition(".")[0] + "."
            return Row(
                name, module, layer.kind, rank, 0, 0, f"shares the Z of {described[subspaces[0]].removeprefix(block)}"
            )
        described.update(dict.fromkeys(subspaces, name))
        dtype = weight.dtype if weight is not None else next(self.model.parameters()).dtype
        statistics = layer.statistics * torch.promote_types(dtype, torch.float32).itemsize
        before = sum((s.width or 0) * dtype.itemsize for s in subspaces) + statistics
        after = sum((s.r1 + s.r2) * dtype.itemsize for s in subspaces) + statistics
        return Row(name, module, layer.kind, rank, before, after, "")

    def reconstruction_error(self, example: Example) -> dict[str, float]:
        """‖X̃ − X‖² / ‖X‖² of every compressed tensor, by name, on one batch.

        Uses the subspaces as they are, refreshes nothing and changes no state. For PRAC it is
        about (k − 1) times the share of energy outside Q1 (Theorem 7).

        Raises:
            RuntimeError: before the first training step, when there is no subspace yet.
        """
        errors: dict[str, float] = {}

        def observe(subspace: Subspace, x: Tensor, kept: Kept) -> None:
            x_MN = x.detach().reshape(-1, x.shape[-1]).float()
            error = subspace.reconstruct(kept).float() - x_MN
            energy = x_MN.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
            errors[subspace.name] = (error.square().sum() / energy).item()

        self.observe(example, observe)
        return errors

    def observe(self, example: Example, look: Any) -> None:
        """Run the model on ``example`` in training mode; call ``look(subspace, x, kept)`` for each kept tensor.

        Raises:
            RuntimeError: before the first training step, when there is no subspace yet.
        """
        subspaces = list(self._subspaces())
        empty = [s.name for s in subspaces if s.p_NR is None]
        if len(empty) == len(subspaces):
            raise RuntimeError("no subspace yet: run at least one training step first.")
        for subspace in subspaces:
            if subspace.p_NR is not None:
                subspace.observer = lambda x, kept, s=subspace: look(s, x, kept)
        try:
            with in_mode(self.model, training=True), torch.enable_grad(), torch.random.fork_rng():
                call(self.model, example)
        finally:
            for subspace in subspaces:
                subspace.observer = None

    # --- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and every subspace: save it beside the model to resume exactly.

        Plain containers, numbers and tensors; ``torch.save`` it and ``torch.load`` it with
        ``weights_only=True``. The model's own ``state_dict`` does not contain it.
        """
        layers = self._layers()
        return {
            "step": self.step,
            "shared": {n: {t: s.name for t, s in layer.subspaces.items()} for n, layer in layers.items()},
            "subspaces": {s.name: s.state_dict() for s in self._subspaces()},
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
        by_name = {s.name: s for layer in layers.values() for s in layer.subspaces.values()}
        if missing := sorted(set(state["subspaces"]) - set(by_name)):
            raise ValueError(f"the saved state has subspaces that this model lacks: {', '.join(missing[:5])}.")
        for name, layer in layers.items():
            layer.subspaces = {tensor: by_name[leader] for tensor, leader in state["shared"][name].items()}
        for subspace in self._subspaces():
            subspace.load_state_dict(state["subspaces"][subspace.name])
        self._clock.step = state["step"]

    def restore(self) -> nn.Module:
        """Undo the compression: every module gets its own class back. Returns the model."""
        for name, layer in self._layers().items():
            unswap(layer, self._matches[name])
        self._matches = {}
        return self.model

    def _layers(self) -> dict[str, Compressed]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, Compressed)}

    def _subspaces(self) -> Iterator[Subspace]:
        yield from dict.fromkeys(s for layer in self._layers().values() for s in layer.subspaces.values())


def _is_leaf(module: nn.Module) -> bool:
    empty = isinstance(module, nn.Identity | nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.Sequential)
    return (not any(module.children()) and not empty) or any(True for _ in module.parameters(recurse=False))


def _why(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding: keeps token ids only"
    if isinstance(module, nn.Dropout | nn.modules.dropout._DropoutNd):
        return "dropout: keeps a mask, where p > 0"
    if isinstance(module, nn.MultiheadAttention):
        return "its input projection runs inside a function, out of reach; its input stays in full"
    if not any(True for _ in module.parameters(recurse=False)):
        return "no parameters; not a GELU or SiLU"
    return "not a kind that prac compresses; what it keeps stays in full"
