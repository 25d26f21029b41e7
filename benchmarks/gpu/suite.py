"""What must hold before anything is measured: `tests/test_cuda.py`, the tests that need a GPU, by pytest."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rows import Job, Row

ROOT = Path(__file__).parent.parent.parent


def jobs(stage: str, toy: bool, flash: bool, tokens: str | None) -> list[Job]:
    """One row."""
    missing = "" if find_spec("pytest") else "pytest is not installed"
    file = "tests/test_cuda.py"
    return [Job(file, measure, {"file": file, "toy": toy}, 240, left_out=missing)]


def measure(setting: Row, device: str) -> Iterator[Row]:
    """How many passed, failed and were skipped.

    Raises:
        RuntimeError: if one failed, with its name.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", setting["file"]]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = [
        f"{case.get('name')}: {' '.join((found.get('message') or '').split())[:200]}"
        for case in cases
        if (found := next((part for part in case if part.tag in ("failure", "error")), None)) is not None
    ]
    passed = len(cases) - skipped - len(failed)
    yield {"passed": passed, "failed": failed, "skipped": skipped}
    if failed:
        print(ended.stdout[-10_000:], file=sys.stderr)
        raise RuntimeError(f"{len(failed)} of {len(cases)} tests failed, {failed[0]}")
    if ended.returncode:  # no tests at all, or not one that could be read
        raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}")
