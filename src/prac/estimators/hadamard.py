"""The rotation of groups of features by a Hadamard matrix: additions and subtractions alone.

The matrix here is T = H D. H = ⊗ [[1, 1], [1, −1]], whose entries are ±1, so that HᵀH = R · I for R rows, and T/√R is
orthonormal. D flips the signs of some features: H alone would gather what all of them have in common, their mean, in
the first row. The signs are the sequence of Golay, Rudin and Shapiro, which no row of H resembles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# −1 where the number of a row, in binary, has an odd number of pairs of ones (of 111 two). Groups are no larger.
SIGNS = [1 - 2 * ((i & (i >> 1)).bit_count() & 1) for i in range(1024)]


def cut(x_MRG: Tensor, count: int) -> list[Tensor]:
    """``count`` pieces along R; where it is compiled R of them, so that a compiler sees sums of whole tensors."""
    return list(x_MRG.split(1 if torch.compiler.is_compiling() else x_MRG.shape[1] // count, dim=1))


def turn(parts: Sequence[Tensor]) -> list[Tensor]:
    """T x along the R of (M, R, G), given and returned in pieces along R."""
    return _hadamard(_flipped(parts))


def turn_back(parts: Sequence[Tensor]) -> list[Tensor]:
    """R · T⁻¹ y, likewise."""
    return _flipped(_hadamard(parts))


def _hadamard(parts: Sequence[Tensor]) -> list[Tensor]:
    """H x, by log2(R) stages of additions."""
    if all(part.shape[1] == 1 for part in parts):
        found, h = list(parts), 1
        while h < len(found):
            for i in (i for i in range(len(found)) if not i & h):
                found[i], found[i | h] = found[i] + found[i | h], found[i] - found[i | h]
            h *= 2
        return found
    x_MRG, h = torch.cat(list(parts), dim=1), 1
    m, rows, groups = x_MRG.shape
    while h < rows:
        a, b = x_MRG.view(m, rows // (2 * h), 2, h, groups).unbind(2)
        x_MRG = torch.stack((a + b, a - b), dim=2).view(m, rows, groups)
        h *= 2
    return list(x_MRG.chunk(len(parts), dim=1))


def _flipped(parts: Sequence[Tensor]) -> list[Tensor]:
    """D x, in pieces."""
    signs = SIGNS[: sum(part.shape[1] for part in parts)]
    if all(part.shape[1] == 1 for part in parts):
        return [part if sign > 0 else -part for part, sign in zip(parts, signs, strict=True)]
    first, found = 0, []
    for part in parts:
        sign_R1 = torch.tensor(signs[first : first + part.shape[1]], dtype=part.dtype, device=part.device).unsqueeze(1)
        found.append(part * sign_R1)
        first += part.shape[1]
    return found
