"""Nothing in a figure is printed over anything else, however many methods it has and however close they lie."""

import random
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from matplotlib.figure import Figure
from pictures import overprints
from recorded import folder, measured

from prac.lab.report import labels, overview, page, plots, results
from prac.monitoring.readings import LayerStats, Reading

COMPARED = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "compare.json"
NAMES = [
    f"{a}{b}"
    for a in ("plain", "lean", "co-compression-rp", "paper")
    for b in ("", "+lora", "+muon", "+checkpoint2", "16")
]


@pytest.fixture
def drawn(monkeypatch):
    """The figure that a function draws, before it is SVG."""

    def draw(function, *arguments):
        figures = []
        for module in (overview, plots):
            monkeypatch.setattr(module, "svg", lambda figure: figures.append(figure) or "")
        function(*arguments)
        return figures.pop()

    return draw


def runs(tmp_path, names, seeds=(0,), scatter=0.03):
    """Runs whose methods end close together."""
    draw = random.Random(0)
    rows = [measured(name, seed, 5.3 + scatter * draw.random()) for name in names for seed in seeds]
    return [page.read_run(folder(tmp_path, row)) for row in rows]


def crowd(names, seed, spread):
    """Rows whose points lie within ``spread`` of plain's."""
    draw = random.Random(seed)
    return results.against_plain([
        measured(name, s, 5.3 + draw.random() / 20, tokens_per_s=1000 * (1 + spread * draw.random()),
                 peak_bytes=int(2e8 * (1 + spread * draw.random())))
        for name in names for s in (0, 1)
    ])  # fmt: skip


def test_the_committed_methods(drawn):
    assert overprints(drawn(overview.frontier, results.read(COMPARED)["rows"])) == []


@pytest.mark.parametrize("spread", [1.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_names_in_a_crowd(seed, spread, drawn):
    assert overprints(drawn(overview.frontier, crowd(NAMES[:14], seed, spread))) == []


def test_every_name_is_there_where_all_points_are_one(drawn):
    figure = drawn(overview.frontier, crowd(NAMES[:8], 0, 0.0))
    assert {text.get_text() for text in figure.axes[0].texts} == set(NAMES[:8])
    assert [each for each in overprints(figure) if each.startswith(tuple(map(repr, NAMES)))] == []


def test_a_name_is_nearest_to_its_own_point():
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    points = {"one": (1.0, 1.0), "another": (1.1, 1.0), "far": (2.0, 2.0)}
    axes.plot(*zip(*points.values(), strict=True), "o")
    labels.name(axes, points, [])
    figure.draw_without_rendering()
    for text in axes.texts:
        if text.arrow_patch.get_visible():
            continue
        box = matplotlib.text.Text.get_window_extent(text)
        away = {}
        for name, at in points.items():
            x, y = axes.transData.transform(at)
            away[name] = max(box.x0 - x, x - box.x1, 0) ** 2 + max(box.y0 - y, y - box.y1, 0) ** 2
        assert min(away, key=away.get) == text.get_text()


@pytest.mark.parametrize("count", [4, 20])
def test_differences_and_losses_by_step(count, drawn, tmp_path):
    found = runs(tmp_path, NAMES[:count])
    assert overprints(drawn(overview.gaps, found)) == []
    assert overprints(drawn(overview.kept, found)) == []
    assert overprints(drawn(plots.losses, found, 5.35)) == []


@pytest.mark.parametrize("names", [["plain"], ["plain", "paper", "lean"]])
def test_bars_and_legend_of_few_methods(names, drawn, tmp_path):
    found = runs(tmp_path, names)
    assert overprints(drawn(plots.kept, found)) == []
    assert overprints(drawn(plots.losses, found, found[0]["row"]["val_loss"])) == []  # the entropy on the last points


def test_spectra(drawn):
    falling = [1 / (1 + i) for i in range(50)]
    rows = [{"layer": "model.layers.2.mlp", "step": step, "singular_values": falling, "energy": falling[::-1]}
            for step in (26, 260)]  # fmt: skip
    found = [{"method": method, "spectra": rows} for method in ("plain", "paper", "lean")]
    assert overprints(drawn(plots.spectra, found)) == []


def test_layers(drawn):
    readings = [
        Reading(step, 0, 0, tuple(
            LayerStats(f"model.layers.{i}.self_attn.q_proj", "linear", "", 0, 0, 0.1 / (i + step), 0.2 / (i + step))
            for i in range(12)
        ))
        for step in (1, 30, 60)
    ]  # fmt: skip
    assert overprints(drawn(plots.layers, readings, "lean")) == []


def test_predicted_peaks(drawn):
    rows = [
        SimpleNamespace(loss=loss, optimizer="adamw", method=method, peak_gib=i + 1.0,
                        at_peak={kind: (i + 1) * 2**30 / len(plots.KINDS) for kind in plots.KINDS})
        for loss in ("plain", "chunked") for i, method in enumerate(("plain", "checkpoint", "lean+attention8", "small"))
    ]  # fmt: skip
    assert overprints(drawn(plots.footprint, rows)) == []
