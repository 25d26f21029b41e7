"""The optimizers that come with methods, for a model and the options of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from prac.lab.materials import models
from prac.lab.methods.naming import Method
from prac.optim.adamw import SubspaceAdamW, evaluated

if TYPE_CHECKING:
    from prac.lab.runs.options import Options

# GaLore's rank at 60M parameters and up, and what others in a subspace are given as well.
RANK_SHARE = 4
# Its paper has 0.25, and a learning rate four times AdamW's, for all parameters alike. For matrices that is the same as
# 1 and AdamW's; but the embedding and the head, which GaLore leaves to AdamW, would learn four times as fast.
GALORE_SCALE = 1.0
GALORE_INTERVAL = 200  # steps, where the recipe has none of its own for a short run
BLOCKS = r".*\.\d+\..*"  # modules inside of blocks, as a regular expression


class Together(Optimizer):
    """Several optimizers as one, for schedulers and checkpoints to see: groups, state and steps of all.

    Args:
        optimizers: of parameters that do not overlap.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for each in self.optimizers for group in each.param_groups], {})
        self._link()

    def _link(self) -> None:
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        for each in self.optimizers:
            self.state.update(each.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Of each in turn."""
        loss = evaluated(closure)
        for each in self.optimizers:
            each.step()
            self.state.update(each.state)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Theirs, in order."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)
        self._link()


def is_matrix_of_a_block(name: str, p: nn.Parameter) -> bool:
    """What GaLore and Muon are for: weights of linear layers, not embeddings, the head or vectors."""
    return p.dim() == 2 and any(part.isdigit() for part in name.split("."))


def galore_rank(model: nn.Module) -> int:
    """A share of the hidden size."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[1]) // RANK_SHARE


def arguments(method: Method, model: nn.Module, options: Options) -> dict[str, Any]:
    """What ``TrainingArguments`` have to say of the optimizer."""
    if method.optimizer != "galore":
        return {"optim": "adamw_torch"}
    from galore_torch.galore_projector import GaLoreProjector

    torch.serialization.add_safe_globals([GaLoreProjector])  # its state holds some, and a checkpoint is to be read
    warnings.filterwarnings("ignore", "This implementation of AdamW is deprecated", FutureWarning)
    interval = models.recipe(options.model).interval or GALORE_INTERVAL
    return {
        "optim": "galore_adamw",
        "optim_target_modules": [BLOCKS],
        "optim_args": f"rank={galore_rank(model)}, update_proj_gap={interval}, scale={GALORE_SCALE}",
    }


def make(method: Method, model: nn.Module, options: Options) -> Optimizer | None:
    """The optimizer to hand to a ``Trainer``; None where its arguments say it (:func:`arguments`).

    As the Trainer has it, weights of norms and biases do not decay.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    how: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if method.optimizer in ("reproject", "reset"):
        groups = decayed(named, options.weight_decay)
        return SubspaceAdamW(groups, **how, at_refresh="reset" if method.optimizer == "reset" else "reproject")
    if method.optimizer == "muon":
        inside = {name: p for name, p in named.items() if is_matrix_of_a_block(name, p)}
        # Updates as large as AdamW's, so that one learning rate serves both (Moonshot's rule).
        muon = torch.optim.Muon(
            list(inside.values()), lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        rest = {name: p for name, p in named.items() if name not in inside}
        return Together([muon, torch.optim.AdamW(decayed(rest, options.weight_decay), **how)])
    if method.optimizer == "adam-mini":
        from adam_mini import Adam_mini

        config: Any = model.config
        return Adam_mini(
            model.named_parameters(), **how, weight_decay=options.weight_decay, verbose=False,
            dim=config.hidden_size, n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None),
        )  # fmt: skip
    return None


def decayed(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors, which do not."""
    matrices, vectors = ([p for p in named.values() if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
