"""The two bases of a PRAC subspace, principal directions and a random complement, and the projection on both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# On the CPU, up to this width, `eigh` of the n × n Gram matrix takes under a second (on two cores 0.1 s at n = 1024,
# 1.5 s at 2736) against hundreds of steps between refreshes. Its cost grows as n³ and it parallelises badly, on a GPU
# worst of all, where it waits for the host too. Subspace iteration does the same work in a few matrix products, and
# from the basis before it needs so few that it is faster from a width of some 256 on.
EIGH_MAX_WIDTH, EIGH_MAX_WIDTH_WARM = 2048, 256
WARM_ITERATIONS, COLD_ITERATIONS = 2, 10
TOKENS_PER_SLICE = MOST_TOKENS = 8192


def gram_matrix(x_MN: Tensor) -> Tensor:
    """XᵀX (n × n) in float32 (float64 for float64 inputs), a slice of tokens at a time.

    Slices, because the float32 copy of a half-precision X is as large as what compression saves. Of more than
    :data:`MOST_TOKENS` tokens, and 4n, every third is taken, or fifth, and so on, from all places of a sequence alike:
    directions that hold energy hold it in any thousands of tokens, and this product is most of what a refresh costs.
    """
    dtype = torch.promote_types(x_MN.dtype, torch.float32)
    gram_NN = torch.zeros(x_MN.shape[1], x_MN.shape[1], dtype=dtype, device=x_MN.device)
    x_MN = x_MN[:: _stride(x_MN.shape[0], max(MOST_TOKENS, 4 * x_MN.shape[1]))]
    for rows_MN in x_MN.split(TOKENS_PER_SLICE):
        rows_MN = rows_MN.to(dtype)
        gram_NN.addmm_(rows_MN.mT, rows_MN)
    return gram_NN


def _stride(tokens: int, enough: int) -> int:
    """Which leaves ``enough`` tokens, and has no factor in common with the length of sequences, whatever that is."""
    stride = max(1, tokens // enough)
    while math.gcd(stride, tokens) > 1:
        stride -= 1
    return stride


def principal_basis(
    gram_NN: Tensor,
    r1: int,
    *,
    start_NR: Tensor | None = None,
    is_stale: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthonormal basis (n × r1) of the top-r1 right singular subspace of X, from XᵀX.

    The Gram matrix stands for X because tokens outnumber features. Squaring makes directions
    whose singular value is below about √eps · σ_max indistinguishable, but what counts here is
    captured energy, and that is off by at most about r1 · eps · ‖X‖²: nothing. The basis itself
    is orthonormal to working precision either way.

    On a device, and for n > :data:`EIGH_MAX_WIDTH` (with ``start_NR``, the basis before, :data:`EIGH_MAX_WIDTH_WARM`)
    on the CPU, this is subspace iteration from ``start_NR`` or a random start, without waiting for the host; from a
    basis that ``is_stale`` it takes as long as from a random one. Directions with nearly equal singular values around
    the cut converge slowly and may be exchanged; the energy missed is then of the size of their difference, which is
    small for the same reason: below 0.5% of what the best basis captures (the tests bound it).
    """
    n, most = gram_NN.shape[0], EIGH_MAX_WIDTH if start_NR is None else EIGH_MAX_WIDTH_WARM
    if n <= most and gram_NN.device.type == "cpu":
        return torch.linalg.eigh(gram_NN).eigenvectors[:, n - r1 :].flip(-1)
    q_NR = _gaussian(n, r1, gram_NN, generator) if start_NR is None else start_NR.to(gram_NN)
    iterations = COLD_ITERATIONS if start_NR is None or is_stale else WARM_ITERATIONS
    for left in reversed(range(iterations)):
        q_NR = orthonormalise(gram_NN @ q_NR, generator, times=1 if left else 2)
    return q_NR


def orthonormalise(
    a_NR: Tensor, generator: torch.Generator | None = None, *, noise: float = 1e-6, times: int = 2
) -> Tensor:
    """An orthonormal basis (n × r) of the columns of ``a_NR``: shifted Cholesky-QR in float64, so many ``times``.

    Products and triangular solves alone, so nothing is asked of a device. Columns are scaled to length 1, and ``noise``
    of that length makes up for those that depend on others. The first time the Gram matrix is shifted by 1e-13 of its
    trace, so that it has a factor however they depend on each other (Fukaya et al., SIAM J. Sci. Comput. 42, 2020);
    what depends so much on others comes out shorter than 1, which is enough for a next iteration. After the second time
    the basis is orthonormal to float32's precision or better.
    """
    q_NR = a_NR.double()
    q_NR = q_NR / torch.linalg.vector_norm(q_NR, dim=0).clamp_min(1e-300)
    if noise:
        q_NR = q_NR + noise / math.sqrt(q_NR.shape[0]) * _gaussian(q_NR.shape[0], q_NR.shape[1], q_NR, generator)
    for time in range(times):
        gram_RR = q_NR.mT @ q_NR
        if time == 0:
            gram_RR.diagonal().add_(1e-13 * gram_RR.diagonal().sum())
        upper_RR = torch.linalg.cholesky_ex(gram_RR, upper=True).L
        q_NR = torch.linalg.solve_triangular(upper_RR, q_NR, upper=True, left=False)
    return q_NR.to(a_NR.dtype)


def random_complement(
    q1_NR: Tensor, r2: int, *, generator: torch.Generator | None = None, orthonormal: bool = True
) -> Tensor:
    """Orthonormal basis (n × r2) of (I − Q1 Q1ᵀ) S with S i.i.d. Gaussian: equation (5); or that matrix itself.

    The projection is applied twice: once leaves a component along Q1 of the size of the
    rounding error over the distance of S to the complement ("twice is enough").
    """
    s_NR = _gaussian(q1_NR.shape[0], r2, q1_NR, generator)
    for _ in range(2):
        s_NR = s_NR - q1_NR @ (q1_NR.mT @ s_NR)
    if not orthonormal:
        return s_NR
    return torch.linalg.qr(s_NR).Q if s_NR.device.type == "cpu" else orthonormalise(s_NR, noise=0)


def projection(
    q1_NR: Tensor, r2: int, k: float, *, generator: torch.Generator | None = None, orthonormal: bool = True
) -> Tensor:
    """P = [Q1, √k · Q2] (n × (r1 + r2)) of equation (6), for a new Q2."""
    q2_NR = random_complement(q1_NR, r2, generator=generator, orthonormal=orthonormal)
    return torch.cat([q1_NR, math.sqrt(k) * q2_NR], dim=1)


def _gaussian(n: int, r: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(n, r, dtype=like.dtype, device=like.device, generator=generator)
