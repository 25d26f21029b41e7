"""Whole training steps of LLaMAs with random weights and fused AdamW, method by method.

Forward, backward and the optimizer's step on one batch of random tokens: the median time of a step once it is warm,
how long the very first one took (compiling, first subspaces), the peak of memory and what was held when the forward
pass was over. The loss is there to see that a method trains at all: on one batch it must have fallen. All but `plain`
leave out the logits: by prac's chunked loss, or Liger's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from block import estimate, is_liger, parse, why_not
from rows import AS_TORCH_CHOOSES, FLASH, Job, Row, attention
from shapes import MODELS, TOY_MODELS
from torch import nn

import prac
from prac.lab.materials.blocks import DTYPES
from prac.lab.measured.meters import synchronize
from prac.lab.methods import peers
from prac.memory.allocator import allocated

# With the logits or without.
METHODS = {
    "plain": ("plain", True),
    "plain, no logits": ("plain", False),
} | {
    name: (name, False)
    for name in (
        "compile", "checkpoint", "liger", "liger+checkpoint", "paper", "lean", "lean+attention8", "small",
    )
}  # fmt: skip


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """Every method on every model."""
    found = []
    for model, (shape, batch) in (TOY_MODELS if toy else MODELS).items():
        for name, (method, logits) in METHODS.items():
            setting = {
                "model": model, **asdict(shape), **asdict(batch), "method": method, "logits": logits,
                "dtype": "fp32" if toy else "bf16", "attention": FLASH if flash else AS_TORCH_CHOOSES,
                "optimizer": "fused AdamW", "warm_up": 1 if toy else 3, "steps": 2 if toy else 6, "seed": 0,
            }  # fmt: skip
            found.append(Job(name, measure, setting, estimate(method, 25), left_out=why_not(method, toy)))
    return found


def measure(setting: Row, device: str) -> Iterator[Row]:
    """A row."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # What was compiled for another row or on another day would make this one's first step look short.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield steps(setting, device)


def steps(setting: Row, device: str) -> Row:
    """What some steps of training cost."""
    torch.manual_seed(setting["seed"])
    place = torch.device(device)
    model, network = build(setting, place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (setting["sequences"], setting["sequence_length"])
    ids_BS = torch.randint(0, setting["vocab_size"], size, device=place)

    def forward() -> torch.Tensor:
        loss: torch.Tensor = network(input_ids=ids_BS, labels=ids_BS).loss
        return loss

    def finish(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, losses = [], []
    with attention(setting["attention"]):
        for _ in range(setting["warm_up"] + setting["steps"]):
            synchronize(place)
            start = time.perf_counter()
            loss = forward()
            finish(loss)
            synchronize(place)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
        del loss
        # Parameters and both of AdamW's moments; whatever else lies there between steps is the method's.
        state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
        before = torch.cuda.memory_allocated() if place.type == "cuda" else state
        with allocated(place) as found:
            loss = forward()
            found.mark()
            finish(loss)
    return {
        "ms": 1e3 * statistics.median(seconds[setting["warm_up"] :]),
        "first_s": seconds[0],
        "peak_gib": (before + found.peak) / 2**30,
        "held_gib": (before + found.marked - state) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if place.type == "cuda" else None,
        "first_loss": losses[0],
        "loss": losses[-1],
    }


def build(setting: Row, device: torch.device) -> tuple[nn.Module, Any]:
    """The model with its method at work, and what is to be called: itself, or compiled."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    shape, _ = MODELS[setting["model"]]
    config = LlamaConfig(
        **{key: setting[key] for key in asdict(shape)},
        max_position_embeddings=max(setting["sequence_length"], 256),
        attn_implementation="sdpa",
        use_cache=False,
    )
    liger, method = is_liger(setting["method"]), parse(setting["method"])
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # in this process, which is this row's; with its loss without logits
    with device:  # random numbers are drawn where they are needed: on a CPU those of 1.3 billion take a while
        model = modeling_llama.LlamaForCausalLM(config)
    model = model.to(device, DTYPES[setting["dtype"]]).train()
    loss = None if setting["logits"] or liger else "chunked"
    if method.config is not None:
        prac.compress(model, method.config, loss=loss)
    elif loss:
        prac.ChunkedLoss(model)
    peers.wrap(model, method)
    return model, torch.compile(model) if method.compiled else model
