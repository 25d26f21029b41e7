"""Ranks and bits chosen by a budget of bytes: the least summed variance of weight gradients."""

from prac.allocation.allocate import Allocation, allocate

__all__ = ["Allocation", "allocate"]
