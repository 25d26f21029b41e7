"""A model and a training loop to be looked on at."""

from __future__ import annotations

import torch
from models import COMMON
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**COMMON, use_cache=False, **changes)).train()


def steps(model, batches, watch=None, optimizer=None, **call):
    """Train on ``batches``; ``watch`` looks on."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-3)
    for batch in batches:
        if watch is not None:
            watch.begin()
        model(**batch, **call).loss.backward()
        if watch is not None:
            watch.end()  # gradients are there, and have to be there afterwards
        optimizer.step()
        optimizer.zero_grad()


def batches(count, rows=5, length=16):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(64, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]
