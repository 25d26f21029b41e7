"""Autograd functions, one file per op: exact outputs, gradients from compressed inputs."""

from prac.ops.cross_entropy import linear_cross_entropy
from prac.ops.elementwise import ACTIVATIONS, Activation, activation
from prac.ops.glu import glu
from prac.ops.linear import linear
from prac.ops.norm import layer_norm, rms_norm
from prac.ops.norm_mlp import norm_mlp
from prac.ops.recompute import recomputed, recomputed_product
from prac.ops.shared_norm import Norm, Normed, normalise

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Norm",
    "Normed",
    "activation",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "norm_mlp",
    "normalise",
    "recomputed",
    "recomputed_product",
    "rms_norm",
]
