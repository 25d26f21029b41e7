"""How much memory training takes: predicted, and measured."""

from prac.memory.breakdown import Breakdown
from prac.memory.budget import Choice, Step, choose
from prac.memory.largest_batch import largest_batch, parse_budget
from prac.memory.measure import KeptBytes, measure, track_kept
from prac.memory.predict import predict

__all__ = [
    "Breakdown",
    "Choice",
    "KeptBytes",
    "Step",
    "choose",
    "largest_batch",
    "measure",
    "parse_budget",
    "predict",
    "track_kept",
]
