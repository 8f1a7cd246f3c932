"""Greedy max-min selection against a plain loop."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.maxmin import greedy_max_min


def _loop(distances: torch.Tensor, count: int) -> list[int]:
    rows = distances.tolist()
    total = len(rows)
    seconds = [sorted(rows[i][j] for i in range(total))[min(1, total - 1)] for j in range(total)]
    order = [max(range(total), key=lambda j: (seconds[j], -j))]
    while len(order) < count:
        rest = [j for j in range(total) if j not in order]
        order.append(max(rest, key=lambda j: (min(rows[i][j] for i in order), -j)))
    return order


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_equals_a_loop_over_members(count: int) -> None:
    torch.manual_seed(0)
    distances = torch.rand(4, 11, 11)
    distances[:2] -= 0.7  # negative entries occur where scores scale the columns
    distances.diagonal(dim1=1, dim2=2).zero_()
    chosen = greedy_max_min(distances, count)
    assert chosen.tolist() == [_loop(group, count) for group in distances]


def test_members_repeat_only_when_they_are_not_excluded() -> None:
    distances = -torch.ones(1, 4, 4)
    distances.diagonal(dim1=1, dim2=2).zero_()
    assert greedy_max_min(distances, 4)[0].sort().values.tolist() == [0, 1, 2, 3]
    assert greedy_max_min(distances, 4, exclude=False)[0].tolist() == [0, 0, 0, 0]


def test_limits() -> None:
    assert greedy_max_min(torch.zeros(2, 3, 3), 9).shape == (2, 3)
    assert greedy_max_min(torch.zeros(2, 1, 1), 1).tolist() == [[0], [0]]
    assert greedy_max_min(torch.zeros(2, 3, 3), 0).shape == (2, 0)
    with pytest.raises(MethodError, match=r"needs distances \[B, n, n\]"):
        greedy_max_min(torch.zeros(3, 4), 1)
