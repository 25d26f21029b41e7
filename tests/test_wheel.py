"""What `pip install prac-torch` brings: a wheel that works beside torch and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINS = """
import importlib.util, sys, torch, prac
from torch import nn
assert "site-packages" in prac.__file__, prac.__file__
for name in ("transformers", "numpy", "rich", "datasets"):
    assert importlib.util.find_spec(name) is None, name
torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, activation=nn.GELU(), batch_first=True), 2)
x = torch.randn(4, 16, 64)
handle = prac.compress(model, "small", example=x)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert handle.step == 20 and losses[-1] < losses[0] / 2, losses
print(sum(row.compressed for row in handle.rows()), "layers")
"""


def closure(name: str, found: dict[str, object]) -> dict[str, object]:
    """A distribution and those that it needs here, by name."""
    if name not in found:
        found[name] = distribution(name)
        for need in distribution(name).requires or ():
            if "extra ==" not in need and "platform_system" not in need:
                closure(re.split(r"[ ;<>=!~\[(]", need, maxsplit=1)[0], found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(copied(folder / "source"))], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def copied(folder: Path) -> Path:
    """The sources without what a build leaves beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in [n for n in listed if n.startswith("src/") or "/" not in n]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"prac/__init__.py", "prac/py.typed", "prac/lab/report/report.html.j2"} <= set(names)
    assert all(name.startswith(("prac/", "prac_torch-")) for name in names)
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "prac").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_it_trains_beside_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment, where torch and what it needs lie as links to those that are installed here."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    for each in closure("torch", {}).values():
        for name in {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link, target = site / name, Path(str(each.locate_file(name)))
            if target.exists() and not link.exists():
                link.symlink_to(target)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    ran = subprocess.run([str(python), "-I", "-c", TRAINS], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip().endswith("layers")
    command = tmp_path / "venv" / "bin" / "prac"
    said = subprocess.run([str(command), "train"], capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 2 and "is not installed: pip install 'prac-torch[lab]'" in said.stderr
    version = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("prac ")
