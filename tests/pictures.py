"""What a figure prints over something else, by the boxes that its renderer gives."""

from itertools import combinations

import numpy as np
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.path import Path
from matplotlib.text import Text

TOUCH = 0.5  # pixels that two boxes may share


def overprints(figure):
    """Texts over one another, cut off by the figure's edge, or, within axes and legends, over what is drawn there."""
    figure.draw_without_rendering()
    texts = [(text.get_text(), Text.get_window_extent(text).padded(-TOUCH)) for text in _written(figure)]
    found = [f"{a!r} over {b!r}" for (a, one), (b, other) in combinations(texts, 2) if one.overlaps(other)]
    paper = figure.bbox.padded(1)
    found += [f"{name!r} cut off" for name, box in texts if not (paper.contains(*box.min) and paper.contains(*box.max))]
    labels = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    legends = [legend for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)) if legend]
    over = [(text.get_text(), Text.get_window_extent(text).padded(-TOUCH)) for text in labels]
    over += [("legend", legend.get_window_extent()) for legend in legends]
    for axes in figure.axes:
        for mark in _drawn(axes):
            found += [f"{name!r} over a mark" for name, box in over if mark.intersects_bbox(box, filled=mark.closed)]
    return found


class Mark(Path):
    """A path, and whether it has an inside."""

    closed = False


def _marks(paths, closed=False):
    for path in paths:
        mark = Mark(path.vertices, path.codes)
        mark.closed = closed
        yield mark


def _written(figure):
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]


def _drawn(axes):
    """Lines, bars and points, in pixels."""
    for line in axes.lines:
        if line.get_linestyle() not in ("None", ""):
            yield from _marks([line.get_transform().transform_path(line.get_path())])
        if line.get_marker() not in ("None", "", None):
            yield from _points(line.get_transform().transform(line.get_xydata()), line.get_markersize(), axes)
    for patch in axes.patches:
        yield from _marks([patch.get_transform().transform_path(patch.get_path())], closed=True)
    for collection in axes.collections:
        if isinstance(collection, PathCollection):
            centres = collection.get_offset_transform().transform(collection.get_offsets())
            yield from _points(centres, collection.get_sizes().max() ** 0.5, axes)
        elif isinstance(collection, LineCollection):
            yield from _marks(
                collection.get_transform().transform_path(Path(each)) for each in collection.get_segments()
            )


def _points(centres, size, axes):
    radius = size / 2 * axes.figure.dpi / 72
    yield from _marks((Path.circle(centre, radius) for centre in np.asarray(centres)), closed=True)
