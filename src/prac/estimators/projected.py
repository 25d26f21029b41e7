"""How Z = X P is read: the form of a tensor that is kept in a subspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prac.estimators.base import Form
from prac.estimators.codes import Tensors
from prac.optim.factored import FactoredGradient


@dataclass(frozen=True, eq=False)
class Projected(Form):
    """The form of Z = X P, itself kept as ``z`` says."""

    p_NR: Tensor
    z: Form
    factored: bool = False

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The estimate X̃ = Z Pᵀ, (M, n): equation (7)."""
        return self.z.reconstruct(tensors) @ self.p_NR.mT

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """The estimate dW = dYᵀ X̃ = (dYᵀ Z) Pᵀ, (O, n): two thin products, or the first of them; X̃ is never built."""
        p_NR = self.p_NR.to(dy_MO.dtype)
        coefficients_OR = self.z.weight_grad(dy_MO, tensors)
        if self.factored:
            return FactoredGradient(coefficients_OR, p_NR, subspace=self.p_NR)
        return coefficients_OR @ p_NR.mT
