"""What training keeps in memory."""

from prac.memory.measure import KeptBytes, track_kept

__all__ = ["KeptBytes", "track_kept"]
