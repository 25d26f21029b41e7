"""In any process prac does the same: defaults, locales, threads, warnings as errors; and bad arguments are told."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from models import BATCH, IDS, Block, N, build
from torch import nn

import prac
from prac.layers import Compressed

X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    expected = prac.compress(build("llama"), "lean").summary()
    torch.set_default_dtype(dtype)
    try:
        model = build("llama")
        handle = prac.compress(model, "lean")
        model(**BATCH).loss.backward()
    finally:
        torch.set_default_dtype(before)
    kinds = [line.split()[:2] for line in handle.summary().splitlines()]
    assert kinds == [line.split()[:2] for line in expected.splitlines()]


def test_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    with torch.inference_mode():
        handle = prac.compress(model, "lean")
    torch.use_deterministic_algorithms(True)
    try:
        model(**BATCH).loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert handle.summary().count("x̂") > 1

    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert handle.summary().isascii()


def test_threads_that_bring_the_first_batch_together() -> None:
    model = nn.Sequential(Block(), Block()).train()
    prac.compress(model, "lean", include="*")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            model(X).sum().backward()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and any(isinstance(m, Compressed) for m in model.modules())


def test_resuming_before_the_first_batch() -> None:
    config = prac.PRESETS["paper"].replace(min_width=8, growth=0.0)

    def made() -> tuple[nn.Module, prac.Handle]:
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block()).train()
        return model, prac.compress(model, config, include="*")

    model, handle = made()
    model(X).sum().backward()
    handle.tick()
    state = handle.state_dict()
    twin, resumed = made()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["shared"] == state["shared"] and resumed.step == 1
    twin(X).sum().backward()
    for name, subspace in state["subspaces"].items():
        assert torch.equal(resumed.state_dict()["subspaces"][name]["p"], subspace["p"])
    with pytest.raises(ValueError, match="no state of prac"):
        handle.load_state_dict({})


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: prac.compress({}), "takes a model"),
        (lambda: prac.compress(Block(), {"linear": 1}), "config must be"),
        (lambda: prac.compress(Block(), example=5), "a batch is a tensor"),
    ],
)
def test_what_is_no_model_config_or_batch(call: Any, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        call()


def test_ordinary_training_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("llama", "gpt2", "bert", "vit", "plain"):
            model = build(family)
            prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
            if family == "plain":
                model(IDS).sum().backward()
