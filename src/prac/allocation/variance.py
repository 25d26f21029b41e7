"""How far weight gradients are off, in closed form: at every rank and split at once, and from rounding.

Linear layers read a tensor X (M × n) that is kept as X̃, so ``dW_i = dY_iᵀ X̃``. Stacked, D = dYᵀX (o × n) is exact and
what is off is ``dYᵀ (X̃ − X) Γ``, where Γ = diag(γ) is the scale of the norm whose x̂ is kept, or the identity.

**At a rank.** With A = I − Q1 Q1ᵀ it is ``D A (k Q2 Q2ᵀ − I) Γ``. Q2 spans a uniformly random r2 of the p = n − r1
dimensions that Q1 leaves, and the moments of its projection M = Q2 Q2ᵀ within them are (S symmetric, r = r2)

    E[M] = (r/p) I,      E[M S M] = (a + b) S + b tr(S) I,
    b = r (p − r) / (p (p − 1) (p + 2)),      a = (r² − 2 b p) / p²

so that, with S = A Γ² A,

    E‖off‖² = (k² (a + b) − 2 k r/p + 1) ‖D A Γ‖² + k² b tr(A Γ²) ‖D A‖²

exactly; without γ and for k = p/r this is Theorem 13's ``(k − 1) ‖D A‖²``. For the right singular vectors v_j of X all
three quantities are sums over j > r1. So XᵀX and DᵀD give the variance of every (r1, r2). It holds for any Q1, so XᵀX
may also be that of other tokens than D is of, as it is for a basis that is kept for some steps.

**From rounding** without bias a value between two codes that are a step s apart has the variance ``s² f (1 − f)``, f
being where it lies between them: s²/6 on average. Roundings are uncorrelated (:func:`prac.estimators.codes.dither`), so

    E‖off‖² = Σ_m ‖dy_m‖² Σ_j γ_j² s_mj² f_mj (1 − f_mj)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.bases import TOKENS_PER_SLICE
from prac.estimators.codes import Coding, layout, store, turned


class Tails(NamedTuple):
    """What is left behind the first r1 directions, for r1 = 0 … n; sums in float64, on the CPU."""

    basis_NN: Tensor  # the right singular vectors of X in its columns, those of large singular values first
    plain: Tensor  # ‖D A‖²
    scaled: Tensor  # ‖D A Γ‖²
    scale: Tensor  # tr(A Γ²)


def tails(gram_NN: Tensor, second_NN: Tensor, gamma_N: Tensor | None = None) -> Tails:
    """From XᵀX and DᵀD, (n, n), and γ, (n,).

    Takes an ``eigh`` of an n × n matrix: a second or two at n = 2048, growing as n³.
    """
    n = gram_NN.shape[0]
    basis_NN = torch.linalg.eigh(gram_NN).eigenvectors.flip(-1)
    seen_NN = basis_NN.mT @ second_NN.to(basis_NN) @ basis_NN
    plain = _from_behind(seen_NN.diagonal())
    if gamma_N is None:
        return Tails(basis_NN, plain, plain, torch.arange(n, -1, -1, dtype=torch.float64))
    square_N1 = gamma_N.to(basis_NN).square().unsqueeze(1)
    # ‖D A Γ‖² = Σ_{j, l > r1} ⟨D v_j, D v_l⟩ ⟨Γ v_j, Γ v_l⟩: what each j adds to the square behind it.
    products_NN = seen_NN * (basis_NN.mT @ (square_N1 * basis_NN))
    added = products_NN.diagonal() + 2 * products_NN.triu(1).sum(1)
    return Tails(basis_NN, plain, _from_behind(added), _from_behind((square_N1 * basis_NN.square()).sum(0)))


def _from_behind(values_N: Tensor) -> Tensor:
    """Sums of the values from each on, n + 1 of them, the last 0."""
    values = torch.nn.functional.pad(values_N.cpu().double(), (0, 1))
    return values.flip(0).cumsum(0).flip(0).clamp_min(0)


def of_rank(tails: Tails, r1: int | Tensor, r2: int | Tensor, k: float = 1.0) -> Tensor:
    """E‖off‖² with r1 principal and r2 random directions, and k in units of the unbiased one; float64.

    Exact for the X and D that were summed. For another batch it is as good as their XᵀX and DᵀD are for that one's. For
    r2 = 0 (PAC), or k other than 1, it is the squared error, bias and variance together.
    """
    n = len(tails.plain) - 1
    r1, r2 = torch.as_tensor(r1), torch.as_tensor(r2)
    p, r = (n - r1).clamp_min(1).double(), r2.double()
    b = r * (p - r) / (p * (p - 1).clamp_min(1) * (p + 2))
    a = (r.square() - 2 * b * p) / p.square()
    k0 = torch.where(r2 > 0, k * p / r.clamp_min(1), 0.0)
    own = k0.square() * (a + b) - 2 * k0 * r / p + 1
    return (own * tails.scaled[r1] + k0.square() * b * tails.scale[r1] * tails.plain[r1]).clamp_min(0)


def best_split(tails: Sequence[Tails], r: int, most: int) -> tuple[int, float]:
    """The r1 of a rank r = r1 + r2 with the least variance, at most ``most`` and with r2 > 0, and that variance.

    Of several ``tails`` the variances add up.
    """
    r1 = torch.arange(min(r - 1, most) + 1)
    variance = torch.stack([of_rank(each, r1, r - r1) for each in tails]).sum(0)
    best = int(variance.argmin())
    return best, variance[best].item()


def of_rounding(x_MN: Tensor, weight_M: Tensor, bits: Bits | None, square_N: Tensor | None = None) -> float:
    """E‖off‖² of rounding ``x_MN`` to ``bits``, exactly; in 16 bits, as if the directions of the errors were random.

    Args:
        x_MN: what is rounded.
        weight_M: ‖dy_m‖² of each token.
        bits: None loses nothing.
        square_N: what the variance of each feature counts, γ² or the squared length of a column of Γ P; None for 1.

    Raises:
        ValueError: for companded bits, whose error is a bias too.
    """
    if bits is None or bits.bits == 32:
        return 0.0
    if bits.compand:
        raise ValueError(f"companded codes are biased: of what weights read write Bits({bits.bits}), without compand.")
    total = torch.zeros((), dtype=torch.float64)
    for rows_MN, weights_M in zip(x_MN.split(TOKENS_PER_SLICE), weight_M.split(TOKENS_PER_SLICE), strict=True):
        variance_MN = _rounded(rows_MN, bits)
        square = variance_MN.sum(1) if square_N is None else variance_MN @ square_N.to(variance_MN)
        total += (square * weights_M.to(square)).sum().cpu().double()
    return total.item()


def _rounded(x_MN: Tensor, bits: Bits) -> Tensor:
    """The variance of every value, (M, n)."""
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    if bits.bits == 16:
        return (x_MN.to(wide) - store(x_MN, Coding(bits))[0].to(wide)).square()
    m, n = x_MN.shape
    group, width = layout(n, bits)
    if bits.rotate:  # what is rounded is turned: each feature has an equal part of its group's
        parts, step_M1G = turned(x_MN, bits)
        share_MRG = torch.cat(parts, dim=1).frac()
        variance_M1G = step_M1G.square() * (share_MRG * (1 - share_MRG)).mean(1, keepdim=True) / group
        return variance_M1G.expand_as(share_MRG).reshape(m, width)[:, :n]
    _, low_MG, step_MG = store(x_MN, Coding(bits))
    padded_MN = torch.nn.functional.pad(x_MN.to(wide), (0, width - n))
    step_MG1, low_MG1 = step_MG.to(wide).unsqueeze(-1), low_MG.to(wide).unsqueeze(-1)
    codes_MGS = (padded_MN.reshape(m, -1, group) - low_MG1) / step_MG1.masked_fill(step_MG1 == 0, 1.0)
    share_MGS = codes_MGS - codes_MGS.floor()
    return (step_MG1.square() * share_MGS * (1 - share_MGS)).reshape(m, width)[:, :n]
