"""`benchmarks/gpu` with a Liger that fails, or computes something else: rows say so, and no other row notices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_scripts import rows


def test_a_row_that_fails_is_a_row(run: Any, liger: Any, tmp_path: Path, capfd: Any) -> None:
    """By an error, by the end of its process, for want of memory: the others are measured all the same."""
    asked = ("--stage", "block", "--only", "liger", "plain")
    liger("raise RuntimeError('no kernel today')")
    assert run(*asked) == 1
    found = rows(tmp_path, "block")
    assert (found["liger"]["outcome"], found["liger"]["reason"]) == ("failed", "RuntimeError: liger: no kernel today")
    assert found["plain"]["outcome"] == "measured" and found["liger"]["made_by"]
    assert "liger: failed in" in capfd.readouterr().out
    assert run(*asked) == 1, "it is there, and it failed"
    liger("import os; os._exit(9)")
    assert run(*asked, "--again", "failed") == 1
    assert rows(tmp_path, "block")["liger"]["reason"] == "its process ended with 9"
    liger("import torch; raise torch.OutOfMemoryError('all 80 GiB are taken')")
    assert run(*asked, "--again", "failed") == 0, "what does not fit was to be found out"
    memory = rows(tmp_path, "block")["liger"]
    assert (memory["outcome"], memory["reason"]) == ("out of memory", "liger: all 80 GiB are taken")
    assert rows(tmp_path, "block")["plain"] == found["plain"]


@pytest.mark.parametrize("part", ["norm", "rotary"])
def test_liger_is_in_its_own_block_alone(run: Any, liger: Any, tmp_path: Path, part: str) -> None:
    """A part of this Liger computes something else: who runs it has other gradients, where it is recomputed too."""
    liger(f"{part}()")
    names = ("liger", "liger+checkpoint", "liger+lean", "checkpoint")
    assert run("--stage", "block", "--only", *names) == 0
    found = rows(tmp_path, "block")
    assert found["checkpoint"]["weight_grad_error"] == 0
    assert found["liger"]["weight_grad_error"] > 1e-3
    assert found["liger+checkpoint"]["weight_grad_error"] == pytest.approx(found["liger"]["weight_grad_error"])
    assert found["liger+checkpoint"]["kept_units"] == 1
    assert 1 < found["liger+lean"]["kept_units"] < found["liger"]["kept_units"]


def test_liger_is_in_its_own_models_alone(run: Any, liger: Any, tmp_path: Path) -> None:
    liger("norm()")
    assert run("--stage", "models", "--only", "liger", "liger+checkpoint", "checkpoint") == 0
    models = rows(tmp_path, "models")
    assert models["liger"]["first_loss"] == pytest.approx(models["liger+checkpoint"]["first_loss"])
    assert abs(models["liger"]["first_loss"] - models["checkpoint"]["first_loss"]) > 1e-5


def test_llama_is_as_before_without_liger(load: Any, liger: Any) -> None:
    """Else plain training, timed in turn with Liger's block, would be half Liger's."""
    from transformers.models.llama import modeling_llama

    liger("norm(); rotary()")
    before = dict(vars(modeling_llama))
    try:
        with pytest.raises(RuntimeError, match="on its way"), load("block").ligers_llama():
            assert modeling_llama.LlamaRMSNorm is not before["LlamaRMSNorm"]
            assert modeling_llama.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
            raise RuntimeError("on its way")
        assert dict(vars(modeling_llama)) == before
    finally:
        vars(modeling_llama).update(before)
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            del sys.modules[name]


def test_a_row_that_does_not_end_is_stopped(run: Any, liger: Any, tmp_path: Path) -> None:
    liger("import time; time.sleep(600)")
    assert run("--stage", "block", "--only", "liger", "--limit-s", "3") == 1
    row = rows(tmp_path, "block")["liger"]
    assert row["outcome"] == "stopped" and "not over after 3 s" in row["reason"] and row["wall_s"] < 60
