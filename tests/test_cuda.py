"""What is different on a GPU: devices, generators, autocast, the fused kernels of torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import gradients, relative
from models import BATCH, PAPER, build, compressed_names

import prac
from prac.memory import Step, choose, track_kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def on_the_gpu(model: Any) -> Any:
    """A model of that shape in bfloat16, drawn there: a billion numbers take the CPU longer than the test."""
    with torch.device("cuda"):
        return type(model)(model.config).to(torch.bfloat16)


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


@pytest.mark.parametrize(("preset", "share"), [("paper", 0.75), ("lean", 0.5)])
def test_peak_memory_falls(preset: str, share: float) -> None:
    """The allocator's own count, forward and backward, of a model whose activations dominate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def peak(compressed: bool) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, vocab_size=256
        )
        model = LlamaForCausalLM(config).cuda().train()
        if compressed:
            prac.compress(model, preset)
        ids = torch.randint(256, (32, 256), device="cuda")
        for _ in range(2):  # the first step also makes the subspaces
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cuda.max_memory_allocated()

    assert peak(True) < share * peak(False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_lean_gradients(family: str) -> None:
    """Groups, MLPs and attention as one operation each, rounded to 8 bits, in float32."""
    model = build(family).cuda()
    plain = copy.deepcopy(model)
    eight = prac.Bits(8)
    prac.compress(model, prac.Config(linear=eight, norm=eight, activation=eight, group=eight, min_width=1))
    got, expected = (
        torch.cat([g.flatten() for g in gradients(m, input_ids=BATCH["input_ids"].cuda()).values()])
        for m in (model, plain)
    )
    assert 1e-5 < relative(got, expected) < 0.02


def test_attention_in_few_bits() -> None:
    """torch's flash kernel called by its parts, in bfloat16, with fewer heads for k and v too."""
    import torch.nn.functional as F
    from helpers import Steps

    from prac.estimators.rounded import Stored
    from prac.ops.attention import attention
    from prac.ops.attention.flash import FLASH

    for heads in (8, 2):
        q, k, v = (torch.randn(2, h, 128, 64, device="cuda", dtype=torch.bfloat16) for h in (8, heads, heads))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        gqa = heads != 8
        keep = {t: Stored(prac.Bits(8), Steps(), unbiased=True, name=t) for t in ("q", "k", "v", "out")}
        out, _ = attention(q, k, v, keep, causal=True, gqa=gqa, backend=FLASH)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        dout = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad(o, leaves, dout) for o in (out, expected))
        assert relative(out, expected) < 0.01
        assert all(relative(a, b) < 0.05 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fused_kernels_make_the_same_codes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes of storing for the GPU, against eager: the same codes and scales, but for rounding."""
    from prac.config import Bits
    from prac.estimators.codes import Codes, Coding, dither, load, store
    from prac.runtime import kernel

    form = Bits(bits)
    x = torch.randn(1024, 1024, device="cuda")
    noise = dither(1024, 1024, form, x.device, torch.Generator("cuda").manual_seed(0))
    compiled, eager = kernel.fused(store)(x, Coding(form, noise)), store(x, Coding(form, noise))
    assert kernel._compiles
    differ = (compiled[0] != eager[0]).float().mean()
    assert differ < 1e-4
    a, b = (load(Codes(tuple(t), form, 1024), torch.float32) for t in (compiled, eager))
    assert relative(a, b) < 0.02


@pytest.mark.parametrize("method", ["plain", "checkpoint", "paper", "lean"])
@pytest.mark.parametrize("size", ["llama-130m", "llama-350m", "llama-1b"])
def test_predicted_peaks(size: str, method: str) -> None:
    """Within 5% of the allocator's peak, at micro-batches that leave room on a GPU of 80 GB."""
    from prac.lab.measured import footprint
    from prac.lab.methods.peers import checkpoint_blocks
    from prac.memory import measure

    micro_batch = 64 if size != "llama-1b" else 32
    setting = footprint.Setting(size, micro_batch, 256, "bf16")
    loss = "chunked" if method == "lean" else "plain"
    predicted = footprint.one(setting, method, loss, "adamw")
    model, _ = footprint.materials(setting)
    model = on_the_gpu(model).train()
    model.config.use_cache = False
    if method == "checkpoint":
        checkpoint_blocks(model)
    if method in prac.PRESETS:
        prac.compress(model, method, loss="chunked" if loss == "chunked" else None)
    ids = torch.randint(0, 32_000, (micro_batch, 256), device="cuda")
    real = measure(model, {"input_ids": ids, "labels": ids})
    peak = predicted.peak - predicted.at_peak["optimizer"]
    assert real.peak == pytest.approx(peak, rel=0.05)


def test_fit_tries_what_it_predicts() -> None:
    from prac.lab.measured import footprint

    setting = footprint.Setting("llama-130m", 32, 256, "bf16")
    model, _ = footprint.materials(setting)
    model = on_the_gpu(model)
    ids = torch.randint(0, 32_000, (32, 256), device="cuda")
    found = choose(Step(model, {"input_ids": ids, "labels": ids}), "5GiB")
    assert found.real is not None
    assert found.real <= 5 * 2**30


def test_refreshing_waits_for_nobody() -> None:
    """From the second refresh on the host waits no more; a bad batch leaves the old subspace, heard of later."""
    from helpers import Steps

    from prac.estimators.subspace import Subspace

    clock = Steps()
    subspace = Subspace(prac.Rank(0.3, 0.3), clock, T1=1, T2=1, name="layer")
    generator = torch.Generator("cuda").manual_seed(0)
    x_MN = torch.randn(512, 200, device="cuda", generator=generator)
    x_MN[:, :20] *= 10
    subspace.keep(x_MN)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock.step = 1
        kept = subspace.keep(x_MN + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert subspace.refreshes == 2
    p_NR = subspace._basis(x_MN.device, x_MN.dtype)
    q1_NR = p_NR[:, : subspace.r1].double()
    assert (q1_NR.mT @ q1_NR - torch.eye(subspace.r1, device="cuda")).abs().max() < 1e-5
    assert (q1_NR.mT @ p_NR[:, subspace.r1 :].double()).abs().max() < 1e-4
    best = torch.linalg.svdvals((x_MN + 1).double())[: subspace.r1].square().sum()
    assert ((x_MN + 1).double() @ q1_NR).square().sum() > 0.995 * best
    assert kept.reconstruct().shape == x_MN.shape

    clock.step = 2
    subspace.keep(torch.where(x_MN > 30, torch.inf, x_MN))
    torch.cuda.synchronize()
    assert torch.equal(subspace._basis(x_MN.device, x_MN.dtype), p_NR)
    clock.step = 3
    with pytest.warns(UserWarning, match="layer: refresh at step 2 skipped"):
        subspace.keep(x_MN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_monitored_run_is_the_same_run(dtype: torch.dtype) -> None:
    """Generators of the GPU, autocast and a scaled loss are part of the step that is run again."""
    ends, batch = [], on_gpu(BATCH)
    for monitored in (False, True):
        torch.manual_seed(0)
        model = build("gpt2").cuda().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        handle = prac.compress(model, PAPER.replace(T1=2, T2=2))
        watch = prac.Monitor(handle, every=2, parts=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
        for _ in range(5):
            if monitored:
                watch.begin()
            with torch.autocast("cuda", dtype):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if monitored:
                watch.end()
        ends.append([p.detach().clone() for p in model.parameters()])
        if monitored:
            assert len(watch.history) > 1
            assert all(0 < layer.gradient_variance < 100 for layer in watch.history[-1].layers if layer.kind == "norm")
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
