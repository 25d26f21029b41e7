"""Algorithm 1 of the paper: dynamic activation compression by PRAC.

The projection of equation (6) is kept as one matrix

    P = [Q1, √k · Q2]   (n × r),      Z = X P   (M × r),      X̃ = Z Pᵀ   (M × n)

so that E[X̃] = X over the draw of Q2 (Theorem 6) and E‖X̃ − X‖² = (k − 1) ‖X − X Q1 Q1ᵀ‖²
(Theorem 7). r2 = 0 gives PAC, r1 = 0 gives RAC. With Gaussian in place of orthonormal random directions,

    P = [Q1, √k · (I − Q1 Q1ᵀ) S],   S_ij ~ N(0, 1),   k = 1 / r2,

the mean is the same, and E‖X̃ − X‖² = (n − r1 + 1)/r2 · ‖X − X Q1 Q1ᵀ‖², as (n − r1)/r2 − 1 is with orthonormal ones.

P is kept in the activation's dtype. Rounded to bfloat16 its columns are orthonormal to about
0.4%, and what is said of X̃ holds to that accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from prac.config import Rank
from prac.estimators.base import Estimator, Kept
from prac.estimators.bases import gram_matrix, principal_basis, projection
from prac.estimators.clock import Clock
from prac.estimators.codes import bytes_per_token
from prac.estimators.projected import Projected
from prac.estimators.rounded import Stored, by_reference
from prac.runtime.autocast import without_autocast
from prac.runtime.fake import is_fake
from prac.runtime.later import Later
from prac.runtime.warn import warn

LATELY = 0.2  # of the steps so far: a basis that has served longer is of little help for the next
_NOT_FINITE = (
    "the activations hold NaN or Inf, or overflow when squared; check the data, the learning rate and the loss scale"
)


class Subspace(Estimator):
    """The subspace of one activation (or of one activation shared by several layers).

    Args:
        rank: r1 principal and r2 random directions, and k in units of the unbiased
            ``k0 = (n − r1) / r2`` of Theorem 6.
        clock: counts the optimizer steps.
        width: n, features of the activation; None takes it from the first one seen.
        T1: optimizer steps between updates of Q1.
        T2: optimizer steps between updates of Q2. Where they differ, Q2 is redrawn also at
            every update of Q1: Algorithm 1 as printed would keep a Q2 that is no longer
            orthogonal to the new Q1, and the estimate would be biased.
            None for either keeps the basis.
        growth: if above 0, no interval is longer than this share of the steps before it.
        hidden: the hidden size, which a rank may be a fraction of; None where it is not known.
        factored: leave weight gradients in factors.
        name, seed: as for :class:`prac.estimators.base.Estimator`; each draw of Q2 has its own seed.

    Raises:
        ValueError: if the rank does not fit the width, or an interval is below 1.
    """

    def __init__(
        self,
        rank: Rank,
        clock: Clock,
        *,
        width: int | None = None,
        T1: int | None = 500,
        T2: int | None = 500,
        growth: float = 0.0,
        hidden: int | None = None,
        factored: bool = False,
        name: str = "",
        seed: int = 0,
    ) -> None:
        if any(interval is not None and interval < 1 for interval in (T1, T2)):
            raise ValueError(f"{name}: refresh intervals must be at least 1, got T1 = {T1}, T2 = {T2}.")
        super().__init__(clock, name=name, seed=seed)
        self.rank, self.T1, self.T2, self.growth, self.factored, self.hidden = rank, T1, T2, growth, factored, hidden
        self.storage = Stored(rank.bits, clock, unbiased=True, name=f"{name}/Z", seed=seed)
        self.p_NR: Tensor | None = None
        self._q1_step = self._q2_step = -1  # the optimizer steps of their last updates
        self._warned = self._waits = False
        self._trials: list[tuple[int, Later]] = []  # the steps of refreshes, and whether they could be done
        if width is not None:
            self._fit(width)

    def _fit(self, width: int) -> None:
        """Settle the ranks and k for a width of n features (line 1 of Algorithm 1)."""
        if self.width is not None and width != self.width:
            raise ValueError(f"{self.name}: made for a width of {self.width}, called with {width}; exclude this layer.")
        if self.width is None:
            self.r1, self.r2 = self.rank.resolve(width, self.name, hidden=self.hidden)
            directions = width - self.r1 if self.rank.orthonormal else 1
            self.k = self.rank.k * directions / self.r2 if self.r2 else 1.0
            self.width = width

    # --- Algorithm 1 -------------------------------------------------------------

    @torch.no_grad()
    def update(self, x_MN: Tensor) -> None:
        """Lines 2 to 14 of Algorithm 1: refresh what is due at the clock's step t.

        "t mod T = 0" is read as "a multiple of T has been reached since the last update",
        so that a layer which was not run at that very step, or met a bad batch or none at all
        there (an expert without tokens), catches up at its next chance.

        A batch that gives no basis (NaN, Inf, too few tokens) is skipped: the old one stays, with one warning, and the
        next batch is tried. A device decides that for itself, so that nobody waits for it; both come when it is heard.
        Where there is no old one, and others see more tokens (a rarely used expert), x stays in full until there is.

        Raises:
            ValueError: if there is no basis yet and none can be made from batches like this one.
        """
        self._fit(x_MN.shape[1])
        self.clock.tokens = max(self.clock.tokens, x_MN.shape[0])
        if x_MN.shape[0] == 0:
            return
        self._hear()
        t = self.clock.now()
        due_q1 = self.p_NR is None or t >= self._next(self._q1_step, self.T1)
        due_q2 = due_q1 or t >= self._next(self._q2_step, self.T2)
        if not due_q2:
            return
        with without_autocast(x_MN.device.type):
            generator = self.generator(self.refreshes, x_MN.device)
            if not due_q1 or self.r1 == 0:
                self._renew(self._q1(x_MN), generator)
            elif not self._refresh(x_MN, generator):
                return
        self._q1_step, self._q2_step = (t if due_q1 else self._q1_step), t

    def _refresh(self, x_MN: Tensor, generator: torch.Generator) -> bool:
        """Both bases from this batch; whether it was tried."""
        if x_MN.shape[0] < self.r1:
            problem = f"{x_MN.shape[0]} tokens cannot span a principal basis of r1 = {self.r1} directions"
            if self.p_NR is None and self.r1 <= self.clock.tokens and not self.factored:
                if not self.clock.has_waited:  # a model of many experts says it once
                    warn(
                        f"{self.name} stays in full until it sees more tokens: {problem}. handle.summary() has others."
                    )
                self._waits = self.clock.has_waited = True
                return False
            return self._skip(self.clock.step, f"{problem}; use more tokens per step, lower r1, or exclude this layer")
        gram_NN, before_NR = gram_matrix(x_MN), self.p_NR
        finite = None if is_fake(gram_NN) else torch.isfinite(gram_NN).all()
        # The host waits where it has nothing to go on with, and where there is nothing to wait for.
        if finite is not None and (before_NR is None or finite.device.type == "cpu") and not finite:
            return self._skip(self.clock.step, _NOT_FINITE)
        start_NR = None if before_NR is None else self._q1(x_MN)
        # Activations turn at a rate that falls as 1/t, so a basis is as old as the share of all steps it has served.
        is_stale = self.clock.step - self._q1_step > max(1, LATELY * self.clock.step)
        q1_NR = principal_basis(gram_NN, self.r1, start_NR=start_NR, is_stale=is_stale, generator=generator)
        self._renew(q1_NR, generator)
        if finite is not None and before_NR is not None and finite.device.type != "cpu":
            assert self.p_NR is not None
            self.p_NR = torch.where(finite, self.p_NR, before_NR.to(self.p_NR))
            self._trials.append((self.clock.step, Later(finite)))
        return True

    def _hear(self) -> None:
        """Make up for refreshes that a device skipped, as far as that is known."""
        while self._trials and (done := self._trials[0][1].heard()) is not None:
            step, _ = self._trials.pop(0)
            if not done:
                self._q1_step = self._q2_step = -1  # due again
                self._skip(step, _NOT_FINITE)

    def _renew(self, q1_NR: Tensor, generator: torch.Generator) -> None:
        # A new tensor each time: a backward still under way keeps the P of its forward.
        self.p_NR = projection(q1_NR, self.r2, self.k, generator=generator, orthonormal=self.rank.orthonormal)
        self.refreshes += 1

    @torch.no_grad()
    def settle(self, gram_NN: Tensor) -> None:
        """Take the principal basis from a Gram matrix XᵀX (n × n), such as that of several batches, and a new Q2.

        Raises:
            ValueError: if it holds NaN or Inf.
        """
        if not torch.isfinite(gram_NN).all():
            raise ValueError(f"{self.name}: the calibration batches give NaN or Inf here; check the data.")
        self._fit(gram_NN.shape[0])
        generator = self.generator(self.refreshes, gram_NN.device)
        self._renew(principal_basis(gram_NN, self.r1, generator=generator), generator)
        self._q1_step = self._q2_step = self.clock.step
        self._last = None

    def _next(self, last: int, interval: int | None) -> float:
        """The step at which a basis updated at step ``last`` is due again."""
        if interval is None:
            return math.inf
        due = (last // interval + 1) * interval
        return min(due, last + max(1, int(self.growth * last))) if self.growth else due

    def _q1(self, x_MN: Tensor) -> Tensor:
        """The principal basis at hand, (n, r1), as precise as it is computed with."""
        if self.p_NR is None:
            dtype = torch.promote_types(x_MN.dtype, torch.float32)
            return torch.empty(x_MN.shape[1], 0, dtype=dtype, device=x_MN.device)
        dtype = torch.promote_types(self.p_NR.dtype, torch.float32)
        return self.p_NR[:, : self.r1].to(device=x_MN.device, dtype=dtype)

    def _skip(self, step: int, problem: str) -> bool:
        if self.p_NR is None:
            raise ValueError(f"{self.name}: cannot make the first subspace: {problem}.")
        if not self._warned:
            warn(f"{self.name}: refresh at step {step} skipped, keeping the old subspace: {problem}.")
        self._warned = True
        return False

    # --- the estimator: what ops ask -----------------------------------------------

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """Z = X P (line 16 of Algorithm 1), for (M, n), in ``dtype`` and then in the rank's bits."""
        if self.observer is None or self.p_NR is None:
            self.update(x_MN)
        if self.p_NR is None and x_MN.shape[0] > 0:
            return by_reference(x_MN, dtype)
        p_NR = self._basis(x_MN.device, dtype)
        tensors, z = self.storage.compress(x_MN.to(dtype) @ p_NR, dtype)
        return Kept(tensors, Projected(p_NR, z, self.factored))

    @property
    def is_ready(self) -> bool:
        """Whether there is a P."""
        return self.p_NR is not None

    @property
    def remark(self) -> str:
        """That it waits for its first basis."""
        return f"in full until it sees {self.r1} tokens at once" if self._waits and self.p_NR is None else ""

    @property
    def inside(self) -> tuple[Estimator, ...]:
        """That of Z."""
        return (self.storage,)

    def _basis(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.p_NR is None:  # no token yet to make one of; and none to keep, for which any will do
            assert self.width is not None
            return torch.zeros(self.width, self.r1 + self.r2, device=device, dtype=dtype)
        self.p_NR = self.p_NR.to(device=device, dtype=dtype)
        return self.p_NR

    def label(self) -> str:
        """``r1+r2 of n``, and the bits of Z."""
        bits = "" if self.storage.bits is None else f", {self.storage.label()}"
        return f"{self.r1}+{self.r2} of {self.width}{bits}"

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a row of Z, or of x where there is no basis yet."""
        kept, bits = (self.width or 0, None) if self.remark else (self.r1 + self.r2, self.storage.bits)
        return bytes_per_token(kept, bits, itemsize)

    # --- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """P and the counters: with them a resumed run continues exactly."""
        return {
            "rank": None if self.width is None else (self.r1, self.r2, self.k, self.rank.orthonormal),
            "p": None if self.p_NR is None else self.p_NR.detach().clone(),
            "q1_step": self._q1_step,
            "q2_step": self._q2_step,
            "refreshes": self.refreshes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the saved P is of another width, rank or k than this subspace."""
        p_NR = state["p"]
        if p_NR is not None:
            self._fit(p_NR.shape[0])
            ours = (self.r1, self.r2, self.k, self.rank.orthonormal)
            theirs = tuple(state.get("rank") or ours)  # earlier versions saved none
            if p_NR.shape[1] != self.r1 + self.r2 or theirs != ours:
                raise ValueError(
                    f"{self.name}: the saved subspace has rank {p_NR.shape[1]}, this one {self.r1 + self.r2} (r1, r2, "
                    f"k, orthonormal: {theirs}, {ours}); resume with the config that the run was started with."
                )
        self.p_NR = p_NR
        self._q1_step, self._q2_step = state["q1_step"], state["q2_step"]
        self.refreshes = state["refreshes"]
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Estimator:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Subspace)
        twin.storage, twin._trials = copy.deepcopy(self.storage, memo), []
        return twin


def subspaces_among(estimators: Iterable[Estimator]) -> Iterator[Subspace]:
    """Those of them that keep a subspace."""
    return (each for each in estimators if isinstance(each, Subspace))
