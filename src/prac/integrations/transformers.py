"""prac in the ``Trainer`` of transformers: what is lost is reported, and checkpoints resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from prac.monitoring.monitor import Monitor
from prac.runtime.warn import warn

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from prac.convert.handle import Handle
    from prac.monitoring.readings import Reading


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the ``Trainer`` writes the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class PracCallback(TrainerCallback):
    """Reports what compression keeps and loses to whatever the ``Trainer`` reports to, and saves its state.

    Every ``every`` steps, and after the first one, it logs ``prac/kept_bytes``, ``prac/refreshes`` and the mean errors;
    and of each layer, for the loggers alone and not for the terminal, ``prac/kept_bytes/LAYER``,
    ``prac/refreshes/LAYER``, ``prac/reconstruction_error/LAYER`` and ``prac/gradient_variance/LAYER``. See
    :class:`prac.Monitor` for what they are and what they cost.

    Each checkpoint also gets ``prac.pt`` (with several processes, one each), which is taken up when training resumes.

    >>> handle = prac.compress(model)
    >>> trainer = Trainer(model, arguments, train_dataset=data)
    >>> trainer.add_callback(PracCallback(handle, trainer))
    >>> trainer.train()

    Args:
        handle: of the model that the trainer trains.
        trainer: to log with.
        every, parts, path: as for :class:`prac.Monitor`.
    """

    def __init__(
        self, handle: Handle, trainer: Trainer, every: int = 100, *, parts: int = 8, path: str | Path | None = None
    ) -> None:
        self.trainer = trainer
        self.monitor = Monitor(handle, every, parts=parts, path=path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the state of a run that is resumed, unless it was taken up already."""
        handle = self.monitor.handle
        if state.global_step in (0, handle.step):
            return
        folders = [checkpoint_folder(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / "prac.pt").exists():
                handle.load(folder)
                return
        warn(
            f"no prac.pt in {folders[-1]}: training goes on from step {state.global_step} with new subspaces. To resume"
            " exactly from elsewhere, call handle.load(folder) before trainer.train()."
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look on, if the step is to be measured."""
        self.monitor.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure it, and report."""
        if reading := self.monitor.end():
            self._report(reading)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the state to the checkpoint."""
        self.monitor.handle.save(checkpoint_folder(args, state))

    def _report(self, reading: Reading) -> None:
        trainer, totals = self.trainer, reading.totals()
        details = {name: value for name, value in reading.scalars().items() if name not in totals}
        due = trainer.control.should_log
        trainer.log(totals)
        trainer.control.should_log = due  # the loss has yet to be
        for callback in trainer.callback_handler.callbacks:
            if not isinstance(callback, PrinterCallback | ProgressCallback):  # hundreds of numbers are not to be read
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(details), model=trainer.model)
