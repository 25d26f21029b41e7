"""Every cell of the matrix, and the table that says so."""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import leave
from matrix import HERE, LOOPS, cells, takes_long
from training import SEVERAL, Cell

TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def marks(cell: Cell) -> Any:
    """Whether a test of it is left to ``make test-long``."""
    return pytest.mark.long if takes_long(cell) else ()


@pytest.mark.parametrize("cell", [pytest.param(c, marks=marks(c)) for c in cells(HERE)], ids=str)
def test_cell(cell: Cell) -> None:
    assert matrix.run(cell) == matrix.expected(cell)


def _cells(wrapper: str, loop: str, long: bool) -> list[Cell]:
    return [cell for cell in cells((wrapper,)) if cell.loop == loop and takes_long(cell) == long]


def _work(rank: int, folder: str, wrapper: str, loop: str, long: bool) -> None:
    """One of two processes: all these cells, one after the other."""
    for cell in _cells(wrapper, loop, long):
        if loop != "Trainer":
            matrix.reference(cell)  # while this is the only process
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # for those who ask; the file is what counts
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found, in_step = {}, True
    for cell in _cells(wrapper, loop, long):
        try:
            found[str(cell)] = matrix.run(cell)
        except Exception:
            found[str(cell)], in_step = traceback.format_exc(), False
            break
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    leave(in_step=in_step)


@pytest.mark.parametrize(
    ("wrapper", "loop", "long"),
    [
        pytest.param(*each, marks=marks(found[0]), id=f"{each[0]}, {each[1]}, {', '.join({c.dtype: 0 for c in found})}")
        for each in itertools.product(SEVERAL, LOOPS, (False, True))
        if (found := _cells(*each))
    ],
)
def test_two_processes(wrapper: str, loop: str, long: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, (str(tmp_path), wrapper, loop, long), nprocs=2)
    expected = {str(cell): matrix.expected(cell) for cell in _cells(wrapper, loop, long)}
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == expected, "\n".join(text for text in found.values() if "Traceback" in text)


def test_the_table_in_the_docs_is_of_these_cells() -> None:
    assert TABLE.read_text() == matrix.table(), "write it anew: python tests/test_matrix.py"


if __name__ == "__main__":
    TABLE.write_text(matrix.table())
    print(f"{TABLE}: {len(cells((*HERE, *SEVERAL)))} cells", file=sys.stderr)
