"""The estimator that decomposes each activation as it comes: LoRAct's.

    X ≈ B Qᵀ,   Q orthonormal (n × r),   B = X Q (M × r)

Q spans what is had from a few of X's own columns, those with indices S drawn without replacement, by passing them
through XᵀX: Q = orth((XᵀX)ᵗ Xᵀ X_S), t power iterations. Taking columns of X for random combinations of them is what
LoRAct adds to RSVD: no random matrix is drawn and, X being of low rank, the start lies in its range already. Where
tokens are fewer than features the same is done to Xᵀ, and Q belongs to the tokens.

The error is that of a rank-r projection: ‖X − X̃‖² is at least Σ_{i>r} σ_i², which t → ∞ reaches. Where σ_i falls as
1/i, t = 0, 1, 2 are some 30%, 8% and 4% above it (RSVD: 150%, 15%, 5%; the tests hold bounds). It is a bias: nothing
makes up for what is outside of Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prac.config import Factors
from prac.estimators.base import Estimator, Form, Kept
from prac.estimators.clock import Clock
from prac.estimators.codes import Tensors
from prac.optim.factored import FactoredGradient


@dataclass(frozen=True)
class Decomposition(Form):
    """The form of ``left_MR @ right_NR.T``."""

    factored: bool

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """X̃, (M, n)."""
        left_MR, right_NR = tensors
        return left_MR @ right_NR.mT

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """``dyᵀ X̃`` = (dyᵀ B) Qᵀ, (O, n): in these factors, or multiplied out."""
        left_MR, right_NR = (t.to(dy_MO.dtype) for t in tensors)
        coefficients_OR = dy_MO.mT @ left_MR
        return FactoredGradient(coefficients_OR, right_NR) if self.factored else coefficients_OR @ right_NR.mT


class Decomposed(Estimator):
    """Keeps the two factors, made anew from every tensor.

    Args:
        factors: the rank, the power iterations, and where they start from.
        factored: leave weight gradients in factors.
        width: n, features of x; None takes it from the first one seen.
        clock, name, seed: as for :class:`prac.estimators.base.Estimator`.

    Raises:
        ValueError: if the rank does not fit the width.
    """

    def __init__(
        self,
        factors: Factors,
        clock: Clock,
        *,
        factored: bool = False,
        width: int | None = None,
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(clock, name=name, seed=seed)
        self.factors, self.factored, self.width = factors, factored, width
        self.rank = 0 if width is None else factors.resolve(width, name)

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """The factors of (M, n). The rank is at most M: so few tokens are kept in full."""
        self.width = x_MN.shape[1]
        self.rank = self.factors.resolve(self.width, self.name)
        x_MN = x_MN.to(dtype)
        if x_MN.shape[0] >= x_MN.shape[1]:
            right_NR = self._basis(x_MN)
            left_MR = x_MN @ right_NR
        else:
            left_MR = self._basis(x_MN.mT)
            right_NR = x_MN.mT @ left_MR
        return Kept((left_MR, right_NR), Decomposition(self.factored))

    def _basis(self, x_TS: Tensor) -> Tensor:
        """An orthonormal basis (S, r) of about the leading right singular vectors of a tall matrix (T, S)."""
        generator = self.next_generator(x_TS.device)
        tall, short = x_TS.shape
        rank, work = min(self.rank, short), torch.promote_types(x_TS.dtype, torch.float32)
        if self.factors.sketch == "sampled":
            chosen_R = torch.randperm(short, generator=generator, device=x_TS.device)[:rank]
            start_TR = x_TS[:, chosen_R]
        else:
            start_TR = torch.randn(tall, rank, generator=generator, device=x_TS.device, dtype=work).to(x_TS.dtype)
        for _ in range(self.factors.iterations):
            # Divided by √T, as products of half-precision numbers over many tokens overflow.
            start_TR = x_TS @ torch.linalg.qr((x_TS.mT / tall**0.5 @ start_TR).to(work)).Q.to(x_TS.dtype)
        return torch.linalg.qr((x_TS.mT / tall**0.5 @ start_TR).to(work)).Q.to(x_TS.dtype)

    def label(self) -> str:
        """``rank r of n, every step``."""
        return f"rank {self.rank} of {self.width}, every step"

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a row of B; Q, n × r numbers however many tokens there are, comes on top."""
        return self.rank * itemsize
