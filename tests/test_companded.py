"""Codes of asinh(x): how near they are, what they do for a GELU, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from helpers import Steps
from test_codes import again, every_width, steps_of, values

from prac.allocation.variance import of_rounding
from prac.config import Bits
from prac.estimators.codes import bytes_per_token
from prac.estimators.rounded import Stored


@every_width
@pytest.mark.parametrize("n", [3, 19, 57, 64, 97, 192, 344])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_companded_codes_are_those_of_the_inverse_hyperbolic_sine(bits: int, n: int, dtype: torch.dtype) -> None:
    """Half a step of the group's own range of asinh(x): in x, half a step times √(1 + x²), which is finest around 0."""
    form, x = Bits(bits, compand=True), values(11, n, dtype=dtype)
    wide = x.double().asinh()
    extent = steps_of(wide, Bits(bits))
    off = (again(x, form).double().asinh() - wide).abs()
    assert (off <= 0.5 * 1.02 * extent + 8 * torch.finfo(dtype).eps * (1 + wide.abs())).all()
    assert bytes_per_token(n, form, 4) == bytes_per_token(n, Bits(bits), 4)


def test_companding_nearly_halves_the_error_of_a_gelus_derivative_where_its_input_has_large_values() -> None:
    """For values of size 2, a fiftieth of them ten times as large; h = f(x) is nearer than by codes as they are too."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(500, 512, generator=generator, dtype=torch.float64)
    x *= 1 + 9 * (torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.02)
    back = [again(x, form) for form in (Bits(4, compand=True), Bits(4), Bits(4, 32, rotate=True))]
    slope = torch.ops.aten.gelu_backward.default
    found, plain, turned = ((slope(torch.ones_like(x), y) - slope(torch.ones_like(x), x)).norm() for y in back)
    assert 1.8 * found < min(plain, turned)
    gelu = torch.nn.functional.gelu
    assert (gelu(back[0]) - gelu(x)).norm() < 0.7 * (gelu(back[1]) - gelu(x)).norm()


def test_companded_codes_are_never_rounded_without_bias() -> None:
    with pytest.raises(ValueError, match=r"q: companded codes are biased.*write Bits\(4\)"):
        Stored(Bits(4, compand=True), Steps(), unbiased=True, name="q")


def test_companded_codes_have_no_variance_to_choose_by() -> None:
    """What adds up variances takes them for unbiased: `prac.allocation.allocate` must not be given them."""
    with pytest.raises(ValueError, match=r"companded codes are biased.*write Bits\(4\)"):
        of_rounding(values(5, 16), torch.ones(5), Bits(4, compand=True))
