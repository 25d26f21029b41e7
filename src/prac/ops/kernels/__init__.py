"""What the ops do element by element: plain functions, each run as one kernel (:mod:`prac.runtime.kernel`)."""

from prac.ops.kernels.gated import activated, activated_backward, gated, gated_backward
from prac.ops.kernels.norm import inner, norm_input_grad, norm_weight_grad, normalise, read_normalised

__all__ = [
    "activated",
    "activated_backward",
    "gated",
    "gated_backward",
    "inner",
    "norm_input_grad",
    "norm_weight_grad",
    "normalise",
    "read_normalised",
]
