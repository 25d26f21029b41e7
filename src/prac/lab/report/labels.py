"""Names beside the points of a plot, nothing printed over anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SIZE = 8.5  # of the letters, in points
CLEAR = 2.0  # points between a name and all else
NEAR = 11.0  # points: a name further off than this has a line to its point
# Where a name is looked for around its point: as close as can be, to the right first.
DISTANCES = (8, 11, 16, 22, 30, 40, 55, 75, 100, 135, 180)
ANGLES = (0, 180, 90, 270, *(angle for angle in range(0, 360, 15) if angle % 90))
WORST = 100  # so many lines crossed are as bad as a name on another one, on a point, or off the axes


def name(axes: Axes, points: Mapping[str, tuple[float, float]], taken: Sequence[Path], radius: float = 5.0) -> None:
    """Write each name beside its point, as close as there is room, with a line to it where that is further off.

    Call it last: it fixes the figure's layout, since what is free depends on where everything else stands.

    Args:
        axes: with their points drawn, their limits and labels set.
        points: by name, in the data's coordinates.
        taken: lines that no name may stand on, in the data's coordinates.
        radius: of the points' markers, in points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes are drawn on one
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit, ink = figure.dpi / 72, axes.xaxis.label.get_color()
    centres = {each: axes.transData.transform(at) for each, at in points.items()}
    around = {each: _box(centre, 2 * radius * unit, 2 * radius * unit) for each, centre in centres.items()}
    lines, names = [axes.transData.transform_path(path) for path in taken], list[Bbox]()

    def neighbours(each: str) -> int:
        return sum(math.dist(centres[each], centre) < 50 * unit for centre in centres.values())

    def faults(each: str, box: Bbox, leader: Path | None) -> int:
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        over = sum(map(box.overlaps, (*names, *around.values())))
        crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
        # Points that lie on one another cannot be told apart by where a name is; among others nearness does, or a line.
        apart = [other for other in around.values() if not other.overlaps(around[each])]
        if leader is None:
            crossed += sum(_between(box, other) < _between(box, around[each]) + CLEAR * unit for other in apart)
        else:
            crossed += sum(leader.intersects_bbox(other, filled=False) for other in (*names, *apart))
        return WORST * (over + (not inside)) + crossed

    for each in sorted(points, key=neighbours, reverse=True):  # those in a crowd have the least choice
        arrow = {"arrowstyle": "-", "color": ink, "linewidth": 0.5, "shrinkA": 1, "shrinkB": radius - 1}
        text = axes.annotate(each, points[each], xytext=(0, 0), textcoords="offset points", ha="center", va="center",
                             fontsize=SIZE, zorder=4, arrowprops=arrow)  # fmt: skip
        extent = Text.get_window_extent(text)  # without the line to its point
        least = math.inf
        for distance, offset in _places(extent.width / unit, extent.height / unit):
            middle = centres[each] + unit * np.array(offset)
            box = _box(middle, extent.width + 2 * CLEAR * unit, extent.height + 2 * CLEAR * unit)
            leader = Path([centres[each], middle]) if distance > NEAR else None
            if (found := faults(each, box, leader)) < least:
                least, best = found, (offset, box, leader)
            if not found:
                break
        offset, box, leader = best
        text.set_position(offset)
        if leader is None and text.arrow_patch is not None:
            text.arrow_patch.set_visible(False)
        names.append(box)
        lines += [leader] if leader else []


def _places(width: float, height: float) -> Iterator[tuple[float, tuple[float, float]]]:
    """How far from its point a name of this size may stand, and where its middle then is, the nearest first."""
    for distance in DISTANCES:
        for angle in ANGLES:
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            yield distance, (x * distance + _sign(x) * width / 2, y * distance + _sign(y) * height / 2)


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-9 else int(math.copysign(1, value))


def _box(middle: Any, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)


def _between(one: Bbox, other: Bbox) -> float:
    """How far two boxes are apart."""
    return math.hypot(max(one.x0 - other.x1, other.x0 - one.x1, 0), max(one.y0 - other.y1, other.y0 - one.y1, 0))
