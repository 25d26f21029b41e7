"""The two bases of a PRAC subspace, principal directions and a random complement, and the projection on both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Up to this width `eigh` of the n × n Gram matrix takes under a second (on two CPU cores 0.1 s at
# n = 1024, 1.5 s at 2736), against hundreds of steps between refreshes. Its cost grows as n³
# and it parallelises badly; above, subspace iteration does the same work in a few large
# matrix products, and a warm start makes two of them enough.
EIGH_MAX_WIDTH = 2048
WARM_ITERATIONS, COLD_ITERATIONS = 2, 6
TOKENS_PER_SLICE = 8192


def gram_matrix(x_MN: Tensor) -> Tensor:
    """XᵀX (n × n) in float32 (float64 for float64 inputs), a slice of tokens at a time.

    Slices, because the float32 copy of a half-precision X is as large as what compression saves.
    """
    dtype = torch.promote_types(x_MN.dtype, torch.float32)
    gram_NN = torch.zeros(x_MN.shape[1], x_MN.shape[1], dtype=dtype, device=x_MN.device)
    for rows_MN in x_MN.split(TOKENS_PER_SLICE):
        rows_MN = rows_MN.to(dtype)
        gram_NN.addmm_(rows_MN.mT, rows_MN)
    return gram_NN


def principal_basis(
    gram_NN: Tensor, r1: int, *, start_NR: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Orthonormal basis (n × r1) of the top-r1 right singular subspace of X, from XᵀX.

    The Gram matrix stands for X because tokens outnumber features. Squaring makes directions
    whose singular value is below about √eps · σ_max indistinguishable, but what counts here is
    captured energy, and that is off by at most about r1 · eps · ‖X‖²: nothing. The basis itself
    is orthonormal to working precision either way.

    For n > :data:`EIGH_MAX_WIDTH` this is subspace iteration from ``start_NR`` (the previous
    basis) or from a random start. Directions with nearly equal singular values around the
    cut converge slowly and may be exchanged; the energy missed is then of the size of their
    difference, which is small for the same reason (the tests bound it by 2% of the tail).
    """
    n = gram_NN.shape[0]
    if n <= EIGH_MAX_WIDTH:
        return torch.linalg.eigh(gram_NN).eigenvectors[:, n - r1 :].flip(-1)
    if start_NR is None:
        q_NR, iterations = _gaussian(n, r1, gram_NN, generator), COLD_ITERATIONS
    else:
        q_NR, iterations = start_NR.to(gram_NN), WARM_ITERATIONS
    for _ in range(iterations):
        q_NR = torch.linalg.qr(gram_NN @ q_NR).Q
    return q_NR


def random_complement(
    q1_NR: Tensor, r2: int, *, generator: torch.Generator | None = None, orthonormal: bool = True
) -> Tensor:
    """Orthonormal basis (n × r2) of (I − Q1 Q1ᵀ) S with S i.i.d. Gaussian: equation (5); or that matrix itself.

    The projection is applied twice: once leaves a component along Q1 of the size of the
    rounding error over the distance of S to the complement ("twice is enough").
    """
    n = q1_NR.shape[0]
    s_NR = _gaussian(n, r2, q1_NR, generator)
    for _ in range(2):
        s_NR = s_NR - q1_NR @ (q1_NR.mT @ s_NR)
    return torch.linalg.qr(s_NR).Q if orthonormal else s_NR


def projection(
    q1_NR: Tensor, r2: int, k: float, *, generator: torch.Generator | None = None, orthonormal: bool = True
) -> Tensor:
    """P = [Q1, √k · Q2] (n × (r1 + r2)) of equation (6), for a new Q2."""
    q2_NR = random_complement(q1_NR, r2, generator=generator, orthonormal=orthonormal)
    return torch.cat([q1_NR, math.sqrt(k) * q2_NR], dim=1)


def _gaussian(n: int, r: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(n, r, dtype=like.dtype, device=like.device, generator=generator)
