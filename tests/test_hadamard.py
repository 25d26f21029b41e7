"""The rotation: orthogonal, undone, the same in one piece and in many; no row resembles a constant."""

from __future__ import annotations

import pytest
import torch

from prac.estimators.hadamard import turn, turn_back


def matrix(rows: int) -> torch.Tensor:
    """T by its definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < rows:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    pairs = [sum((i >> bit) & 3 == 3 for bit in range(8)) for i in range(rows)]
    return h * (-1.0) ** torch.tensor(pairs, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("count", [1, 2, 4, 64])
def test_it_is_the_matrix_by_its_definition(rows: int, count: int) -> None:
    x = torch.randn(5, rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = matrix(rows)
    parts = turn(x.chunk(count, dim=1))
    turned = torch.cat(parts, dim=1)
    torch.testing.assert_close(turned, torch.einsum("rs,msg->mrg", t, x))
    torch.testing.assert_close(t @ t.T, rows * torch.eye(rows, dtype=torch.float64))
    torch.testing.assert_close(torch.cat(turn_back(parts), dim=1), rows * x)
    assert torch.equal(turned, torch.cat(turn(x.split(1, dim=1)), dim=1)), "the same sums in the same order"


@pytest.mark.parametrize("rows", [4, 8, 16, 32, 64, 128])
def test_what_features_have_in_common_is_spread_over_all_rows(rows: int) -> None:
    """No more than √2 times the even share of it in any row; by the Hadamard matrix alone all of it is in the first."""
    (turned,) = turn([torch.ones(1, rows, 1)])
    assert turned.abs().max() <= (2 * rows) ** 0.5
