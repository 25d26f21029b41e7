"""The JSON contract of every command, and how rows are summed up over seeds."""

from __future__ import annotations

import json
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prac.runtime import files

Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on; a missing one is ``none``."""
    found = {"python": platform.python_version()}
    packages = {name: name for name in ("torch", "transformers", "accelerate", "datasets")} | {"prac": "prac-torch"}
    for name, package in packages.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def document(command: str, rows: list[Row]) -> dict[str, Any]:
    """``{"command", "versions", "rows"}``: what ``--json`` writes, for every command."""
    return {"command": command, "versions": versions(), "rows": rows}


def write(path: Path, command: str, rows: list[Row]) -> None:
    """Write :func:`document` to ``path``, whole or not at all."""
    files.write_json(path, document(command, rows))


def is_ours(path: Path) -> bool:
    """Whether there is no file yet, or one that :func:`write` wrote."""
    try:
        return not path.exists() or {"command", "versions", "rows"} <= set(read(path))
    except (ValueError, TypeError):
        return False


def read(path: Path) -> Any:
    """Plain data of a JSON file.

    Raises:
        ValueError: with the name of the file, if it was cut off or is something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): restore it from a copy, or delete it.") from error


def read_lines(path: Path) -> list[Row]:
    """The whole rows of :func:`prac.runtime.files.read_lines`; none if there is no such file."""
    return files.read_lines(path)[0] if path.exists() else []


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows, or whole runs, grouped by method, in the order in which the methods first appear."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["method"], []).append(row)
    return grouped


def baseline(rows: list[Row]) -> str | None:
    """The method that others are compared with: ``plain``, else the first of ``plain+…``, else none."""
    names = list(by_method(rows))
    return next((name for name in ("plain", *names) if name in names and name.split("+")[0] == "plain"), None)


def against_plain(rows: list[Row]) -> list[Row]:
    """The rows with ``time_ratio``: time per token over the baseline's with the same seed; None where there is none."""
    base = baseline(rows)
    plain = {row["seed"]: row["tokens_per_s"] for row in rows if row["method"] == base}
    return [
        row | {"time_ratio": plain[row["seed"]] / row["tokens_per_s"] if row["seed"] in plain else None} for row in rows
    ]


def validation(run: dict[str, Any]) -> dict[int, float]:
    """The validation losses of a whole run by step."""
    return {line["step"]: line["val_loss"] for line in run["metrics"] if "val_loss" in line}


def mean(rows: list[Row], key: str) -> float:
    """The mean of one column."""
    return statistics.fmean(row[key] for row in rows)


def summary(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# Student's t: 95% of the distribution with so many degrees of freedom lie within plus and minus this.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def t95(freedom: int) -> float:
    """The quantile for ``freedom`` degrees of freedom; infinite for none."""
    if freedom < 1:
        return float("inf")
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.6 / freedom


def half_width(values: list[float]) -> float:
    """Half of the 95% interval of the mean of independent repetitions (Student's); infinite for a single one."""
    return t95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
