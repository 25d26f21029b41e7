"""One LLaMA block alone, forward and backward: what each method costs and loses beside plain training.

Each row is `prac.lab.measured.block` on plain and one method, so the two are timed in turn in one process: the ratio is
the median of the rounds', with its quartiles. With it what is kept for backward (a unit is one activation), the peak of
a step and how far gradients are off. Liger's kernels (``liger…``) are put into that method's block alone: plain beside
it stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from rows import AS_TORCH_CHOOSES, FLASH, Job, Row, attention
from shapes import BLOCKS, TOY_BLOCKS
from torch import Tensor

from prac.lab.materials import blocks
from prac.lab.materials.blocks import Block, Shape
from prac.lab.measured.block import measure_block
from prac.lab.methods import naming
from prac.lab.methods.naming import Method

METHODS = (
    "plain", "checkpoint", "selective", "compile", "paper", "lean", "fast", "small", "lean+compile", "small+compile",
    "lean+attention8", "liger", "liger+checkpoint", "liger+lean", "liger+small",
)  # fmt: skip
COMPILING, REFRESHING = 90, 60  # seconds: what a row takes that compiles, and one that decomposes covariances


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """The rows of ``block`` and ``block4096``."""
    found = []
    for name in METHODS:
        setting = asdict((TOY_BLOCKS if toy else BLOCKS)[stage]) | {
            "method": name,
            "dtype": "fp32" if toy else "bf16",
            "attention": FLASH if flash else AS_TORCH_CHOOSES,
            "repeats": 2 if toy else 15,
            "seed": 0,
        }
        found.append(Job(name, measure, setting, estimate(name, 30), left_out=why_not(name, toy)))
    return found


def estimate(name: str, otherwise: float) -> float:
    """How long a row takes, in seconds; methods without a reason to take longer take ``otherwise``."""
    longer = COMPILING if "compile" in name else REFRESHING if name in ("paper", "fast") else 0
    return max(longer, otherwise)


def why_not(name: str, toy: bool) -> str:
    """Why a method cannot be measured here; empty if it can."""
    if is_liger(name) and find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if toy and "compile" in name:
        return "compiling takes longer than a toy may"
    return ""


def is_liger(name: str) -> bool:
    """Whether a method is to run on Liger's kernels."""
    return name.split("+")[0] == "liger"


def parse(name: str) -> Method:
    """The method of a name, without Liger's part in it.

    >>> parse("liger+checkpoint").checkpoint
    1
    """
    rest = name.removeprefix("liger").removeprefix("+") if is_liger(name) else name
    return replace(naming.parse(rest or "plain"), name=name)


def measure(setting: Row, device: str) -> Iterator[Row]:
    """A row of either stage."""
    shape = Shape(**{key: setting[key] for key in Shape.__dataclass_fields__})
    name, dtype = setting["method"], blocks.DTYPES[setting["dtype"]]

    def before(which: str, block: Block) -> None:
        if is_liger(which):
            put_in_ligers(block, shape, dtype)

    with attention(setting["attention"]):
        plain, *others = measure_block(
            shape,
            {"plain": None} if name == "plain" else {"plain": None, name: parse(name)},
            dtype=dtype,
            device=device,
            repeats=setting["repeats"],
            seed=setting["seed"],
            before=before,
        )
    row = others[-1] if others else plain
    yield {key: value for key, value in row.to_dict().items() if key != "method"} | {"plain_ms": plain.time_ms}


# --- Liger's kernels ---------------------------------------------------------------------------------


@contextmanager
def ligers_llama() -> Iterator[None]:
    """LLaMA of transformers is Liger's: its norm, its MLP and its rotary embedding; as before afterwards."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
        yield
    finally:
        vars(modeling_llama).update(before)


class LigerBlock(Block):
    """A block whose rotary embedding is Liger's while it runs: attention looks that up in its module at each call."""

    rotary: Any

    def run(self, x: Tensor) -> Tensor:
        """The layer, also where a checkpoint runs it once more."""
        from transformers.models.llama import modeling_llama

        before, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, type(self).rotary
        try:
            return super().run(x)
        finally:
            modeling_llama.apply_rotary_pos_emb = before


def put_in_ligers(block: Block, shape: Shape, dtype: torch.dtype) -> None:
    """Give a block Liger's layer with the weights of its own."""
    from transformers.models.llama import modeling_llama

    device = next(block.parameters()).device
    with ligers_llama():
        one = replace(shape, tokens=shape.sequence_length)
        layer = blocks.build(one, dtype=dtype, device=device)[0].layer
        # Of the class, not the block: what copies a block copies the class with it, and would bind a function anew.
        LigerBlock.rotary = staticmethod(modeling_llama.apply_rotary_pos_emb)
    layer.load_state_dict(block.layer.state_dict())
    block.layer = layer
    block.__class__ = LigerBlock
