"""What is different on a GPU: devices, generators, autocast, the fused kernels of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import gradients, relative
from models import BATCH, PAPER, build, compressed_names

import prac
from prac.memory import track_kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("moved", ["before", "after"])
def test_gradients_when_nothing_is_lost(family: str, moved: str) -> None:
    """Whether the model moves to the GPU before it is compressed or after."""
    model = build(family)
    plain = copy.deepcopy(model).cuda()
    lossless = prac.Rank(1.0, 0.0)
    config = prac.Config(linear=lossless, norm=lossless, activation=lossless, min_width=1)
    if moved == "before":
        model.cuda()
    prac.compress(model, config)
    model.cuda()
    expected, got = (gradients(m, **on_gpu(BATCH)) for m in (plain, model))
    scale = max(g.abs().max().item() for g in expected.values())
    for name in expected:
        small = (got[name] - expected[name]).abs().max().item() < 1e-6 * scale
        assert small or relative(got[name], expected[name]) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_low_precision(dtype: torch.dtype) -> None:
    """Linear inputs are kept in the autocast dtype, and the loss falls."""
    model = build("llama").cuda()
    prac.compress(model, PAPER.replace(T1=5, T2=5))
    assert compressed_names(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype), track_kept(model) as kept:
            loss = model(**on_gpu(BATCH)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    assert kept.by_module["model.layers.0.self_attn.o_proj"] == 4 * 17 * 18 * 2


def test_peak_memory_falls() -> None:
    """The allocator's own count, forward and backward, of a model whose activations dominate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def peak(compressed: bool) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, vocab_size=256
        )
        model = LlamaForCausalLM(config).cuda().train()
        if compressed:
            prac.compress(model)
        ids = torch.randint(256, (32, 256), device="cuda")
        for _ in range(2):  # the first step also makes the subspaces
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cuda.max_memory_allocated()

    assert peak(True) < 0.75 * peak(False)
