"""Write the table of `README.md`: every experiment, the paper's number, ours, and what they amount to.

    python benchmarks/paper/summary.py

Everything is read from the JSON in `benchmarks/results/paper/`; what has not been run says so.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import common

from prac.lab.report import results
from prac.runtime import files

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Experiment:
    """A script, and what it reproduces; ``takes`` is on two cores, nothing trained before."""

    name: str
    title: str
    takes: str


EXPERIMENTS = (
    Experiment("figure2", "Figure 2: spectrum of an activation through training", "about 6 minutes"),
    Experiment("table1", "Table 1: bias and variance, measured", "about 10 minutes"),
    Experiment("table2", "Tables 2, 4, 9: memory, predicted", "4 minutes"),
    Experiment("table2_loss", "Table 2: loss", "about 35 minutes"),
    Experiment("tables3_6", "Tables 3 and 6: bytes by operation", "1 minute"),
    Experiment("figure3", "Figure 3: loss curves", "about 30 minutes"),
    Experiment("table4", "Table 4: time, and a larger batch", "4 minutes"),
    Experiment("figure4", "Figure 4: loss against size", "about 45 minutes"),
    Experiment("figure5", "Figure 5: PRAC, PAC, RAC", "about 35 minutes"),
    Experiment("table9", "Table 9, Figure 6: Muon and Adam-mini", "about 40 minutes"),
    Experiment("figure7", "Figure 7: the scale k", "about 35 minutes"),
)


def table(folder: Path, beside: Path = README.parent) -> str:
    """The Markdown table; links are relative to ``beside``."""
    lines = ["| experiment | command | takes | the paper | ours | what it amounts to | results |", "| --- " * 7 + "|"]
    for it in EXPERIMENTS:
        path = folder / f"{it.name}.json"
        found = results.read(path) if path.exists() else {}
        links = [
            f"[{kind}]({os.path.relpath(folder / f'{it.name}.{suffix}', beside)})"
            for kind, suffix in (("JSON", "json"), ("plot", "svg"))
            if (folder / f"{it.name}.{suffix}").exists()
        ]
        command = f"`{it.name}.py {found['arguments']}`" if found.get("arguments") else f"`{it.name}.py`"
        said = [found.get(key, "–") for key in ("paper", "ours")] + [found.get("sentence", "not run yet")]
        cells = [it.title, command, it.takes, *said, " ".join(links) or "–"]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def rewritten(page: str, made: str) -> str:
    """The page with the table between its two markers.

    Raises:
        ValueError: if it lacks one of them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, in this order.")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="the folder of the JSON files")
    arguments = parser.parse_args()
    files.write(README, rewritten(README.read_text(), table(arguments.results.resolve())))
    print(README)


if __name__ == "__main__":
    main()
