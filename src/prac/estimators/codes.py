"""Few-bit storage: 2, 4, 6, 8 or 16 bits a value, packed, with one scale for each group of features.

A value is kept as an integer 0 … 2ᵇ − 1 in units of its group's step,

    code = ⌊v / step + u⌋,

where u = ½ rounds to the nearest code and a uniform u in [0, 1) rounds without bias. Steps are kept in bfloat16,
rounded outwards, so that no code is ever clipped. There are two kinds of groups.

*Rotated* (:attr:`prac.Bits.rotate`). A group of features is turned by an orthonormal matrix first and back afterwards,
which spreads a value that is much larger than the others over all of them; without, the others would all have the same
code. Turning is linear, so what is unbiased stays unbiased, and is additions alone (:mod:`prac.estimators.hadamard`).
What is turned lies around 0, so one number a group is enough: v goes from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1 steps, and the step's sign
gives the longer side to the larger extreme. Zero is a code, but with 2 bits, where that would be one of four: there v
is −1.5 to 1.5. QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and HOT (Kim et al. 2025, arXiv:2503.21261) rotate too.

*As they are*: a group of 64 has its minimum and its step, v = x − low.

*Companded* (:attr:`prac.Bits.compand`), as they are but for asinh(x) in place of x: steps are even around 0 and grow
with x further out, step · √(1 + x²). For what GELU or SiLU reads that is where their derivatives bend, and a group's
large values, of which only the size counts, do not coarsen the others. To the nearest code alone: E asinh⁻¹ of what is
rounded without bias is not x. Telephones compand (the µ-law of G.711); Few-Bit Backward (Novikov et al. 2022,
arXiv:2202.00441) fits levels to an activation's derivative, which alone it keeps, where these give back x.

For Gaussian values the relative error (r.m.s.) is about

    =====  =======  ==========  =============
    bits   nearest  stochastic  bits a value
    =====  =======  ==========  =============
    8      0.5%     0.8%        8.5
    6      2%       3%          6.5
    4      9%       12 to 13%   4.5
    2      46%      65%         2.5
    =====  =======  ==========  =============

in groups of 64, or of 32 that are rotated, and it halves with each bit. Why not a library: torchao's primitives leave
4-bit codes in a byte each, bitsandbytes' code books are for weights, made once; neither rounds without bias, nor in the
same pass over memory that makes the tensor (:mod:`prac.ops.kernels`).

Two codes of 4 bits share a byte as the two halves of the row do, not as neighbours do: that keeps reads and writes in
order for vector units. Codes of 6 bits are ones of 4 and then ones of 2. The features of a rotated group lie as far
apart as there are groups, for the same reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.hadamard import cut, turn, turn_back

Tensors = tuple[Tensor, ...]
# The pieces of a row whose codes share bytes, and of how many bytes each.
PIECES = {8: 1, 6: 4, 4: 2, 2: 4}
BYTES = {8: 1, 6: 3, 4: 1, 2: 1}
# One number per token and one per feature; their sum modulo 1 is u.
Dither = tuple[Tensor, Tensor]


class Coding(NamedTuple):
    """How a tensor is to be written: in ``bits``, None for as it is; without ``dither`` rounded to the nearest code."""

    bits: Bits | None
    dither: Dither | None = None


class Codes(NamedTuple):
    """A tensor (M, n) as it was written."""

    tensors: Tensors
    bits: Bits | None
    n: int


def layout(n: int, bits: Bits) -> tuple[int, int]:
    """The group and the width that are stored for n features.

    Rotated groups are of the power of two, up to ``bits.group``, that takes the fewest bytes; what is missing of one is
    padded with zeros. Else the group is the largest divisor of n (rounded up to whole bytes) that is at most
    ``bits.group`` and a multiple of 16, for vector units, or else at least half of ``bits.group``. A width without
    either is padded to a multiple of ``bits.group``.
    """
    pieces = PIECES[bits.bits]
    if bits.rotate:
        sizes = [(group, -(-n // group) * group) for group in _powers_of_two(bits.group)]
        fewest = min([_bytes(*size, bits) for size in sizes])
        return next(size for size in sizes if _bytes(*size, bits) == fewest)
    width = -(-n // pieces) * pieces
    most = min(width, bits.group)
    for group in (*range(most // 16 * 16, 0, -16), *range(most, most // 2, -1)):
        if width % group == 0:
            return group, width
    while width % most or width % pieces:
        width += 1
    return most, width


def bytes_per_token(n: int, bits: Bits | None, itemsize: int) -> int:
    """What :func:`store` keeps of a token of n features of ``itemsize`` bytes each."""
    if bits is None or bits.bits == 32:
        return n * itemsize
    if bits.bits == 16:
        return n * min(itemsize, 2)
    return _bytes(*layout(n, bits), bits)


def _bytes(group: int, width: int, bits: Bits) -> int:
    """Codes, and for each group its step; and its minimum where it is not rotated."""
    return width * bits.bits // 8 + width // group * (2 if bits.rotate else 4)


def _powers_of_two(most: int) -> Iterator[int]:
    """From the largest down to 4, which fill a byte with codes of 2 bits."""
    return (2**i for i in range(most.bit_length() - 1, 1, -1))


def dither(m: int, n: int, bits: Bits, device: torch.device, generator: torch.Generator) -> Dither:
    """Random numbers for unbiased rounding of m × n values, from m + n draws.

    u_ij = frac(a_i + b_j) with a and b i.i.d. uniform. Each u_ij is uniform, so each rounding is
    unbiased. Any two are independent: in the same row because b_j and b_k are, in the same
    column because a_i and a_l are. So the rounding errors are uncorrelated, and whatever is
    linear in the values (a weight gradient) has the mean and the variance that m · n
    independent draws would give, for a thousandth of the random numbers.
    """
    _, width = layout(n, bits)
    u = torch.rand(m + width, generator=generator, device=device, dtype=torch.float32)
    return u[:m, None], u[m:]


def store(x_MN: Tensor, coding: Coding) -> Tensors:
    """Write ``x_MN``.

    Returns:
        codes (M, n · bits / 8) in uint8, then (M, groups) in bfloat16 the step, of rotated groups divided by their
        size, or low and step; or x alone, in bfloat16 where bits = 16. Tokens of zeros stay so; NaN and Inf come back
        as NaN or Inf.
    """
    bits, dither = coding
    if bits is None or bits.bits == 32:
        return (x_MN,)
    if bits.bits == 16:
        return (x_MN.to(torch.bfloat16) if x_MN.dtype.itemsize > 2 else x_MN,)
    if bits.rotate:
        parts, step_M1G = turned(x_MN, bits)
        us: Sequence[Tensor | float] = [0.5] * len(parts)
        if dither is not None:
            us = _uniform(dither, step_M1G.shape[2], len(parts))
        codes = [(part + u).floor().to(torch.uint8) for part, u in zip(parts, us, strict=True)]
        group = sum(part.shape[1] for part in parts)
        return _pack(codes, bits.bits).flatten(1), (step_M1G / group).squeeze(1).to(torch.bfloat16)
    m, n = x_MN.shape
    (group, width), top = layout(n, bits), 2**bits.bits - 1
    x_MN = x_MN.to(torch.promote_types(x_MN.dtype, torch.float32))
    x_MN = torch.asinh(x_MN) if bits.compand else x_MN
    if width != n:
        x_MN = torch.cat([x_MN, x_MN[:, -1:].expand(m, width - n)], dim=1)
    x_MGS = x_MN.reshape(m, width // group, group)
    low_MG1 = x_MGS.amin(-1, keepdim=True)
    low_MG1 = _bfloat16(low_MG1 - low_MG1.abs() * 2**-8)
    step_MG1 = _bfloat16((x_MGS.amax(-1, keepdim=True) - low_MG1) * ((1 + 2**-7) / top))
    inverse_MG1 = torch.where(step_MG1 == 0, 0.0, 1.0 / step_MG1)
    codes_MGS = (x_MGS - low_MG1) * inverse_MG1
    if dither is None:
        codes_MGS = codes_MGS + 0.5
    else:
        u_MN = dither[0] + dither[1]
        codes_MGS = codes_MGS + (u_MN - u_MN.floor()).reshape(m, width // group, group)
    codes_MN = codes_MGS.floor().clamp(0, top).to(torch.uint8).reshape(m, width)
    low_MG, step_MG = (t.squeeze(-1).to(torch.bfloat16) for t in (low_MG1, step_MG1))
    return _pack(codes_MN.chunk(PIECES[bits.bits], dim=1), bits.bits), low_MG, step_MG


def turned(x_MN: Tensor, bits: Bits) -> tuple[list[Tensor], Tensor]:
    """The rotated groups of ``x_MN`` in steps from the lowest code, in pieces (M, r, G), and signed steps (M, 1, G).

    The rotation is not scaled: what is turned is √R times as large, and so are the steps.
    """
    (m, n), (group, width) = x_MN.shape, layout(x_MN.shape[1], bits)
    x_MN = torch.nn.functional.pad(x_MN.to(torch.promote_types(x_MN.dtype, torch.float32)), (0, width - n))
    parts = turn(cut(x_MN.reshape(m, group, width // group), PIECES[bits.bits]))
    high_M1G = functools.reduce(torch.maximum, [part.amax(1, keepdim=True) for part in parts])
    low_M1G = functools.reduce(torch.minimum, [part.amin(1, keepdim=True) for part in parts])
    longer, shorter = torch.maximum(high_M1G, -low_M1G), torch.minimum(high_M1G, -low_M1G)
    lowest = _lowest(bits)
    step_M1G = torch.maximum(longer / -lowest, shorter / (2**bits.bits - 1 + lowest))
    step_M1G = _bfloat16(step_M1G * (1 + 2**-7))
    step_M1G = torch.where(high_M1G > -low_M1G, -step_M1G, step_M1G)
    inverse_M1G = torch.where(step_M1G == 0, 0.0, 1.0 / step_M1G)
    return [part * inverse_M1G - lowest for part in parts], step_M1G


def _lowest(bits: Bits) -> float:
    """What code 0 of a rotated group stands for, in steps."""
    return -1.5 if bits.bits == 2 else -(2 ** (bits.bits - 1))


def _uniform(dither: Dither, groups: int, count: int) -> list[Tensor]:
    """Numbers u for each of so many pieces."""
    a_M1, b_N = dither
    b_1RG = b_N.view(1, -1, groups)
    sums = [a_M1.unsqueeze(2) + b_1rG for b_1rG in b_1RG.chunk(count, dim=1)]
    return [u - u.floor() for u in sums]


def load(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`store`: (M, n) in ``dtype``."""
    (codes_MB, *scales), bits, n = codes
    if bits is None or bits.bits >= 16:
        return codes_MB.to(dtype)
    m, (group, width) = codes_MB.shape[0], layout(n, bits)
    work = torch.promote_types(dtype, torch.float32)
    if bits.rotate:
        packed_MRG = codes_MB.view(m, group * bits.bits // 8, width // group)
        pieces = cut(packed_MRG, BYTES[bits.bits])
        parts = [part.to(work) + _lowest(bits) for part in _unpacked(pieces, bits.bits)]
        step_M1G = scales[0].to(work).unsqueeze(1)
        return torch.cat([part * step_M1G for part in turn_back(parts)], dim=1).reshape(m, width)[:, :n].to(dtype)
    low_MG, step_MG = scales
    if width == n:
        codes_MN = torch.cat(_unpacked(codes_MB.chunk(BYTES[bits.bits], dim=1), bits.bits), dim=1)
    else:
        codes_MN = _unpack_slowly(codes_MB, bits.bits)
    codes_MGS = codes_MN.reshape(m, width // group, group).to(work)
    x_MGS = codes_MGS * step_MG.to(work).unsqueeze(-1) + low_MG.to(work).unsqueeze(-1)
    x_MGS = torch.sinh(x_MGS) if bits.compand else x_MGS
    return x_MGS.reshape(m, width)[:, :n].to(dtype)


def _bfloat16(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest bfloat16, in its own dtype.

    By its bits, because a compiler may leave out a conversion there and back, and then the codes
    would be made with other scales than those that are kept. A NaN stays one: rounding would make 0 of some.
    """
    bits = x.to(torch.float32).view(torch.int32)
    return torch.where(x.isnan(), x, ((bits + 0x8000) & -0x10000).view(torch.float32).to(x.dtype))


def _pack(parts: Sequence[Tensor], bits: int) -> Tensor:
    """Codes in bytes, given in pieces along the second dimension; the first piece of each half, quarter share bytes."""
    if bits == 6:
        return torch.cat([_pack([part & 15 for part in parts], 4), _pack([part >> 4 for part in parts], 2)], dim=1)
    rows = len(parts) * bits // 8
    packed = [
        functools.reduce(
            torch.bitwise_or, [part << (i * bits) if i else part for i, part in enumerate(parts[row::rows])]
        )
        for row in range(rows)
    ]
    return torch.cat(packed, dim=1)


def _unpacked(packed: Sequence[Tensor], bits: int) -> list[Tensor]:
    """The inverse, in pieces too."""
    if bits == 8:
        return list(packed)
    if bits == 6:
        fours, twos = packed[: len(packed) // 3 * 2], packed[len(packed) // 3 * 2 :]
        return [low | (high << 4) for low, high in zip(_unpacked(fours, 4), _unpacked(twos, 2), strict=True)]
    return [(piece >> (i * bits)) & (2**bits - 1) for i in range(8 // bits) for piece in packed]


def _unpack_slowly(packed_MB: Tensor, bits: int) -> Tensor:
    """The same, for rows that are cut off afterwards: inductor (torch 2.13, CPU) reads past a cat that is cut."""
    if bits == 6:
        low_MB, high_MB = packed_MB.tensor_split([packed_MB.shape[1] // 3 * 2], dim=1)
        return _unpack_slowly(low_MB, 4) | (_unpack_slowly(high_MB, 2) << 4)
    shifts_P1 = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_MB.device).unsqueeze(1)
    return ((packed_MB.unsqueeze(1) >> shifts_P1) & (2**bits - 1)).flatten(1)
