"""What compression loses, layer by layer, measured while a model trains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prac.convert.handle import Handle, squares
from prac.estimators.base import Estimator, Kept
from prac.layers import Compressed
from prac.memory import track_kept
from prac.monitoring.readings import LayerStats, Reading
from prac.monitoring.rerun import Call
from prac.runtime import files, kernel
from prac.runtime.processes import process
from prac.runtime.running import buffers_kept
from prac.runtime.warn import warn

_START = '{"step": '  # of a line in a file of readings


class Monitor:
    """Measures every ``every``-th step: bytes kept, refreshes, and each layer's errors.

    The step itself runs as ever. When it is over, its last batch is run again twice, once with everything kept in full
    and once compressed, back from the very gradient that the outputs had: that needs no loss function, so it works
    inside any training loop. Weights, gradients, random numbers, buffers and subspaces are left as they were: a
    monitored run ends with the same weights as one that is not. It costs about three steps each time, and the memory
    of a plain step on ``1 / parts`` of the batch.

    >>> monitor = prac.Monitor(handle, every=100)
    >>> for batch in loader:
    ...     with monitor:
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> print(monitor.history[-1])

    Args:
        handle: of the compressed model, which has to be called as such in training (not only parts of it).
        every: steps between readings. The first step is always measured.
        parts: the batch is run again in this many parts of its rows. A part is to fit into memory uncompressed. Where
            the loss is a mean and parts have unequal numbers of tokens, they count for slightly more or less than in
            the step.
        path: a JSON-lines file to keep :attr:`history` in; lines up to the current step that are there already, of a
            run that is resumed, stay. The first process writes it.

    Attributes:
        history: the readings so far.

    Raises:
        ValueError: if ``every`` or ``parts`` is below 1, or there is something else in the file.
    """

    def __init__(self, handle: Handle, every: int = 100, *, parts: int = 8, path: str | Path | None = None) -> None:
        if every < 1 or parts < 1:
            raise ValueError(f"every and parts must be at least 1, got every = {every}, parts = {parts}.")
        self.handle, self.every, self.parts = handle, every, parts
        self.path = None if path is None else Path(path)
        self.history: list[Reading] = []
        self._resumed = [] if self.path is None else read(self.path)
        self._hooks: list[Any] = []
        self._seen: Call | None = None
        self._step = 0
        self._written = False  # and whole
        self._warned: set[str] = set()

    def begin(self) -> None:
        """Before the forward pass of a step; looks on if it is one to be measured."""
        self._step = self.handle.step + 1
        self._forget()
        measured = bool(self.history) and self.history[-1].step == self._step
        if (self._step == 1 or self._step % self.every == 0) and not measured:
            model = self.handle.model
            self._hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self._after))

    @property
    def measures(self) -> bool:
        """Whether the step that runs is to be measured."""
        return bool(self._hooks)

    def end(self) -> Reading | None:
        """After the backward pass, or the optimizer's step; the reading, if this step was one to be measured."""
        seen, asked = self._seen, self.measures
        self._forget()
        if not asked:
            return None
        if seen is None or not seen.grads:
            self._warn(
                "the compressed model was not called in training in this step, or nothing was differentiated: there is "
                "nothing to measure. Compress the module that the training loop calls, not a larger one."
            )
            return None
        with buffers_kept(self.handle.model):
            reading = self._measure(seen)
        self._remember(reading)
        return reading

    def __enter__(self) -> Monitor:
        self.begin()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.end()
        else:
            self._forget()

    # --- while the step runs ----------------------------------------------------------------

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], None

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._seen = Call(model, args, kwargs)

    def _after(self, model: nn.Module, args: Any, output: Any) -> Any:
        return self._seen.watch(output) if self._seen is not None and torch.is_grad_enabled() else None

    # --- when it is over ----------------------------------------------------------------------

    def _measure(self, call: Call) -> Reading:
        model = self.handle.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        # By estimator: ‖X̃ − X‖² and ‖X‖². By parameter: ‖G̃ − G‖² and ‖G‖².
        errors: dict[Estimator, tuple[float, float]] = {}
        gradients: dict[nn.Parameter, tuple[float, float]] = {}

        def look(estimator: Estimator, x: Tensor, what: Kept) -> None:
            before, now = errors.get(estimator, (0.0, 0.0)), squares(x, what)
            errors[estimator] = (before[0] + now[0], before[1] + now[1])

        grads = [(p, p.grad) for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            # First, since FSDP2 puts its shards back in backward.
            with call.again(), self.handle.observed(_look_away), track_kept(model, call.inputs) as found:
                model(*call.inputs[0], **call.inputs[1])
            exact = self._exact(call, parameters)
            # Parts have a shape of their own, which is not worth compiling kernels for.
            with call.again(), self.handle.observed(look), kernel.run_by(kernel.as_written):
                for args, kwargs, outer in call.parts(self.parts):
                    output = model(*args, **kwargs)
                    if exact is not None:
                        call.backward(output, outer)
                    del output
            if exact is not None:
                gradients = {p: (_square(p.grad), exact[p]) for p in exact}
        finally:
            for p, grad in grads:
                p.grad = grad
        refreshes = sum(e.refreshes for e in errors)
        return Reading(self._step, found.total, refreshes, tuple(self._layers(found.by_module, errors, gradients)))

    def _exact(self, call: Call, parameters: list[nn.Parameter]) -> dict[nn.Parameter, float] | None:
        """‖G‖² of every gradient, and −G left in its place, so that the next backward adds up to the error.

        None where gradients cannot be had: the reading then goes without.
        """
        if any(p._post_accumulate_grad_hooks for p in parameters):
            self._warn("an optimizer steps inside of backward, so gradients cannot be measured.")
            return None
        try:
            with call.again(), self.handle.suspended(), kernel.run_by(kernel.as_written):
                for args, kwargs, outer in call.parts(self.parts):
                    call.backward(self.handle.model(*args, **kwargs), outer)
        except torch.OutOfMemoryError:
            for p in parameters:
                p.grad = None
            self._warn(f"a plain step on 1 / {self.parts} of the batch does not fit: raise parts to measure gradients.")
            return None
        exact = {}
        for p in parameters:
            if p.grad is not None:
                exact[p] = _square(p.grad)
                p.grad.neg_()
        return exact

    def _layers(
        self,
        kept: dict[str, int],
        errors: dict[Estimator, tuple[float, float]],
        gradients: dict[nn.Parameter, tuple[float, float]],
    ) -> Iterator[LayerStats]:
        modules = dict(self.handle.model.named_modules())
        for row in self.handle.rows():
            module = modules[row.name]
            estimators = self.handle.read_by(row.name) if isinstance(module, Compressed) else []
            own = [gradients[p] for p in module.parameters(recurse=False) if p in gradients]
            if not estimators and not own:
                continue
            yield LayerStats(
                row.name,
                row.what,
                row.rank,
                kept.get(row.name, 0),
                sum(e.refreshes for e in estimators),
                _ratio([errors[e] for e in estimators if e in errors]),
                _ratio(own),
            )

    def _remember(self, reading: Reading) -> None:
        if not self.history:
            self.history = [old for old in self._resumed if old.step < reading.step]
        self.history.append(reading)
        if self.path is None or process() != 0:
            return
        try:
            if not self._written:
                files.write(self.path, "".join(map(_line, self.history)))
            else:
                with self.path.open("a") as stream:
                    stream.write(_line(reading))
            self._written = True
        except OSError as error:  # no reason to lose the run
            self._written = False
            self._warn(f"{self.path} could not be written: {error}.")

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warn(f"prac.Monitor, step {self._step}: {problem}")


def _look_away(estimator: Estimator, x: Tensor, what: Kept) -> None:
    """Being observed keeps an estimator from being refreshed."""


def read(path: str | Path) -> list[Reading]:
    """The readings in a file that a :class:`Monitor` wrote; none if there is no such file.

    A last line that was cut short is left out.

    Raises:
        ValueError: if it is something else.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows, rest = files.read_lines(path)
        if rest and not rest.startswith(_START):
            raise ValueError(rest)
        return [Reading.from_dict(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readings of a prac.Monitor; move it out of the way.") from error


def _line(reading: Reading) -> str:
    return json.dumps(reading.to_dict()) + "\n"


def _square(grad: Tensor | None) -> float:
    """‖G‖², over all shards."""
    if grad is None:
        return 0.0
    values = grad.coalesce().values() if grad.is_sparse else grad
    norm = torch.linalg.vector_norm(values, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2


def _ratio(pairs: list[tuple[float, float]]) -> float | None:
    error, energy = (math.fsum(pair[i] for pair in pairs) for i in (0, 1))
    return error / energy if pairs and energy else None
