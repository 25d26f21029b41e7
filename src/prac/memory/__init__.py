"""How much memory training takes: predicted, and measured."""

from prac.memory.breakdown import Breakdown
from prac.memory.fit import Fit, fit, largest_batch
from prac.memory.measure import KeptBytes, measure, track_kept
from prac.memory.predict import predict

__all__ = ["Breakdown", "Fit", "KeptBytes", "fit", "largest_batch", "measure", "predict", "track_kept"]
