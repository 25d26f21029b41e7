"""One-shot subspaces: bases made once, of calibration batches."""

from __future__ import annotations

import pytest
import torch
from helpers import activations, captured

import prac
from prac.config import Rank
from prac.convert.calibrate import calibrate


@pytest.mark.parametrize("interval", [None, 3])
def test_calibration_makes_bases_of_all_batches(interval: int | None) -> None:
    """The top directions of the calibration batches together; with T1 = None they stay for good."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).double()
    config = prac.Config(linear=Rank(4, 0), norm=None, activation=None, T1=interval, T2=interval, min_width=8)
    handle = prac.compress(model, config, include="*")
    batches = [activations(40, 12, seed=seed, tail=3.0) for seed in range(3)]
    state = torch.get_rng_state()
    calibrate(handle, batches)
    assert torch.equal(state, torch.get_rng_state()) and model[0].weight.grad is None
    p = model[0].estimators["x"].p_NR
    together = torch.cat(batches)
    assert captured(together, p) == pytest.approx(torch.linalg.svdvals(together)[:4].square().sum().item(), rel=1e-9)
    assert captured(together, p) > captured(together, torch.linalg.svd(batches[0]).Vh[:4].T) * 1.001
    for _ in range(7):
        model(batches[0]).sum().backward()
        handle.tick()
    assert (model[0].estimators["x"].p_NR is p) == (interval is None)


def test_calibration_refuses() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    handle = prac.compress(model, prac.Config(linear=Rank(4, 0), T1=None, T2=None), include="*")
    with pytest.raises(ValueError, match="no batches"):
        calibrate(handle, [])
    x = torch.randn(40, 32)
    calibrate(handle, [x])
    with pytest.raises(ValueError, match="0: the calibration batches give NaN or Inf"):
        calibrate(handle, [x, torch.full_like(x, float("nan"))])
    handle.restore()
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(prac.compress(model, prac.Config(linear=prac.Bits(8)), include="*"), [x])
