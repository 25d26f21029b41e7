"""Algorithm 1: bases, refreshes, the clock, state."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import Steps, activations, assert_mean, pairs, subspace

from prac.config import Rank
from prac.estimators.subspace import Subspace
from prac.runtime.later import Later


def test_a_bad_batch_is_heard_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: whether a batch was good enough is asked when it is known, and not before."""
    clock = Steps()
    s = subspace(4, 5, T1=1, T2=1, clock=clock)
    x = activations(50, 19)
    s.keep(x)
    p = s.p_NR
    clock.step = 1
    answers = iter([None, None, False])

    class Answer(Later):
        def heard(self) -> bool | None:
            return next(answers)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s._trials.append((1, Answer(torch.tensor(False))))
        s.keep(x + 1)
        clock.step = 2
        s.keep(x + 2)
    assert not torch.equal(s.p_NR, p)
    clock.step = 3
    with pytest.warns(UserWarning, match="layer: refresh at step 1 skipped, keeping the old subspace: the activations"):
        s.keep(x + 3)
    assert not s._trials

    s.T1 = s.T2 = 100  # and what was skipped is made up for, whenever that is
    clock.step = 7
    before = s.refreshes
    s.keep(x + 4)
    assert s.refreshes == before
    s._trials.append((3, Later(torch.tensor(False))))
    s.keep(x + 5)
    assert s.refreshes == before + 1
    assert Later(torch.tensor(True)).heard() is True


@pytest.mark.parametrize(("T1", "T2"), [(3, 5), (5, 3), (2, 4), (1, 7), (7, 1), (4, 4)])
def test_q2_stays_orthogonal_to_q1_when_intervals_differ(T1: int, T2: int) -> None:
    """After every step of 30 with drifting activations, and each part changes just when it should."""
    clock = Steps()
    s = subspace(4, 5, T1=T1, T2=T2, clock=clock)
    before = None
    for t in range(30):
        clock.step = t
        s.keep(activations(50, 19, seed=t))
        q1, q2 = s.p_NR[:, :4], s.p_NR[:, 4:] / s.k**0.5
        torch.testing.assert_close(q1.T @ q2, torch.zeros(4, 5, dtype=q1.dtype), atol=1e-12, rtol=0)
        torch.testing.assert_close(q2.T @ q2, torch.eye(5, dtype=q1.dtype), atol=1e-12, rtol=0)
        if before is not None:
            assert torch.equal(q1, before[0]) == (t % T1 != 0)
            assert torch.equal(q2, before[1]) == (t % T1 != 0 and t % T2 != 0)
        before = (q1.clone(), q2.clone())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_basis_in_half_precision_is_orthonormal_to_its_rounding(dtype: torch.dtype, rounding: float) -> None:
    s = subspace(40, 24)  # all 64 directions: P Pᵀ would be the identity
    s.keep(activations(200, 64, tail=1.0, dtype=dtype))
    assert s.p_NR.dtype == dtype
    p = s.p_NR.double()
    assert (p @ p.T - torch.eye(64)).norm() / 8 < rounding


def test_k_is_that_of_theorem_6_and_can_be_scaled() -> None:
    s = subspace(4, 5, width=19)
    assert s.k == (19 - 4) / 5
    assert subspace(4, 5, width=19, k=0.2).k == pytest.approx(0.2 * 3)


def test_a_refresh_missed_is_made_up_for() -> None:
    """A layer that is not run at the very step where t mod T = 0 refreshes at its next use."""
    clock = Steps()
    s = subspace(2, 2, T1=10, T2=10, clock=clock)
    for t, refreshes in ((0, 1), (9, 1), (13, 2), (19, 2), (35, 3), (36, 3), (40, 4)):
        clock.step = t
        s.keep(activations(20, 9, seed=t))
        assert s.refreshes == refreshes


def test_intervals_that_grow() -> None:
    """Each at most 10% of the steps before it, until T takes over."""
    clock = Steps()
    s = subspace(2, 2, T1=40, T2=40, growth=0.1, clock=clock)
    at, seen = [], 0
    for t in range(700):
        clock.step = t
        s.update(activations(20, 9, seed=t % 7))
        if s.refreshes > seen:
            at.append(t)
            seen = s.refreshes
    assert at[:13] == [*range(12), 12]
    assert all(b - a <= max(1, 0.1 * a) for a, b in pairs(at))
    assert at[-6:] == [480, 520, 560, 600, 640, 680]
    assert len(at) == 67  # 17 with fixed intervals


def test_the_same_seed_and_name_draw_the_same_and_others_do_not() -> None:
    x = activations(30, 11)

    def basis(**kwargs: object) -> torch.Tensor:
        s = subspace(3, 3, **kwargs)
        s.keep(x)
        return s.p_NR

    assert torch.equal(basis(), basis())
    assert not torch.allclose(basis(), basis(seed=1))
    assert not torch.allclose(basis(), basis(name="other"))


def test_the_users_random_state_is_untouched() -> None:
    s, x = subspace(3, 3), activations(30, 11)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    s.keep(x)
    assert torch.equal(torch.rand(3), expected)


def test_one_z_for_layers_that_read_the_same_tensor() -> None:
    s, x = subspace(3, 3), activations(30, 11)
    first, second = s.keep(x), s.keep(x)
    assert first.tensors[0] is second.tensors[0]
    assert s.keep(x.clone()).tensors[0] is not first.tensors[0]


