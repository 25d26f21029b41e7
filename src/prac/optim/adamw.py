"""AdamW whose moments stay in the subspace of factored gradients: CompAct's, and random subspace optimisation's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from prac.optim.factored import FactoredGradient

AtRefresh = Literal["reproject", "reset"]


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss of a ``step(closure)``, with gradients on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class SubspaceAdamW(torch.optim.AdamW):
    """AdamW on the coefficients of factored gradients, and plain AdamW on all others.

    With G_R = dYᵀZ (o × r) the coefficients of a gradient in the basis P (n × r), both moments are o × r, and the
    weight moves by ``−lr · m̂ / (√v̂ + eps) · Pᵀ``. As P is scaled such that E[PPᵀ] = I, the entries of an update
    are as large as AdamW's own, so its learning rates carry over.

    What becomes of the moments when P changes:

    - ``"reproject"`` (CompAct: Shamshoum et al. 2025, here with the moments turned): with C = P⁺P′, m becomes m C. An
      entry of v becomes the mean of the old ones by the squares of C where the new direction lies in the old span, and
      the mean of its row for the part outside, about which nothing is known:
      ``v′_ij = Σ_l w_lj v_il + (1 − Σ_l w_lj) mean_l v_il``. It takes coordinates as uncorrelated, so it is an
      approximation; it is exact for P′ = P.
    - ``"reset"`` (RSO: Chen et al. 2025): both start anew, as does the bias correction. Training then is exactly RSO:
      the loss is minimised over B in W + B Pᵀ for as long as P stays, and B is merged. Here B is merged at every step,
      which is the same function, weights and moments, but for rounding where weights are in half precision.

    Is a step unbiased? A gradient step is, as the gradient is. A momentum in one and the same subspace is. Moments that
    were re-projected are not: the part of m outside the new span is lost, E[m′P′ᵀ] = (r/n) E[m Pᵀ] for a random P′. And
    Adam's quotient of two moments is not, whatever the moments are (nor is AdamW's of a noisy gradient).

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        at_refresh: see above.

    Raises:
        ValueError: for another ``at_refresh``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        at_refresh: AtRefresh = "reproject",
    ) -> None:
        if at_refresh not in ("reproject", "reset"):
            raise ValueError(f'at_refresh must be "reproject" or "reset", got {at_refresh!r}.')
        super().__init__(params, lr, betas, eps, weight_decay)
        self.at_refresh = at_refresh
        # Of each parameter the subspace that its moments are in: to know without looking that it is still the same.
        self._subspaces: dict[int, weakref.ref[Any]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = evaluated(closure)
        factored: list[tuple[Tensor, FactoredGradient]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(p.grad, FactoredGradient):
                    self._step_in_subspace(p, p.grad, group)
                    factored.append((p, p.grad))
                    p.grad = None
        try:
            super().step()
        finally:
            for p, gradient in factored:
                p.grad = gradient
        return loss

    def _step_in_subspace(self, p: Tensor, gradient: FactoredGradient, group: dict[str, Any]) -> None:
        g_OR = gradient.coefficients_OR
        state = self._moments(p, gradient)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        m_OR = state["exp_avg"].lerp_(g_OR, 1 - beta1)
        v_OR = state["exp_avg_sq"].mul_(beta2).addcmul_(g_OR, g_OR, value=1 - beta2)
        steps = float(state["step"])  # torch makes a tensor of it when it loads a state
        denominator_OR = (v_OR / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update_OR = m_OR / denominator_OR
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(gradient.expanded(update_OR), alpha=-group["lr"] / (1 - beta1**steps))

    def _moments(self, p: Tensor, gradient: FactoredGradient) -> dict[str, Any]:
        """The state of ``p``, in the subspace of ``gradient``."""
        state = self.state[p]
        basis_NR = gradient.basis_NR
        known = self._subspaces.get(id(p))
        if not state or "basis" not in state:
            self._start(state, gradient)
        elif known is None or known() is not gradient.subspace:
            same = state["basis"].shape == basis_NR.shape and torch.equal(state["basis"], basis_NR)
            if not same and self.at_refresh == "reset":
                self._start(state, gradient)
            elif not same:
                state |= _reprojected(state, basis_NR)
        self._subspaces[id(p)] = weakref.ref(gradient.subspace)
        return state

    @staticmethod
    def _start(state: dict[str, Any], gradient: FactoredGradient) -> None:
        zeros_OR = torch.zeros_like(gradient.coefficients_OR)
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = zeros_OR, zeros_OR.clone()
        state["basis"] = gradient.basis_NR


def _reprojected(state: dict[str, Any], basis_NR: Tensor) -> dict[str, Tensor]:
    """Both moments in a new basis."""
    m_OR, v_OR, old_NR = state["exp_avg"], state["exp_avg_sq"], state["basis"]
    wide = torch.promote_types(old_NR.dtype, torch.float32)
    old_NR, new_NR = old_NR.to(wide), basis_NR.to(wide)
    turn_RR = torch.linalg.solve(old_NR.mT @ old_NR, old_NR.mT @ new_NR)
    # Columns may have any length, and v grows with its square: what is mixed is v of unit directions.
    old_R, new_R = old_NR.square().sum(0), new_NR.square().sum(0)
    share_RR = turn_RR.square() * old_R.unsqueeze(1) / new_R
    unit_OR = v_OR.to(wide) / old_R
    outside_R = (1 - share_RR.sum(0)).clamp_min(0)
    v_OR = (unit_OR @ share_RR + unit_OR.mean(1, keepdim=True) * outside_R) * new_R
    m_OR = m_OR.to(wide) @ turn_RR
    dtype = state["exp_avg"].dtype
    return {"exp_avg": m_OR.to(dtype), "exp_avg_sq": v_OR.to(dtype), "basis": basis_NR}
