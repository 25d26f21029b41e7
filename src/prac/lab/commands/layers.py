"""``prac layers``: what a run lost, layer by layer. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prac.monitoring.readings import Reading

EXAMPLES = """
examples:
  prac layers runs/demo/lean-seed0
      the layers that lose most, at the last reading of a run of `prac train`
  prac layers out/layers.jsonl --step 500 --top 100 --plot layers.svg
      another reading, of a file that a PracCallback or a prac.Monitor wrote; and a plot over time
"""


def add_parser(commands: Any) -> None:
    """Add ``layers`` to the subcommands."""
    parser = commands.add_parser(
        "layers",
        help="which layers of a run lose most",
        description="Show what each layer of a run kept and lost: a table, those that lose most first, and a plot.",
        epilog=EXAMPLES,
    )
    parser.add_argument("of", type=Path, metavar="PATH", help="a run folder, or a file of readings (JSON lines)")
    parser.add_argument("--step", type=int, metavar="N", help="the reading to show (default: the last)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many layers to show (default: 20)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a plot of all readings to this SVG file")
    parser.add_argument("--overwrite", action="store_true", help="replace the plot if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run ``prac layers``; returns 0."""
    from prac.lab.runs import run_folder
    from prac.monitoring import monitor
    from prac.runtime import files

    files.check_new(arguments.plot, arguments.overwrite)
    path = arguments.of / run_folder.LAYERS if arguments.of.is_dir() else arguments.of
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: give the folder of a compressed run of prac train, or the file that a "
            "PracCallback or a prac.Monitor was given as its path."
        )
    readings = monitor.read(path)
    print(_chosen(readings, arguments.step, path).table(arguments.top))
    if arguments.plot:
        from prac.lab.report import plots

        files.write(arguments.plot, plots.on_white(plots.layers(readings, "compression")))
        print(f"plot: {arguments.plot}")
    return 0


def _chosen(readings: list[Reading], step: int | None, path: Path) -> Reading:
    if not readings:
        raise ValueError(f"{path} is empty: nothing has been measured yet.")
    if step is None:
        return readings[-1]
    found = next((reading for reading in readings if reading.step == step), None)
    if found is None:
        steps = ", ".join(str(reading.step) for reading in readings)
        raise ValueError(f"{path} has no reading of step {step}; there are {steps}.")
    return found
