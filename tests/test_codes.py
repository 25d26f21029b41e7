"""Few-bit storage: error bounds, bytes, and what unbiased rounding promises."""

from __future__ import annotations

import pytest
import torch
from helpers import Steps, assert_mean, odd_shapes
from test_hadamard import matrix
from torch import Tensor

from prac.config import Bits
from prac.estimators.codes import Codes, Coding, bytes_per_token, dither, layout, load, store
from prac.estimators.rounded import Stored

every_width = pytest.mark.parametrize("bits", [2, 4, 6, 8])
FORMS = [Bits(bits, group, rotate) for bits in (2, 4, 6, 8) for group, rotate in ((64, False), (32, True))]
every_form = pytest.mark.parametrize("form", FORMS, ids=repr)


def values(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of very different sizes, some with an offset, one of them constant, one zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x *= 10 ** torch.linspace(-4, 3, m, dtype=torch.float64)[:, None]
    x[1::3] += 5
    x[0], x[m // 2] = 0, 3.25
    return x.to(dtype)


def noise(m: int, n: int, bits: Bits, seed: int) -> tuple[Tensor, Tensor]:
    return dither(m, n, bits, torch.device("cpu"), torch.Generator().manual_seed(seed))


def again(x: Tensor, bits: Bits, seed: int | None = None) -> Tensor:
    """What comes back."""
    tensors = store(x, Coding(bits, None if seed is None else noise(*x.shape, bits, seed)))
    return load(Codes(tensors, bits, x.shape[1]), x.dtype)


def steps_of(x: Tensor, bits: Bits) -> Tensor:
    """The size of a step of the code at every entry, in float64; of rotated groups of what is turned, unscaled."""
    group, _ = layout(x.shape[1], bits)
    step = store(x, Coding(bits))[-1].double()
    if bits.rotate:
        return (group * step.abs()).repeat(1, group)[:, : x.shape[1]]
    return step.repeat_interleave(group, dim=1)[:, : x.shape[1]]


def turn(x: Tensor, bits: Bits) -> Tensor:
    """T x in groups, (M, R, G), in float64, with T by its definition."""
    group, width = layout(x.shape[1], bits)
    padded = torch.nn.functional.pad(x.double(), (0, width - x.shape[1]))
    return torch.einsum("rs,msg->mrg", matrix(group), padded.reshape(len(x), group, width // group))


@every_form
@pytest.mark.parametrize("n", [3, 19, 57, 64, 97, 192, 344])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_value_is_within_its_step(form: Bits, n: int, dtype: torch.dtype) -> None:
    """Half a step to the nearest code, one step otherwise; and the step is that of the group's own range."""
    x = values(11, n, dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps * x.double().abs().amax(1, keepdim=True) + 1e-30
    step = steps_of(x, form)
    for seed, most in ((None, 0.5), (1, 1.0)):
        back = again(x, form, seed)
        if not form.rotate:
            assert ((back.double() - x.double()).abs() <= most * step + rounding).all()
        elif back.shape[1] == layout(n, form)[1]:  # where nothing is cut off, all that is turned can be seen
            group = layout(n, form)[0]
            off = (turn(back, form) - turn(x, form)).abs()
            assert (off <= most * step.view(11, group, -1) + group * rounding.unsqueeze(2)).all()
        else:
            assert ((back.double() - x.double()).abs() <= most * step + rounding).all()

    if not form.rotate:
        x = x.double()
        extent = (x.amax(1) - x.amin(1) + x.abs().amax(1) * 2**-7) / (2**form.bits - 1)
        assert (step <= 1.02 * extent[:, None] + 1e-30).all()
        return
    turned, (least, most) = (
        turn(x, form),
        (1.5, 1.5) if form.bits == 2 else (2 ** (form.bits - 1), 2 ** (form.bits - 1) - 1),
    )
    high, low = turned.amax(1), -turned.amin(1)
    expected = torch.maximum(torch.maximum(high, low) / least, torch.minimum(high, low) / most)
    step = step.view(11, -1)[:, : expected.shape[1]] if n == layout(n, form)[1] else None
    if step is not None:
        assert (step >= expected * (1 - 1e-6)).all() and (step <= 1.013 * expected + 1e-30).all()


@every_form
def test_bytes_are_what_was_promised(form: Bits) -> None:
    """A 4-bit value takes half a byte, and a group four bytes more, or two where it is rotated."""
    for n in (3, 19, 57, 97, 192, 1024, 2736):
        kept = sum(t.numel() * t.element_size() for t in store(values(5, n), Coding(form)))
        assert kept == 5 * bytes_per_token(n, form, 8)
    scales = 1024 // 32 * 2 if form.rotate else 1024 // 64 * 4
    assert bytes_per_token(1024, form, 4) == 1024 * form.bits // 8 + scales
    assert bytes_per_token(100, None, 4) == bytes_per_token(100, Bits(32), 4) == 400
    assert bytes_per_token(100, Bits(16), 4) == 200


def test_groups_suit_vector_units_where_the_width_allows() -> None:
    found = [layout(n, Bits(4, rotate=False)) for n in (1024, 2736, 192, 80, 57)]
    assert found == [(64, 1024), (48, 2736), (64, 192), (16, 80), (58, 58)]


def test_rotated_groups_take_the_fewest_bytes() -> None:
    found = [layout(n, Bits(4, 32, rotate=True)) for n in (1024, 2736, 192, 80, 57, 20, 3)]
    assert found == [(32, 1024), (32, 2752), (32, 192), (16, 80), (32, 64), (32, 32), (4, 4)]


def test_one_large_value_does_not_take_the_codes_of_the_others() -> None:
    """Relative to all values 20 times less error, where one of a group is 100 times as large as the others."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 5] = 100
    off = {
        rotate: (again(x, Bits(4, 32, rotate), 0) - x)[:, [c for c in range(64) if c != 5]].norm()
        for rotate in (True, False)
    }
    assert off[True] < off[False]


@every_form
def test_the_error_of_gaussian_values_is_that_of_the_table(form: Bits) -> None:
    """The docstring's, within 5%."""
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    expected = {(8, False): (0.0054, 0.0077), (8, True): (0.0054, 0.0077), (6, False): (0.0219, 0.0309),
                (6, True): (0.0217, 0.0308), (4, False): (0.0906, 0.1288),
                (4, True): (0.0872, 0.1238), (2, False): (0.4552, 0.643), (2, True): (0.459, 0.648)}  # fmt: skip
    found = [((again(x, form, seed) - x).norm() / x.norm()).item() for seed in (None, 0)]
    assert found == pytest.approx(expected[form.bits, form.rotate], rel=0.05)


@every_form
def test_stochastic_rounding_is_unbiased(form: Bits) -> None:
    """Over a fine grid of u the mean is x to the grid's own resolution: no statistics needed."""
    x, count = values(7, 37, seed=form.bits), 500
    _, width = layout(37, form)
    total = torch.zeros_like(x)
    for u in (torch.arange(count, dtype=x.dtype) + 0.5) / count:
        total += load(Codes(store(x, Coding(form, (torch.full((7, 1), u), torch.zeros(width)))), form, 37), x.dtype)
    bound = steps_of(x, form) / count + 1e-12 * x.abs()
    assert ((total / count - x).abs() <= bound).all()
    assert not ((again(x, form) - x).abs() <= bound).all()


@every_form
def test_the_random_numbers_are_uniform_and_drive_an_unbiased_sum(form: Bits) -> None:
    """A weighted sum over a whole tensor, 2,000 draws: its mean within 4 standard errors."""
    x = values(7, 37, seed=form.bits)[1:] / 100
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    assert_mean(torch.stack([(again(x, form, seed) * weights).sum() for seed in range(2000)]), (x * weights).sum())
    u = torch.cat([sum(noise(30, 50, form, seed)).frac().flatten() for seed in range(20)])
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts / u.numel() - 0.05).abs() < 0.015).all()


@pytest.mark.parametrize("form", [Bits(b, 8, rotate=r) for b in (2, 4, 6, 8) for r in (False, True)], ids=repr)
def test_rounding_errors_are_uncorrelated(form: Bits) -> None:
    """The variance of anything linear, a sum over a rectangle even, is that of independent rounding: within 10%.

    Of rotated groups that holds of what is turned, which is what is rounded. 4,000 draws give the ratio to 2.2% (one
    standard error, errors of near-Gaussian sums).
    """
    x = values(8, 24, seed=5)[1:4] / 100
    errors = torch.stack([again(x, form, seed) - x for seed in range(4000)])
    if form.rotate:
        errors = turn(errors.flatten(0, 1), form).reshape(4000, 3, 24)
    generator = torch.Generator().manual_seed(0)
    for weights in (torch.ones_like(x), torch.randn(x.shape, generator=generator, dtype=x.dtype)):
        together = (errors * weights).sum((1, 2)).var()
        apart = (errors.var(0) * weights.square()).sum()
        assert abs(together / apart - 1) < 0.1
    # Every pair of entries: correlations of 4,000 draws are within 5.5 / √4000 of zero (Bonferroni over 2,556 pairs).
    flat = errors.flatten(1)
    correlation = torch.corrcoef(flat[:, flat.std(0) > 1e-9 * flat.abs().max()].T)
    off = correlation - torch.diag(correlation.diag())
    assert off.abs().max() < 5.5 / 4000**0.5


@pytest.mark.parametrize("compand", [False, True])
@every_width
def test_bad_values_stay_visible(bits: int, compand: bool) -> None:
    """NaN and Inf come back as such, in their group at least; other tokens are not touched."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = values(5, 40, dtype=torch.float32)
        x[2, 7] = bad
        y = again(x, Bits(bits, compand=compand))
        assert not y[2, 7].isfinite()
        assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [*FORMS, Bits(4, compand=True), Bits(6, compand=True)], ids=repr)
def test_bad_values_stay_visible_where_registers_are_wide(form: Bits, dtype: torch.dtype) -> None:
    """Vectorised, the maximum with a NaN is one with all bits set, which rounding by bits takes around to 0."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[3, 5] = bad
        y = again(x, form, None if form.compand else 0)
        assert not y[3, 5].isfinite() and y[[0, 1, 2, *range(4, 64)]].isfinite().all()


def test_sixteen_and_thirty_two_bits() -> None:
    x = values(4, 21, dtype=torch.float32)
    assert torch.equal(again(x, Bits(16)), x.bfloat16().float())
    assert again(x, Bits(32)).data_ptr() == x.data_ptr()


def test_estimator_draws_anew_and_repeats_itself() -> None:
    """Two calls differ; the same seed, step and call do not; a resumed run goes on as it would have."""
    clock = Steps()
    x = values(6, 30, dtype=torch.float32)
    draw = lambda e: e.keep(x.clone()).reconstruct()  # noqa: E731
    one, two = (Stored(Bits(4), clock, unbiased=True, name="a", seed=1) for _ in range(2))
    first, second = draw(one), draw(one)
    assert not torch.equal(first, second)
    assert torch.equal(draw(two), first) and torch.equal(draw(two), second)
    clock.step = 7
    resumed = Stored(Bits(4), clock, unbiased=True, name="a", seed=1)
    later = draw(one)
    assert torch.equal(later, draw(resumed)) and not torch.equal(later, first)
    assert not torch.equal(draw(Stored(Bits(4), Steps(), unbiased=True, name="b", seed=1)), first)


@pytest.mark.parametrize("shape", odd_shapes())
def test_estimator_on_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = Stored(Bits(8), Steps(), unbiased=False).keep(x)
    dy = torch.randn(x[..., 0].numel(), 5, dtype=torch.float64)
    torch.testing.assert_close(kept.reconstruct(), x.reshape(-1, shape[-1]), atol=0.03, rtol=0)
    torch.testing.assert_close(kept.weight_grad(dy), dy.T @ kept.reconstruct())


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 3},
        {"bits": 0},
        {"group": 2},
        {"group": 16.0},
        {"group": 48, "rotate": True},
        {"compand": 1},
        {"compand": True, "rotate": True},
        {"compand": True, "bits": 16},
        {"group": 2048, "rotate": True},
        {"bits": 16, "rotate": True},
        {"rotate": "no"},
    ],
)
def test_bad_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Bits(**wrong)


@every_width
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_and_device_of_the_process_change_nothing(bits: int, default: torch.dtype) -> None:
    """In bfloat16 a uniform number has 256 values, and rounding with it would be biased."""
    form, x, before = Bits(bits), values(7, 37, dtype=torch.float32), torch.get_default_dtype()
    expected = store(x, Coding(form, noise(7, 37, form, seed=0)))
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        found = store(x, Coding(form, noise(7, 37, form, seed=0)))
        loaded = load(Codes(found, form, 37), x.dtype)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, again(x, form, seed=0))


@every_width
@pytest.mark.parametrize("n", [3, 57, 64])
def test_no_rows_at_all(bits: int, n: int) -> None:
    form = Bits(bits)
    for dither_MN in (None, noise(0, n, form, seed=0)):
        codes, *scales = store(torch.empty(0, n), Coding(form, dither_MN))
        assert sum(t.numel() for t in (codes, *scales)) == 0
        assert load(Codes((codes, *scales), form, n), torch.float32).shape == (0, n)
