"""A pytest plugin: every model of transformers is compressed, exactly, as it is put in training mode or trained.

    pytest -p compressed_training --compressed --outcomes FILE …    # with this folder on PYTHONPATH

Without `--compressed` the tests run as they are. One line of JSON for each test goes to FILE as soon as the test has
ended, so that a run which is cut short has told what it found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prac
from prac.layers import Compressed

# Test models are narrower than what is worth compressing.
EXACT = prac.Config(**{kind: prac.Bits(32) for kind in ("linear", "norm", "activation", "group")}, min_width=1)
NOTHING = "nothing to compress"


@contextmanager
def compressed_when_trained(of_class: type[nn.Module]) -> Iterator[list[str]]:
    """Inside the block models of a class are compressed as they are put in training mode.

    That is at ``model.train()``, or at the first call for those that are made in training mode and stay there. Yields
    the names of the classes that were compressed.
    """
    original = nn.Module.train
    compressed: list[str] = []
    inside: list[nn.Module] = []  # `train` calls itself on a model's parts, and prac runs the model to look at it

    def compress(module: nn.Module) -> None:
        if inside or any(isinstance(part, Compressed) for part in module.modules()):
            return
        inside.append(module)
        try:
            prac.compress(module, EXACT)
        except ValueError as error:
            if NOTHING not in str(error):
                raise
        else:
            compressed.append(type(module).__name__)
        finally:
            inside.pop()

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        inside.append(module)
        try:
            original(module, mode)
        finally:
            inside.pop()
        if mode and isinstance(module, of_class):
            compress(module)
        return module

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.training and torch.is_grad_enabled():
            compress(module)
        return nn.Module.__call__(module, *args, **kwargs)

    nn.Module.train = train  # type: ignore[method-assign]
    of_class.__call__ = call  # type: ignore[method-assign]
    try:
        yield compressed
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
        del of_class.__call__


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    parser.addoption("--compressed", action="store_true", help="compress models as they are put in training mode")
    parser.addoption("--outcomes", type=Path, help="a line of JSON for each test goes here")


def pytest_configure(config: pytest.Config) -> None:
    """Note what tests do where somebody asks for it."""
    if config.getoption("outcomes"):
        config.pluginmanager.register(_Outcomes(config.getoption("outcomes"), config.getoption("compressed")))


class _Outcomes:
    """Writes ``{"test", "outcome", "compressed"}`` for each test: failed if any phase or subtest of it did."""

    def __init__(self, path: Path, compressed: bool) -> None:
        self.path, self.compress = path, compressed
        self.outcomes: list[str] = []
        self.error = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        from transformers import PreTrainedModel

        self.outcomes, self.error, models = [], "", []
        if self.compress:
            with compressed_when_trained(PreTrainedModel) as models:
                result = yield
        else:
            result = yield
        outcome = next((each for each in ("failed", "skipped") if each in self.outcomes), "passed")
        line = {"test": item.nodeid, "outcome": outcome, "compressed": len(models), "error": self.error}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of each phase, and of each subtest."""
        self.outcomes.append(report.outcome)
        if report.outcome == "failed" and not self.error:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
            self.error = text.splitlines()[0]
