"""The plots that committed JSON determines: each can be drawn from it, and prints nothing over anything."""

import importlib
import sys
from pathlib import Path

import matplotlib
import pytest
from pictures import overprints

from prac.lab.report import plots, results

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PLOTS = {
    "adaptive": "adaptive", "frontier": "frontier", "gpu/models": "gpu_figure", "gpu/stall": "stall_figure",
    "paper/table1": "table1", "paper/table2": "table2", "paper/table4": "table4", "paper/tables3_6": "tables3_6",
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    """A script of the benchmarks by name; none stays behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "paper"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def draw(load, name):
    rows = results.read(BENCHMARKS / "results" / f"{name}.json")["rows"]
    with matplotlib.rc_context(plots.STYLE):
        return load(PLOTS[name]).draw(rows), rows


def test_these_are_all_that_are_drawn_anew(load):
    assert load("redraw").PLOTS == PLOTS


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_is_printed_over_anything(name, load):
    assert overprints(draw(load, name)[0]) == []


@pytest.mark.parametrize("name", ["adaptive", "frontier"])
def test_every_row_has_its_own_line_and_name(name, load):
    figure, rows = draw(load, name)
    first = figure.axes[0]
    places = [bar.lines[0].get_ydata()[0] for bar in first.containers]
    wanted = [row["loss_gap"] for row in rows if row.get("method") != "plain"]
    assert len(places) == len(set(places)) == len(wanted)
    assert sorted(bar.lines[0].get_xdata()[0] for bar in first.containers) == sorted(wanted)
    labels = {
        round(place): label.get_text() for place, label in zip(first.get_yticks(), first.get_yticklabels(), strict=True)
    }
    assert all(labels[round(place)] for place in places)


def test_labels_of_the_predictions_stand_at_their_bars(load):
    """And each is the height of its bar, the paper's beside ours, those without logits by themselves."""
    figure, rows = draw(load, "paper/table2")
    figure.draw_without_rendering()
    for axes in figure.axes:
        bars = [bar for group in axes.containers for bar in group]
        assert len(bars) == len(axes.texts)
        for bar, text in zip(bars, axes.texts, strict=True):
            box, place = bar.get_window_extent(), text.get_window_extent()
            assert text.get_text() == f"{bar.get_height():.1f}"
            assert box.x0 < (place.x0 + place.x1) / 2 < box.x1 and 0 <= place.y0 - box.y1 < 5
    above, below = ([group.get_label() for group in axes.containers] for axes in figure.axes)
    assert above == ["plain, the paper", "plain, predicted", "PRAC, the paper", "PRAC, predicted"]
    plain = [bar.get_height() for bar in figure.axes[1].containers[0]]
    assert below[0] == "plain training"
    assert plain == [
        row["peak_gb"] for row in rows if (row["table"], row["method"], row["loss"]) == ("", "plain", "chunked")
    ]
