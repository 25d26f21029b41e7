"""`benchmarks/gpu` as tests call it: where it is, what it is made of, its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FOLDER, RESULTS = ROOT / "benchmarks" / "gpu", ROOT / "benchmarks" / "results" / "gpu"
OURS = ("block", "loss", "models", "pretraining", "rows", "run", "shapes", "show", "stall", "suite", "training")
STAGES = ("tests", "block", "block4096", "models", "loss", "rates", "pretraining", "stall")


def script(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Calls the script as people do."""
    command = [sys.executable, str(FOLDER / "run.py"), *argv]
    path = os.pathsep.join(filter(None, (env.pop("front", ""), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=300
    )


def rows(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The rows of a file by name; of the stage `models`, those of its first model."""
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads((folder / f"{stage}.json").read_text())["rows"]:
        found.setdefault(row["name"], row)
    return found
