"""What becomes of the numbers of a measured step: a table, scalars to log."""

from __future__ import annotations

import math

import pytest

from prac.monitoring.readings import LayerStats, Reading


def reading_of(step, *layers):
    return Reading(step, 1000, 4, tuple(LayerStats(*layer) for layer in layers))


READING = reading_of(
    3,
    ("a", "linear", "2+2 of 8", 100, 4, 0.25, 0.5),
    ("b", "norm", "8 bits", 50, 0, 2e-5, math.nan),
    ("c", "-", "", 0, 0, None, 0.7),
    ("d", "activation", "8 bits", 850, 0, 0.01, None),
)


def test_the_table_begins_with_what_loses_most():
    assert [layer.name for layer in READING.worst()] == ["b", "c", "a", "d"]
    lines = READING.table(top=3).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["b", "c", "a"]
    assert "2e-05" in lines[3]
    assert "nan" in lines[3]
    assert "and 1 layers more" in lines[-1]
    assert str(READING) == READING.table()


def test_scalars():
    found = READING.scalars()
    assert found["prac/kept_bytes"] == 1000.0
    assert found["prac/refreshes"] == 4.0
    assert found["prac/gradient_variance/a"] == 0.5
    assert found["prac/kept_bytes/d"] == 850.0
    assert "prac/kept_bytes/c" not in found
    assert "prac/gradient_variance/d" not in found
    assert found["prac/reconstruction_error"] == pytest.approx((0.25 + 2e-5 + 0.01) / 3)
    assert all(isinstance(value, float) for value in found.values())