def test_z_is_not_reused_after_a_change_or_a_step() -> None:
    clock = Steps()
    s, x = subspace(3, 3, clock=clock), activations(30, 11)
    first = s.keep(x)
    x.mul_(2)
    second = s.keep(x)
    torch.testing.assert_close(second.tensors[0], 2 * first.tensors[0])
    clock.step = 1
    assert s.keep(x).tensors[0] is not second.tensors[0]


def test_nothing_is_kept_alive_by_remembering() -> None:
    import weakref

    s, x = subspace(3, 3), activations(30, 11)
    z = weakref.ref(s.keep(x).tensors[0])
    assert z() is None


def test_a_backward_under_way_keeps_its_own_basis() -> None:
    """A refresh between forward and backward must not mix the old Z with the new P."""
    clock = Steps()
    s, x = subspace(3, 3, T1=1, T2=1, clock=clock), activations(30, 11)
    kept = s.keep(x)
    before = kept.reconstruct()
    clock.step = 1
    s.keep(activations(30, 11, seed=9))
    assert torch.equal(kept.reconstruct(), before)


# --- bad batches -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (activations(30, 11).index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
        (activations(30, 11).index_fill(0, torch.tensor([3]), float("inf")), "Inf"),
        (activations(3, 11), "3 tokens"),
    ],
)
def test_bad_batch_at_a_refresh(bad: torch.Tensor, word: str) -> None:
    """The first one is an error that names the layer; later ones keep the old subspace and warn once."""
    with pytest.raises(ValueError, match=rf"layers\.3\.q_proj: .*{word}"):
        subspace(4, 3, name="layers.3.q_proj").keep(bad)

    clock = Steps()
    s = subspace(4, 3, name="layers.3.q_proj", T1=1, T2=1, clock=clock)
    s.keep(activations(30, 11))
    old = s.p_NR.clone()
    clock.step = 1
    with pytest.warns(UserWarning, match=rf"layers\.3\.q_proj: refresh at step 1 skipped.*{word}"):
        s.keep(bad)
    clock.step = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.keep(bad)
        assert torch.equal(s.p_NR, old)
        s.keep(activations(30, 11, seed=4))  # a good batch at the same step catches up
    assert not torch.equal(s.p_NR, old)


def test_rac_needs_no_statistics_of_the_batch() -> None:
    s = subspace(0, 3)
    s.keep(torch.full((1, 11), float("nan")))
    assert torch.isfinite(s.p_NR).all()


@pytest.mark.parametrize("x", [torch.zeros(30, 11), torch.ones(30, 11), torch.full((30, 11), 1e-25)])
def test_degenerate_batches_give_an_orthonormal_basis(x: torch.Tensor) -> None:
    s = subspace(4, 3)
    s.keep(x)
    q = s.p_NR / torch.tensor([1.0] * 4 + [s.k**0.5] * 3)
    torch.testing.assert_close(q.T @ q, torch.eye(7), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("r1", "r2", "word"), [(0, 0, "rank 0"), (12, 0, "12 exceeds the width 11"), (6, 6, "6 \\+ 6")]
)
def test_rank_that_does_not_fit(r1: int, r2: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        subspace(r1, r2, width=11, name="layer")


@pytest.mark.parametrize(("T1", "T2"), [(0, 1), (1, 0), (-3, 1)])
def test_interval_below_one(T1: int, T2: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        subspace(2, 2, T1=T1, T2=T2)


def test_another_width_than_before() -> None:
    s = subspace(2, 2, name="act")
    s.keep(activations(20, 11))
    with pytest.raises(ValueError, match="act: made for a width of 11, called with 13"):
        s.keep(activations(20, 13))


# --- state ---------------------------------------------------------------------------


def test_state_resumes_exactly() -> None:
    clock = Steps()
    s = subspace(3, 3, T1=4, T2=2, clock=clock)
    for t in range(6):
        clock.step = t
        s.keep(activations(30, 11, seed=t))
    state = s.state_dict()
    twin = subspace(3, 3, T1=4, T2=2, clock=clock)
    twin.load_state_dict(state)
    for t in range(5, 12):
        clock.step = t
        x = activations(30, 11, seed=t)
        assert torch.equal(s.keep(x).tensors[0], twin.keep(x).tensors[0])


def test_state_of_another_rank_is_refused() -> None:
    s = subspace(3, 3)
    s.keep(activations(30, 11))
    with pytest.raises(ValueError, match="rank 6, this one 7"):
        subspace(3, 4).load_state_dict(s.state_dict())


@pytest.mark.parametrize(("r1", "r2"), [(0, 7), (5, 6)])
def test_gaussian_directions_are_unbiased_and_noisier(r1: int, r2: int) -> None:
    """E[X̃] = X and E‖X̃ − X‖² = (n − r1 + 1)/r2 · tail: 2,000 draws, 4 standard errors."""
    x = activations(29, 17, tail=1.0)
    estimates = []
    for seed in range(2000):
        s = Subspace(Rank(r1, r2, orthonormal=False), Steps(), seed=seed, name="layer")
        estimates.append(s.keep(x).reconstruct())
    samples = torch.stack(estimates)
    assert_mean(samples, x)
    tail = torch.linalg.svdvals(x)[r1:].square().sum()
    errors = (samples - x).square().sum((1, 2))
    expected = (17 - r1 + 1) / r2 * tail
    assert abs(errors.mean() - expected) < 4 * errors.std() / len(errors) ** 0.5
