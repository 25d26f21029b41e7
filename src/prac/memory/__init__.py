"""How much memory training takes: predicted, and measured."""

from prac.memory.breakdown import Breakdown
from prac.memory.measure import KeptBytes, measure, track_kept
from prac.memory.predict import predict

__all__ = ["Breakdown", "KeptBytes", "measure", "predict", "track_kept"]
