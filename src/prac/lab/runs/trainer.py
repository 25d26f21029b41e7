"""The ``Trainer`` of ``prac train``: a checkpoint is whole or ends it, it shards on CPU too; how its processes part."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from transformers import Trainer

from prac.integrations.transformers import checkpoint_folder
from prac.lab.runs import checkpoints

if TYPE_CHECKING:
    from torch import nn


class LabTrainer(Trainer):
    """A ``Trainer`` that ends where a checkpoint cannot be written, and leaves the ones before it alone."""

    def create_accelerator_and_postprocess(self) -> None:
        """Also shard on CPU: accelerate would silently train with DDP there, though FSDP2 itself runs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type != DistributedType.FSDP:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all blocks: an incomplete last batch is dropped in training alone."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def get_batch_samples(self, *how: Any) -> Any:
        """None where every step is done: resumed after its last one, a ``Trainer`` would take one more."""
        return ([], None) if self.state.global_step >= self.state.max_steps else super().get_batch_samples(*how)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with checkpoints.whole(checkpoint_folder(self.args, self.state), self.args, self.model, self.processing_class):
            super()._save_checkpoint(model, trial)


def shard_on_cpu(accelerator: Accelerator, arguments: dict[str, Any]) -> None:
    """Let accelerate prepare models with FSDP2 on CPU; ``arguments`` are those of its plugin."""
    plugin = FullyShardedDataParallelPlugin(**arguments)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


def leave_processes(*, sharded: bool = False) -> None:
    """Wait for the other processes, and end the group they form while Python is still whole; alone, do nothing.

    A thread of Gloo that lets go of its last tensors when the interpreter is already coming down ends its process
    with SIGABRT, and torchrun calls a run that is complete a failure. Caches of torch's sharded tensors keep the group,
    and so its threads, to the very end: a process whose model is ``sharded`` ends here, with 0.
    """
    state = PartialState()
    several = state.num_processes > 1
    state.wait_for_everyone()
    state.destroy_process_group()
    if sharded and several:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
