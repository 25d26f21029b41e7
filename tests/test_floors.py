"""How the house stands: each floor knows those under it alone, and nothing but the command line needs the lab."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "prac"
# From the top down. What no floor names (config, presets) says what a user says, and every floor may read it.
FLOORS = ("convert", "layers", "ops", "estimators", "optim", "runtime")
FREE = {"config", "presets"}


def imports(path: Path) -> Iterator[str]:
    """The modules of prac that a file imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "prac":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "prac")


def wings(path: Path) -> set[str]:
    """The folders (or files) of the package that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if "." in name}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_knows_those_under_it_alone(floor: str) -> None:
    allowed = {*FLOORS[FLOORS.index(floor) :], *FREE}
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    odd = {str(f.relative_to(PACKAGE)): found for f in files if (found := wings(f) - allowed)}
    # A budget is met by prediction, which compresses copies: the one arrow that goes round, inside of a function.
    assert odd == ({"convert/compress.py": {"memory"}} if floor == "convert" else {})


def test_nothing_of_the_core_needs_the_lab() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if "lab" not in f.relative_to(PACKAGE).parts and f.name != "__main__.py"]
    assert len(files) > 50
    assert [str(f.relative_to(PACKAGE)) for f in files if "lab" in wings(f)] == []


def test_the_root_is_what_a_user_says() -> None:
    assert {f.name for f in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "config.py", "presets.py"}


def test_no_file_is_long() -> None:
    assert {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 300} == {}


def test_nobody_asks_an_estimator_of_what_kind_it_is() -> None:
    """Outside of their own floor: ops and layers ask what it can do."""
    kinds = {
        node.name
        for path in (PACKAGE / "estimators").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") in ("Estimator", "Form") for b in node.bases)
    }
    assert {"Stored", "Subspace", "Decomposed", "Rounded", "Projected"} <= kinds
    others = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "estimators"]
    asked = {str(p.relative_to(PACKAGE)): sorted(found) for p in others if (found := asked_for(p) & kinds)}
    assert asked == {}


def asked_for(path: Path) -> set[str]:
    """The classes that a file asks ``isinstance`` for."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    asked = [c.args[1] for c in calls if getattr(c.func, "id", "") == "isinstance"]
    return {n.id for each in asked for n in ast.walk(each) if isinstance(n, ast.Name)}
