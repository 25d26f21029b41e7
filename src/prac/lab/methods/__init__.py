"""What is compared: prac's presets, other methods, optimizers, each by a name."""

from prac.lab.methods.naming import CHOICES, COMPILED, MODIFIERS, PEERS, SUBSPACE, Method, names, parse

__all__ = ["CHOICES", "COMPILED", "MODIFIERS", "PEERS", "SUBSPACE", "Method", "names", "parse"]
