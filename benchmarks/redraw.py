"""Draw anew what committed JSON alone determines; nothing is measured.

    python benchmarks/redraw.py

`methods.py` does so for `results/compare.svg`; curves by step need their runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from prac.lab.report import plots, results

HERE = Path(__file__).parent
# The script that draws each of them.
PLOTS = {
    "adaptive": "adaptive", "frontier": "frontier", "gpu/models": "gpu_figure", "gpu/stall": "stall_figure",
    "paper/table1": "table1",
    "paper/table2": "table2", "paper/table4": "table4", "paper/tables3_6": "tables3_6",
}  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.path.append(str(HERE / "paper"))
    for name, script in PLOTS.items():
        path = HERE / "results" / name
        rows = results.read(path.with_suffix(".json"))["rows"]
        plots.save(
            path.with_suffix(".svg"),
            lambda script=script, rows=rows: importlib.import_module(script).draw(rows),
        )


if __name__ == "__main__":
    main()
