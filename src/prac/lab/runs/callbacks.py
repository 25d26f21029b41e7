"""What happens between the steps of a ``Trainer``: metrics, a progress bar, spectra, errors by layer."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from prac.integrations.transformers import PracCallback
from prac.lab.measured import training
from prac.lab.report import results
from prac.runtime import files

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from prac.convert.handle import Handle


class Metrics(TrainerCallback):
    """One JSON line per logged step: step, loss, lr, tokens, tokens_per_s, elapsed; and step, val_loss.

    ``elapsed`` counts seconds of training (data, forward, backward, optimizer) and leaves out validation and
    checkpoints. After a resume it goes on where the checkpoint's line left it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.elapsed = 0.0
        self.tokens = 0
        self._since: float | None = None
        self._unwritten: str | None = None  # None where another process writes, or none does
        self._failed = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the lines up to the step that training starts from."""
        lines = [line for line in results.read_lines(self.path) if line["step"] <= state.global_step]
        trained = [line for line in lines if "elapsed" in line]
        self.elapsed = trained[-1]["elapsed"] if trained else 0.0
        self.tokens = int(state.num_input_tokens_seen)
        if state.is_world_process_zero:
            files.write(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self._unwritten = ""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, if something other than training stopped it."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log before every validation and checkpoint, so that the clock does not count them."""
        if control.should_evaluate or control.should_save:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Write a line for the training loss."""
        if "loss" not in logs or self._since is None:
            return
        now = time.perf_counter()  # the loss has just been read from the device: nothing is in flight
        seconds, self._since = now - self._since, now
        self.elapsed += seconds
        tokens, self.tokens = int(state.num_input_tokens_seen) - self.tokens, int(state.num_input_tokens_seen)
        self._write(
            step=state.global_step,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            tokens=self.tokens,
            tokens_per_s=tokens / seconds,
            elapsed=self.elapsed,
        )
        if not math.isfinite(logs["loss"]):
            raise RuntimeError(f"the loss is {logs['loss']} at step {state.global_step}: lower --lr or raise the rank.")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, Any], **_: Any
    ) -> None:
        """Write a line for the validation loss."""
        self._since = None
        self._write(step=state.global_step, val_loss=metrics["eval_loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self._since = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write no more.

        Raises:
            OSError: if there are lines that could not be written.
        """
        left, self._unwritten = self._unwritten, None
        if left:
            raise OSError(errno.ENOSPC, f"{left.count(chr(10))} lines of this run could not be written", str(self.path))

    @property
    def tokens_per_s(self) -> float:
        """In training, but for the first step, which compiles, warms up and makes the first subspaces."""
        first, *others = [line for line in results.read_lines(self.path) if "elapsed" in line]
        if not others:
            return first["tokens"] / first["elapsed"]
        return (others[-1]["tokens"] - first["tokens"]) / (others[-1]["elapsed"] - first["elapsed"])

    def leave_out(self, seconds: float) -> None:
        """Take time off the clock that went into something other than training."""
        if self._since is not None:
            self._since += seconds

    def _write(self, **line: float) -> None:
        if self._unwritten is None:
            return
        self._unwritten += json.dumps(line) + "\n"
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as stream:
                stream.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:  # there may be room the next time
            os.truncate(self.path, size)
            if not self._failed:
                print(f"\nprac: {self.path} could not be written: {error}. It is tried again.", file=sys.stderr)
            self._failed = True


class Progress(TrainerCallback):
    """A bar of the steps, with the training loss (smoothed) and the last validation loss; then one of evaluation."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.shown: dict[str, str] = {}
        self._loss: float | None = None
        self._bar: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the step that training starts from."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", mininterval=_every()
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the losses."""
        if "loss" in logs:
            self._loss = logs["loss"] if self._loss is None else 0.9 * self._loss + 0.1 * logs["loss"]
            self.shown["loss"] = f"{self._loss:.3f}"
        if "eval_loss" in logs:
            self.shown["val"] = f"{logs['eval_loss']:.3f}"
        if self._bar is not None:
            self._bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Move the bar of an evaluation after training, which reads all of the validation text."""
        if self._bar is None and state.is_world_process_zero:
            if self._evaluation is None:
                self._evaluation = tqdm(
                    total=len(eval_dataloader), desc=f"{self.title}, evaluation", unit="batch", mininterval=_every(),
                    delay=2, leave=False,
                )  # fmt: skip
            self._evaluation.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close that bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None


def _every() -> float:
    """Seconds between two looks of a bar: few in a log."""
    return 0.2 if sys.stderr.isatty() else 30


class Spectra(TrainerCallback):
    """Takes the spectrum of one layer's input at 10% of the steps and at the end; writes ``spectrum.json``."""

    def __init__(self, path: Path, layer: str, batch: dict[str, Tensor]) -> None:
        self.path = path
        self.layer = layer
        self.batch = batch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget spectra taken after the step that training starts from."""
        if state.is_world_process_zero:
            files.write_json(self.path, [row for row in self._read() if row["step"] <= state.global_step])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Take it, when it is time; the log of this step is made first, so that the clock leaves it out."""
        if state.global_step == max(1, round(0.1 * state.max_steps)):
            control.should_evaluate = control.should_log = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Take the spectrum while the clock stands still."""
        if state.global_step in (max(1, round(0.1 * state.max_steps)), state.max_steps):
            batch = {name: tensor.to(args.device) for name, tensor in self.batch.items()}
            row = {"step": state.global_step} | training.spectrum(model, self.layer, batch)
            if state.is_world_process_zero:
                rows = [old for old in self._read() if old["step"] != state.global_step]
                files.write_json(self.path, [*rows, row])

    def _read(self) -> Any:
        return results.read(self.path) if self.path.exists() else []


class Layers(PracCallback):
    """Measures every layer, off the clock; :class:`prac.lab.runs.checkpoints.Seal` has put the state in checkpoints."""

    def __init__(self, handle: Handle, trainer: Trainer, every: int, path: Path, metrics: Metrics) -> None:
        super().__init__(handle, trainer, every, path=path)
        self.metrics = metrics

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, when it is time."""
        if self.monitor.measures:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what is in flight is training
            started = time.perf_counter()
            super().on_step_end(args, state, control)
            self.metrics.leave_out(time.perf_counter() - started)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing."""
