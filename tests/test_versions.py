"""The versions that prac says it works with, and a process that takes every warning for an error."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent

STRICT = """
import torch
from torch import nn
import prac

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.RMSNorm(64), nn.Linear(64, 160), nn.SiLU(), nn.Linear(160, 64)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))

x = torch.randn(8, 256, 64)
for preset in ("paper", "lean"):
    model = nn.Sequential(Block(), Block())
    handle = prac.compress(model, prac.PRESETS[preset].replace(min_width=8), example=x)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.summary()
    handle.restore()
"""


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    """What 'make test-oldest' installs is where the ranges of pyproject.toml begin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line]
    oldest = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, pins)}
    for each in map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values())):
        (bound,) = each.specifier
        assert bound.operator == ">="
        assert oldest[each.name] in SpecifierSet(f"=={bound.version}.*"), each.name


def test_no_warning_comes_of_what_prac_calls() -> None:
    """From the import to a step with compiled kernels."""
    command = [sys.executable, "-W", "error", "-c", STRICT]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
