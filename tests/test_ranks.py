"""Data-parallel ranks draw their own noise, and average it; FSDP2 may shard any layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import gradients, leave
from models import build
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import prac
from prac.layers import Compressed

DRAWS = 60
IDS = torch.randint(3, 97, (16, 17), generator=torch.Generator().manual_seed(0))


def gradient(seed: int, ranks: list[int], monkeypatch) -> Tensor:
    """The mean of the ranks' gradients, each on its part of the batch, as DDP has it."""
    found = []
    for rank, ids in zip(ranks, IDS.chunk(len(ranks)), strict=True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model = build("llama")
        prac.compress(model, prac.PRESETS["paper"].replace(min_width=8, seed=seed))
        found.append(torch.cat([g.flatten() for g in gradients(model, input_ids=ids, labels=ids).values()]).double())
    monkeypatch.undo()
    return torch.stack(found).mean(0)


def variance(ranks: list[int], monkeypatch) -> Tensor:
    """E‖g − E g‖² over draws of the subspaces, one sample each."""
    draws = torch.stack([gradient(seed, ranks, monkeypatch) for seed in range(DRAWS)])
    return (draws - draws.mean(0)).square().sum(1) * DRAWS / (DRAWS - 1)


@pytest.mark.long
def test_two_ranks_have_less_variance_than_one(monkeypatch) -> None:
    """With the same total batch, by 4 standard errors: 16% less here.

    Each rank's principal basis has fewer tokens to serve, and noise on different tokens does not add up.
    """
    one, two = (variance(ranks, monkeypatch) for ranks in ([0], [0, 1]))
    apart = (one.mean() - two.mean()) / ((one.var() + two.var()) / DRAWS).sqrt()
    assert two.mean() < 0.95 * one.mean()
    assert apart > 4


def test_ranks_draw_their_own(monkeypatch) -> None:
    """On the very same tokens the random bases differ, and the principal ones do not."""
    found = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model = build("llama")
        prac.compress(model, prac.PRESETS["paper"].replace(min_width=8))
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.estimators["x"])
    monkeypatch.undo()
    (a, b), r1 = (s.p_NR for s in found), found[0].r1
    torch.testing.assert_close(a[:, :r1] @ a[:, :r1].mT, b[:, :r1] @ b[:, :r1].mT, rtol=1e-3, atol=1e-4)
    assert (a[:, r1:] - b[:, r1:]).norm() > 0.5 * a[:, r1:].norm()


LOSSLESS = {
    "paper": prac.Config(
        linear=prac.Rank(1.0, 0.0), norm=prac.Rank(1.0, 0.0), activation=prac.Rank(1.0, 0.0), min_width=1
    ),
    "lean": prac.Config(
        linear=prac.Bits(32), norm=prac.Bits(32), activation=prac.Bits(32), group=prac.Bits(32), min_width=1
    ),
}


def _every_layer_sharded(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for config in LOSSLESS.values():
        model = build("llama").train()
        plain = copy.deepcopy(model)
        handle = prac.compress(model, config)
        for module in reversed(list(model.modules())):
            if isinstance(module, Compressed):  # also those that others run, or that run others
                fully_shard(module)
        fully_shard(model)
        monitor = prac.Monitor(handle)
        with monitor:
            model(input_ids=IDS, labels=IDS).loss.backward()
        plain(input_ids=IDS, labels=IDS).loss.backward()
        for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.to_local().numel() < expected.numel()
            torch.testing.assert_close(p.grad.full_tensor(), expected.grad, rtol=1e-3, atol=1e-6)
        variances = [layer.gradient_variance for layer in monitor.history[0].layers if layer.kind in ("linear", "norm")]
        assert max(variances) < 1e-9  # and none is missing
    leave()


def test_fsdp2_of_every_single_layer(tmp_path) -> None:
    torch.multiprocessing.spawn(_every_layer_sharded, (str(tmp_path),), nprocs=2)
