"""prac in the ``Trainer`` of Lightning: what is lost is reported, and checkpoints resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

from prac.convert import state as saved_state
from prac.monitoring.monitor import Monitor
from prac.runtime.processes import process

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from prac.convert.handle import Handle


class PracCallback(Callback):
    """Reports what compression keeps and loses to the loggers of the ``Trainer``, and saves its state.

    Every ``every`` steps, and after the first one, it logs ``prac/kept_bytes``, ``prac/refreshes`` and the mean errors;
    and of each layer ``prac/kept_bytes/LAYER``, ``prac/refreshes/LAYER``, ``prac/reconstruction_error/LAYER`` and
    ``prac/gradient_variance/LAYER``. See :class:`prac.Monitor` for what they are and what they cost.

    Each checkpoint also holds the state of the compression, so that a single process resumes exactly. With several,
    Lightning saves the first one's; the others then begin with new subspaces of their own.

    >>> handle = prac.compress(module.model)
    >>> trainer = Trainer(callbacks=[PracCallback(handle)])

    Args:
        handle: of the model that ``training_step`` calls: the module itself only if it calls ``self(...)``.
        every, parts, path: as for :class:`prac.Monitor`.
    """

    def __init__(self, handle: Handle, every: int = 100, *, parts: int = 8, path: str | Path | None = None) -> None:
        self.monitor = Monitor(handle, every, parts=parts, path=path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look on, if the step is to be measured."""
        self.monitor.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure it, and report."""
        if reading := self.monitor.end():
            for logger in trainer.loggers:
                logger.log_metrics(reading.scalars(), step=reading.step)

    def state_dict(self) -> dict[str, Any]:
        """The handle's, for the checkpoint."""
        return self.monitor.handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        state = state_dict if process() == 0 else saved_state.renewed(state_dict)
        self.monitor.handle.load_state_dict(state)
