"""Few-bit storage: 2, 4, 8 or 16 bits a value, packed, with one scale for each group of features.

A group of features of one token is mapped to the integers 0 … 2ᵇ − 1 by its own minimum and step,

    code = ⌊(x − low) / step + u⌋,      x ≈ low + step · code,

where u = ½ rounds to the nearest code and a uniform u in [0, 1) rounds without bias. ``low`` and
``step`` are kept in bfloat16, rounded outwards, so that no code is ever clipped. For Gaussian values
in groups of 64 the relative error (r.m.s.) is about

    =====  =======  ==========  =============
    bits   nearest  stochastic  bits a value
    =====  =======  ==========  =============
    8      0.5%     0.8%        8.5
    4      9%       13%         4.5
    2      45%      65%         2.5
    =====  =======  ==========  =============

and it halves with each bit. Why not a library: torchao's primitives leave 4-bit codes in a byte each, bitsandbytes'
code books are for weights, made once; neither rounds without bias, nor in the same pass over memory that makes the
tensor (:mod:`prac.ops.kernels`).

Two codes of 4 bits share a byte as the two halves of the row do,
not as neighbours do: that keeps reads and writes in order for vector units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prac.config import Bits

Tensors = tuple[Tensor, ...]
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


PER_GROUP_BYTES = 4  # low and step


def layout(n: int, bits: Bits) -> tuple[int, int]:
    """The group and the width that are stored for n features.

    The group is the largest divisor of n (rounded up to whole bytes) that is at most ``bits.group``
    and a multiple of 16, for vector units, or else at least half of ``bits.group``. A width without
    either is padded to a multiple of ``bits.group``.
    """
    per_byte = max(1, 8 // bits.bits)
    width = -(-n // per_byte) * per_byte
    most = min(width, bits.group)
    for group in (*range(most // 16 * 16, 0, -16), *range(most, most // 2, -1)):
        if width % group == 0:
            return group, width
    while width % most or width % per_byte:
        width += 1
    return most, width


def bytes_per_token(n: int, bits: Bits | None, itemsize: int) -> int:
    """What :func:`store` keeps of a token of n features of ``itemsize`` bytes each."""
    if bits is None or bits.bits == 32:
        return n * itemsize
    if bits.bits == 16:
        return n * min(itemsize, 2)
    group, width = layout(n, bits)
    return width * bits.bits // 8 + width // group * PER_GROUP_BYTES


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
        codes (M, n · bits / 8) in uint8, low and step (M, groups) in bfloat16; or x alone, in
        bfloat16 where bits = 16. Zeros stay zeros; NaN and Inf come back as NaN or Inf.
    """
    bits, dither = coding
    if bits is None or bits.bits == 32:
        return (x_MN,)
    if bits.bits == 16:
        return (x_MN.to(torch.bfloat16) if x_MN.dtype.itemsize > 2 else x_MN,)
    m, n = x_MN.shape
    (group, width), top = layout(n, bits), 2**bits.bits - 1
    x_MN = x_MN.to(torch.promote_types(x_MN.dtype, torch.float32))
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
    return _pack(codes_MN, bits.bits), low_MG, step_MG


def load(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`store`: (M, n) in ``dtype``."""
    (codes_MB, *scales), bits, n = codes
    if bits is None or bits.bits >= 16:
        return codes_MB.to(dtype)
    low_MG, step_MG = scales
    m, (group, width) = codes_MB.shape[0], layout(n, bits)
    work = torch.promote_types(dtype, torch.float32)
    codes_MN = _unpack(codes_MB, bits.bits) if width == n else _unpack_slowly(codes_MB, bits.bits)
    codes_MGS = codes_MN.reshape(m, width // group, group).to(work)
    x_MGS = codes_MGS * step_MG.to(work).unsqueeze(-1) + low_MG.to(work).unsqueeze(-1)
    return x_MGS.reshape(m, width)[:, :n].to(dtype)


def _bfloat16(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest bfloat16, in its own dtype.

    By its bits, because a compiler may leave out a conversion there and back, and then the codes
    would be made with other scales than those that are kept.
    """
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x8000) & -0x10000).view(torch.float32).to(x.dtype)


def _pack(codes_MN: Tensor, bits: int) -> Tensor:
    parts = codes_MN.chunk(8 // bits, dim=1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << (i * bits))
    return packed


def _unpack(packed_MB: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed_MB
    mask = 2**bits - 1
    return torch.cat([(packed_MB >> (i * bits)) & mask for i in range(8 // bits)], dim=1)


def _unpack_slowly(packed_MB: Tensor, bits: int) -> Tensor:
    """The same, for rows that are cut off afterwards: inductor (torch 2.13, CPU) reads past a cat that is cut."""
    shifts_P1 = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_MB.device).unsqueeze(1)
    return ((packed_MB.unsqueeze(1) >> shifts_P1) & (2**bits - 1)).flatten(1)
