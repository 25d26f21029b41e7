"""A kernel in Triton for ``⟨dz, z − b⟩``, registered on the plain function; run by Triton's interpreter on the CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prac.ops import kernels
from prac.runtime import kernel as module

ran = []


@triton.jit
def _inner(dz, z, bias, out, width: tl.constexpr, block: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, block)
    inside = columns < width
    d = tl.load(dz + row * width + columns, inside, 0.0)
    x = tl.load(z + row * width + columns, inside, 0.0)
    b = tl.load(bias + columns, inside, 0.0)
    tl.store(out + row, tl.sum(d * (x - b)))


@kernels.inner.by_hand("cpu", why_not=lambda dz, z, bias: "" if bias is not None else "no bias to take off")
def inner(dz_MO: Tensor, z_MO: Tensor, bias_O: Tensor) -> Tensor:
    """One row a program."""
    m, o = dz_MO.shape
    out_M1 = torch.empty(m, 1)
    _inner[(m,)](dz_MO, z_MO, bias_O, out_M1, o, triton.next_power_of_2(o))
    ran.append(m)
    return out_M1


if __name__ == "__main__":
    module.WORTHWHILE = 1
    generator = torch.Generator().manual_seed(0)
    for m, o in ((3, 5), (17, 130)):
        dz, z, bias = (torch.randn(shape, generator=generator) for shape in ((m, o), (m, o), (o,)))
        plain = kernels.inner.__wrapped__(dz, z, bias)
        torch.testing.assert_close(kernels.inner(dz, z, bias), plain)
    assert ran == [3, 17]
    print("agrees")
