"""Autograd functions, one file per op: exact outputs, gradients from compressed inputs."""

from prac.ops.elementwise import ACTIVATIONS, Activation, activation
from prac.ops.glu import glu
from prac.ops.linear import linear
from prac.ops.norm import layer_norm, rms_norm

__all__ = ["ACTIVATIONS", "Activation", "activation", "glu", "layer_norm", "linear", "rms_norm"]
