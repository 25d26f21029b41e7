"""Every way to keep a tensor that was measured, with its bytes and the variance that it brings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prac.allocation.calibration import Measured
from prac.allocation.variance import best_split, of_rank, of_rounding, tails
from prac.allocation.waterfill import Choice, Option
from prac.config import Bits, Rank
from prac.estimators.bases import gram_matrix, projection
from prac.estimators.codes import bytes_per_token

# Ranks are tried in steps of n / STEPS; the error of rounding Z is averaged over so many tokens.
STEPS, TOKENS = 32, 2048


def _in_so_many(bits: int, like: Bits) -> Bits:
    """So many bits, in groups as ``like`` has them, and rotated where it is."""
    return dataclasses.replace(like, bits=bits) if bits <= 8 and like.bits <= 8 else Bits(bits)


class Choices:
    """The options of one tensor.

    The variance of a rank, and that of rounding the tensor itself, are the closed forms of
    :mod:`prac.allocation.variance`. That of rounding Z comes on top, exactly so since the two errors are uncorrelated;
    it is taken for one draw of Q2 and
    :data:`TOKENS` evenly spaced tokens in place of their means, which is within a few percent of it.

    With ``held_out`` the bases are those of one half of the batch and the gradients those of the other, and the other
    way round: what a basis loses of tokens that it was not made from.
    """

    def __init__(self, measured: Measured, held_out: bool = False) -> None:
        self.measured = measured
        gamma_N = measured.gamma_N
        self._square_N = None if gamma_N is None else gamma_N.square()
        pairs, self._share = [(gram_matrix(measured.x_MN), measured.second_NN)], 1.0
        if held_out:
            first, second = measured.halves
            pairs = [(first.gram_NN, second.second_NN), (second.gram_NN, first.second_NN)]
            energies = sum(measured.energy_of(half.second_NN) for half in measured.halves)
            self._share = measured.energy / energies if energies else 1.0
        # Where there are two, their variances, which add up, are shares of the halves' own gradients.
        self._tails = [tails(gram_NN, second_NN, gamma_N) for gram_NN, second_NN in pairs]

    @property
    def width(self) -> int:
        """Features, n."""
        return self.measured.x_MN.shape[1]

    def bytes(self, keep: Choice) -> int:
        """Bytes per token; at a rank with what the readers keep besides."""
        itemsize = self.measured.itemsize
        if isinstance(keep, Bits):
            return bytes_per_token(self.width, keep, itemsize)
        return bytes_per_token(sum(keep.resolve(self.width)), keep.bits, itemsize) + self.measured.beside

    def variance(self, keep: Choice) -> float:
        """E‖G̃ − G‖² of the gradients of all weights that read the tensor."""
        if isinstance(keep, Bits):
            return of_rounding(self.measured.x_MN, self.measured.weight_M, keep, self._square_N)
        r1, r2 = keep.resolve(self.width, self.measured.name)
        of_ranks = self._share * sum(of_rank(each, r1, r2, keep.k).item() for each in self._tails)
        return of_ranks + self._of_z(self._basis(r1, r2, keep.k), keep.bits)

    def option(self, keep: Choice) -> Option:
        """Both of them."""
        return Option(keep, self.bytes(keep), self.variance(keep))

    def options(
        self,
        bits: Sequence[int | Bits],
        rank_bits: Sequence[int | None],
        uniform: Option | None = None,
        like: Bits | None = None,
    ) -> Iterator[Option]:
        """Every direction in each of ``bits``, and each rank, split best, with Z in each of ``rank_bits``.

        Numbers of bits are in groups as ``like`` has them, and rotated where it is.

        ``uniform`` is one more, and its rank is tried with other splits too. One that is biased is not taken up: the
        errors of all steps would add up.
        """
        rank = uniform.keep if uniform is not None and isinstance(uniform.keep, Rank) else None
        if uniform is not None and (rank is None or self._is_unbiased(rank)):
            yield uniform
        like = like or Bits()
        yield from (self.option(each if isinstance(each, Bits) else _in_so_many(each, like)) for each in bits)
        if not self.measured.ranked or not rank_bits:
            return
        most = min(self.width, self.measured.x_MN.shape[0])  # fewer tokens cannot span so many principal directions
        grid = {math.ceil(self.width * i / STEPS) for i in range(1, STEPS)}
        for r in sorted(grid if rank is None else grid | {sum(rank.resolve(self.width))}):
            r1, variance = best_split(self._tails, r, most)
            p_NR = self._basis(r1, r - r1, 1.0)
            for count in rank_bits:
                keep = Rank(r1, r - r1, bits=None if count is None else Bits(count))
                yield Option(keep, self.bytes(keep), self._share * variance + self._of_z(p_NR, keep.bits))

    def _is_unbiased(self, rank: Rank) -> bool:
        r1, r2 = rank.resolve(self.width)
        return rank.k == 1 and (r2 > 0 or r1 == self.width)

    def _basis(self, r1: int, r2: int, k: float) -> Tensor:
        """P as :mod:`prac.estimators.subspace` has it, (n, r), for one Q2 out of a generator of its own."""
        q1_NR = self._tails[0].basis_NN[:, :r1]
        generator = torch.Generator(q1_NR.device).manual_seed(0)
        return projection(q1_NR, r2, k * (self.width - r1) / max(1, r2), generator=generator)

    def _of_z(self, p_NR: Tensor, bits: Bits | None) -> float:
        """Of rounding Z = X P, whose errors go through Pᵀ Γ."""
        if bits is None:
            return 0.0
        x_MN, weight_M = self.measured.x_MN, self.measured.weight_M
        stride = max(1, x_MN.shape[0] // TOKENS)
        z_MR = (x_MN[::stride].to(p_NR) @ p_NR).to(x_MN.dtype)
        square_NR = p_NR.square() if self._square_N is None else p_NR.square() * self._square_N.to(p_NR).unsqueeze(1)
        some = weight_M[::stride]
        share = (some.sum() / weight_M.sum().clamp_min(torch.finfo(weight_M.dtype).tiny)).item()
        return of_rounding(z_MR, some, bits, square_NR.sum(0)) / share if share else 0.0
