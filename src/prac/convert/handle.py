"""What ``prac.compress`` returns: a view of the compressed model, and the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prac.config import Config
from prac.convert import state as saved_state
from prac.convert.chunked_loss import ChunkedLoss
from prac.convert.conversion import Conversion
from prac.convert.first_batch import detach, structure_of
from prac.convert.rows import maker_of, remarks_on, rows_of
from prac.convert.summary import Row, table
from prac.estimators.base import Estimator, Kept
from prac.estimators.subspace import Subspace, subspaces_among
from prac.layers import Compressed, layers_of
from prac.runtime.running import Example, call, in_mode


class Handle:
    """A compressed model's summary, state and undo.

    Attributes:
        model: the compressed model.
        config: what it was compressed with.
        choice: of a model that was compressed for a budget, what was chosen and what it costs
            (:class:`prac.memory.Choice`); else None.
    """

    def __init__(self, model: nn.Module, conversion: Conversion, chunked: ChunkedLoss | None = None) -> None:
        self.model, self.config = model, conversion.config
        self.choice: Any = None
        self._conversion, self._clock, self._chunked = conversion, conversion.clock, chunked

    @property
    def step(self) -> int:
        """Optimizer steps taken since compression; refreshes follow it."""
        return self._clock.step

    def tick(self) -> None:
        """Count an optimizer step by hand, where no ``torch.optim`` optimizer takes it."""
        self._clock.tick()

    def __repr__(self) -> str:
        return f"<prac.Handle: {len(self.layers())} compressed layers of {type(self.model).__name__}, step {self.step}>"

    # --- looking ---------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Every module with parameters of its own or of a known kind: compressed, or why not."""
        return rows_of(self.model, self._conversion)

    def summary(self) -> str:
        """The rows as a table, repeated blocks folded, with totals."""
        rows = self.rows()
        remarks = [*remarks_on(rows, self.model, self._conversion)]
        if self._chunked is not None:
            remarks.append(self._chunked.remark())
        if self.choice is not None:
            remarks.append(str(self.choice))
        return table(rows, remarks)

    def look(self, example: Example) -> None:
        """Let ``example`` show the structure of a model that has had no example and no batch yet; else do nothing."""
        if not self._conversion.is_final:
            structure = structure_of(self.model, self._conversion.names(self.model), example)
            detach(self.model)
            assert structure is not None  # only of an example that was made up it can be
            self._conversion.again(self.model, structure)

    def reconstruction_error(self, example: Example) -> dict[str, float]:
        """‖X̃ − X‖² / ‖X‖² of every compressed tensor, by name, on one batch.

        Uses the subspaces as they are, refreshes nothing and changes no state. For PRAC it is
        about (k − 1) times the share of energy outside Q1 (Theorem 7).

        Raises:
            RuntimeError: before the first training step, when there is no subspace yet.
        """
        errors: dict[str, float] = {}
        self.look(example)

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
        ready = [e for e in self._estimators() if e.is_ready]
        draws = [(each, each.draws) for e in ready for each in (e, *e.inside)]
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
        layers = self.layers().values()
        for layer in layers:
            layer._prac.suspended = True
        try:
            yield
        finally:
            for layer in layers:
                layer._prac.suspended = False

    def read_by(self, name: str) -> list[Estimator]:
        """The estimators that keep what a compressed layer reads: its own, or those of the layer that it reads from."""
        layers = self.layers()
        maker = layers.get(maker_of(layers, name))
        if maker is None:
            return []
        source = layers[name]._prac.source
        from_attention = source is not None and source.is_there_anyway
        return [maker.estimators["out"]] if from_attention else list(maker.estimators.values())

    # --- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step and every subspace: save it beside the model to resume exactly.

        Plain containers, numbers and tensors; ``torch.save`` it and ``torch.load`` it with
        ``weights_only=True``. The model's own ``state_dict`` does not contain it.
        """
        if self._conversion.state is not None:  # taken up when the first batch comes
            return self._conversion.state | {"step": self.step}
        return saved_state.state_of(self.model, self._clock)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: if it is of another model or config; the message says what differs.
        """
        if self._conversion.is_final:
            saved_state.take_up(state, self.model, self._clock)
        else:  # the first batch shows for which layers
            self._conversion.state, self._clock.step = state, state.get("step", 0)

    def save(self, folder: str | Path) -> None:
        """Write :meth:`state_dict` into ``folder``, as ``prac.pt``; with several processes, a file each."""
        saved_state.save(self.state_dict(), Path(folder))

    def load(self, folder: str | Path) -> None:
        """Take up what :meth:`save` wrote, also in another number of processes.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: if it is damaged, or of another model or config.
        """
        self.load_state_dict(saved_state.load(Path(folder)))

    def restore(self) -> nn.Module:
        """Undo the compression: every module gets its own class back, the model its loss. Returns the model."""
        detach(self.model)
        self._conversion.restore(self.model)
        if self._chunked is not None:
            self._chunked.remove()
            self._chunked = None
        return self.model

    def layers(self) -> dict[str, Compressed]:
        """The compressed layers, by name."""
        return layers_of(self.model)

    def _estimators(self) -> Iterator[Estimator]:
        yield from dict.fromkeys(e for layer in self.layers().values() for e in layer.estimators.values())

    def subspaces(self) -> Iterator[Subspace]:
        """Every subspace, once."""
        yield from subspaces_among(self._estimators())


def left_plain(model: nn.Module, chunked: ChunkedLoss | None, why: str) -> Handle:
    """A handle on a model that nothing has to be compressed of."""
    conversion = Conversion(model, Config(linear=None, norm=None, activation=None), None, None)
    conversion.is_final = True
    for name in conversion.names(model):
        conversion.notes[model.get_submodule(name)] = why
    return Handle(model, conversion, chunked)


def squares(x: Tensor, kept: Kept) -> tuple[float, float]:
    """‖X̃ − X‖² and ‖X‖²."""
    x_MN = x.detach().reshape(-1, x.shape[-1]).float()
    return (kept.reconstruct().float() - x_MN).square().sum().item(), x_MN.square().sum().item()
