"""`benchmarks/gpu`: its modules, its command on toys, and a Liger of ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_scripts import FOLDER, OURS

LIGER = """
from transformers.models.llama import modeling_llama

def apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=True):
    {does}

class Norm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return 1.01 * super().forward(x)

def norm():
    modeling_llama.LlamaRMSNorm = Norm

def rotary():
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, *more, **others: (q, k)
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of the folder by name; none stays behind, and those of the tests that have its name come back."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = {name: sys.modules.pop(name) for name in OURS if name in sys.modules}
    yield importlib.import_module
    for name in OURS:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def run(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls the script in this process, on toys in a folder."""

    def call(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "--toy", "--out", str(tmp_path), *argv])
        return load("run").main()

    return call


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Liger of ours, which does as it is told."""
    folder = tmp_path / "somewhere"
    package = folder / "liger_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda does: (package / "transformers.py").write_text(LIGER.format(does=does))
