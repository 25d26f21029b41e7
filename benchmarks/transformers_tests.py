r"""transformers' own tests of its models, with every model compressed (exactly) as it is put in training mode.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    pip install httpx parameterized pytest-env timeout-decorator    # what the tests import
    python benchmarks/transformers_tests.py --source transformers
    python benchmarks/transformers_tests.py --source transformers --models llama t5 -- -k training
    python benchmarks/transformers_tests.py --source transformers --json /tmp/tests.json

Each file runs in a process of its own, without prac and with it (`compressed_training.py`): 32 bits everywhere, so that
gradients are exact. Tests that need a network fail both ways. Tests marked slow are skipped unless RUN_SLOW says
otherwise. Where the checkout has its own `src`, those are the transformers that are tested. Options after `--` go to
pytest. Ends with 1 if a test passes without prac and fails with it, or a file could not be run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prac.lab.report import results

HERE = Path(__file__).resolve().parent
MODELS = ("llama", "gpt2", "bert", "bart", "t5", "vit", "gemma2", "mixtral")
OUTCOMES = ("passed", "failed", "skipped")
Lines = dict[str, results.Row]


def outcomes(source: Path, model: str, compressed: bool, more: list[str], limit: float) -> tuple[Lines, str]:
    """What each test of a model's file did, by name, and why there are fewer than there should be ("" if all ran)."""
    own = source / "src"
    paths = [HERE, HERE.parent / "src", *([own] if (own / "transformers" / "__init__.py").exists() else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        file = f"tests/models/{model}/test_modeling_{model}.py"
        command = [sys.executable, "-m", "pytest", "-p", "compressed_training", "--outcomes", str(out), "-q", file]
        command += [*(["--compressed"] if compressed else []), *more]
        why = ""
        try:
            ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=limit)
            if ended.returncode not in (0, 1):  # pytest's own for all passed, some failed
                why = f"pytest ended with {ended.returncode}: {(ended.stdout + ended.stderr).strip()[-500:]}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:,.0f} s"
        return {line["test"]: line for line in results.read_lines(out)}, why


def version_of(source: Path) -> str:
    """Which transformers a checkout is of, by its setup.py; "unknown" without."""
    setup = source / "setup.py"
    found = re.search(r"""^\s*version=["']([^"']+)""", setup.read_text(), re.MULTILINE) if setup.exists() else None
    return found[1] if found else "unknown"


def compared(model: str, plain: tuple[Lines, str], ours: tuple[Lines, str]) -> results.Row:
    """Counts of both ways, and the tests that pass without prac and do not with it."""
    (before, why), (after, why_ours) = plain, ours
    row: results.Row = {"model": model, "stopped": why, "stopped_with_prac": why_ours}
    for name, lines in (("plain", before), ("prac", after)):
        row[name] = {each: sum(line["outcome"] == each for line in lines.values()) for each in OUTCOMES}
    row["with_compressed_models"] = sum(line["compressed"] > 0 for line in after.values())
    passed = [test for test, line in before.items() if line["outcome"] == "passed"]
    row["broken"] = {t: after[t]["error"] for t in passed if t in after and after[t]["outcome"] != "passed"}
    row["not_reached"] = [test for test in passed if test not in after]
    return row


def told(row: results.Row) -> str:
    """What is wrong, a line each."""
    lines = [f"broken: {test}: {error}" for test, error in row["broken"].items()]
    lines += [
        f"{way} prac: {row[key]}" for way, key in (("without", "stopped"), ("with", "stopped_with_prac")) if row[key]
    ]
    return "".join(f"\n    {line}" for line in lines)


def table(rows: list[results.Row]) -> Table:
    """A line for each model."""
    shown = Table(title="passed / failed / skipped")
    for heading in ("model", "without prac", "with prac", "compressed in", "broken", "not reached"):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        counts = [" / ".join(str(row[way][each]) for each in OUTCOMES) for way in ("plain", "prac")]
        rest = (row["with_compressed_models"], len(row["broken"]), len(row["not_reached"]))
        shown.add_row(row["model"], *counts, *map(str, rest))
    return shown


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", type=Path, required=True, help="a checkout of transformers, for its tests")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help=f"of tests/models (default: {' '.join(MODELS)})"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one file one way (default: 1800)")
    parser.add_argument("--workers", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "transformers_tests.json", help="rows go here")
    parser.add_argument("more", nargs="*", help="for pytest, after --")
    arguments = parser.parse_args(argv)
    for model in arguments.models:
        file = arguments.source / "tests" / "models" / model / f"test_modeling_{model}.py"
        if not file.exists():
            parser.error(f"{file} is not there: --source must be a checkout of transformers with its tests.")
    return arguments


def main() -> int:
    arguments = parsed()
    console = Console()

    def run(model: str) -> results.Row:
        both = [
            outcomes(arguments.source.resolve(), model, compressed, arguments.more, arguments.timeout)
            for compressed in (False, True)
        ]
        row = compared(model, *both) | {"tests_of_transformers": version_of(arguments.source)}
        console.print(
            f"{model}: {sum(row['prac'].values())} tests{told(row)}", markup=False, highlight=False, soft_wrap=True
        )
        return row

    with ThreadPoolExecutor(arguments.workers) as pool:
        rows = list(pool.map(run, arguments.models))
    results.write(arguments.json, "benchmarks/transformers_tests.py", rows)
    console.print(table(rows))
    wrong = ("broken", "not_reached", "stopped", "stopped_with_prac")
    return int(any(row[each] for row in rows for each in wrong))


if __name__ == "__main__":
    raise SystemExit(main())
