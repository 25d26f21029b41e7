"""Print what was measured on a GPU as tables of plain text.

    python benchmarks/gpu/show.py                                  # the committed results
    python benchmarks/gpu/show.py runs/gpu/block.json h100/*.json  # any of the files that run.py writes

A table for each file and each device, torch and shape in it; `–` is what was not measured. A row without numbers says
why, and so does one that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prac.lab.report import results
from prac.runtime.text import aligned, printable

Row = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results" / "gpu"


def number(key: str, digits: int, per: float = 1.0) -> Callable[[Row], str]:
    """A column of numbers."""
    return lambda row: f"{row[key] / per:,.{digits}f}" if row.get(key) is not None else "–"


def error(key: str) -> Callable[[Row], str]:
    """A column of relative errors, of three digits."""
    return lambda row: f"{row[key]:.3g}" if row.get(key) is not None else "–"


def quartiles(row: Row) -> str:
    return "–".join(f"{value:.2f}" for value in row["time_spread"]) if row.get("time_spread") else "–"


def note(row: Row) -> str:
    """Why there are no numbers, and what else there is to say."""
    outcome = "" if row["outcome"] == "measured" else f"{row['outcome']}: {row['reason']}"
    flash = "flash" if row["setting"].get("attention") == "flash" else ""
    said = "; ".join(part for part in (flash, outcome, row.get("note", "")) if part)
    return said if len(said) <= 90 else said[:89] + "…"


def losses(row: Row) -> str:
    return " ".join(f"{loss:.3f}" for _, loss in row.get("validation", [])) or "–"


def failures(row: Row) -> str:
    return str(len(row["failed"])) if "failed" in row else "–"


BLOCK: dict[str, Callable[[Row], str]] = {
    "row": lambda row: row["name"],
    "ms": number("time_ms", 2),
    "× plain": number("time_ratio", 3),
    "quartiles": quartiles,
    "kept, units": number("kept_units", 2),
    "held, MiB": number("held_bytes", 0, 2**20),
    "peak, MiB": number("peak_bytes", 0, 2**20),
    "of dX": error("input_grad_error"),
    "of dW": error("weight_grad_error"),
    "note": note,
}
LOSS: dict[str, Callable[[Row], str]] = {
    "row": lambda row: row["name"],
    "losses on unseen text": losses,
    "s": number("seconds", 1),
    "peak, GiB": number("peak_gib", 1),
    "note": note,
}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "tests": {
        "row": lambda row: row["name"],
        "passed": number("passed", 0),
        "failed": failures,
        "skipped": number("skipped", 0),
        "note": note,
    },
    "block": BLOCK,
    "block4096": BLOCK,
    "models": {
        "row": lambda row: row["name"],
        "ms": number("ms", 1),
        "peak, GiB": number("peak_gib", 1),
        "held, GiB": number("held_gib", 1),
        "first, s": number("first_s", 1),
        "loss": number("loss", 4),
        "note": note,
    },
    "loss": LOSS,
    "rates": LOSS,
    "pretraining": LOSS | {"refreshes": number("refreshes", 0), "they took, s": number("refresh_s", 2)},
    "stall": LOSS,
}
LEFT = {"row", "note", "losses on unseen text"}


def what(stage: str, row: Row) -> str:
    """What the rows of one table have in common, for the line above it."""
    setting: Row = row["setting"]
    said = [f"{stage}: {row['device']}, torch {row['torch']}"]
    if stage == "models":
        said.append(f"{setting['model']} at {setting['sequences']} × {setting['sequence_length']}, {setting['dtype']}")
    elif stage.startswith("block"):
        said.append(f"width {setting['hidden']}, MLP {setting['intermediate']}, {setting['tokens']:,} tokens in "
                    f"sequences of {setting['sequence_length']}, {setting['dtype']}")  # fmt: skip
    elif "text" in setting:
        said += [setting["model"]] if "model" in setting else []
        said.append(f"{setting['text']}, {setting['steps']} steps, validation every {setting['validation_every']}")
    return "; ".join(said)


def table(stage: str, rows: list[Row]) -> list[str]:
    """The lines of a stage's tables.

    Raises:
        ValueError: for a stage that there is not.
    """
    if stage not in COLUMNS:
        raise ValueError(f"there is no stage {stage!r}: the name of a file is one of {', '.join(COLUMNS)}.")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(what(stage, row), []).append(row)
    columns, lines = COLUMNS[stage], []
    right = {i for i, name in enumerate(columns) if name not in LEFT}
    for heading, group in groups.items():
        cells = [list(columns), *([cell(row) for cell in columns.values()] for row in group)]
        lines += [heading, "", *aligned(cells, right), ""]
    return [printable(line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="(default: those in benchmarks/results/gpu)")
    files = parser.parse_args().files or [path for stage in COLUMNS if (path := RESULTS / f"{stage}.json").exists()]
    try:
        for path in files:
            print("\n".join(table(path.stem, results.read(path)["rows"])))
    except (ValueError, OSError, KeyError) as wrong:
        parser.error(str(wrong) if not isinstance(wrong, KeyError) else f"{path} has rows without {wrong}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
