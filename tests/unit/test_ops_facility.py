"""Greedy facility location against loops that evaluate everything anew, and against the best subset."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.facility import greedy_facility_location


def _value(similarity: torch.Tensor, chosen: list[int], bonus: torch.Tensor) -> float:
    return float(similarity[chosen].amax(dim=0).sum() + bonus[chosen].sum()) if chosen else 0.0


def _loop(similarity: torch.Tensor, count: int, bonus: torch.Tensor) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [j for j in range(len(similarity)) if j not in chosen]
        values = {j: _value(similarity, [*chosen, j], bonus) for j in rest}
        # Two tokens that cover each other best gain the same up to rounding.
        chosen.append(min(j for j in rest if values[j] >= max(values.values()) - 1e-6))
    return chosen


def _case(tokens: int, seed: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    units = torch.nn.functional.normalize(torch.randn(tokens, dim, generator=generator, dtype=torch.float64), dim=1)
    return ((1 + units @ units.T) / 2).clamp_min(0), torch.rand(tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 12, 45])
def test_equals_evaluating_everything(seed: int, count: int) -> None:
    similarity, bonus = _case(45, seed)
    order, gains = greedy_facility_location(similarity, count, bonus)
    assert order.tolist() == _loop(similarity, count, bonus)
    assert float(gains.sum()) == pytest.approx(_value(similarity, order.tolist(), bonus), rel=1e-5)
    alone, _ = greedy_facility_location(similarity, count)
    assert alone.tolist() == _loop(similarity, count, torch.zeros_like(bonus))


@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_subset(seed: int) -> None:
    similarity, bonus = _case(9, seed)
    order, _ = greedy_facility_location(similarity, 3, bonus)
    best = max(_value(similarity, list(subset), bonus) for subset in itertools.combinations(range(9), 3))
    assert _value(similarity, order.tolist(), bonus) >= (1 - 1 / math.e) * best


def test_ties_go_to_the_lowest() -> None:
    assert greedy_facility_location(torch.ones(40, 40), 4)[0].tolist() == [0, 1, 2, 3]
    assert greedy_facility_location(torch.eye(40), 40)[0].tolist() == list(range(40))


def test_limits() -> None:
    assert greedy_facility_location(torch.eye(3), 9)[0].numel() == 3
    assert greedy_facility_location(torch.eye(3), 0)[0].shape == (0,)
    assert greedy_facility_location(torch.zeros(0, 0), 2)[0].shape == (0,)
    assert greedy_facility_location(torch.eye(3).half(), 1)[1].dtype == torch.float32
    with pytest.raises(MethodError, match=r"\[n, n\]"):
        greedy_facility_location(torch.zeros(3, 4), 1)
    with pytest.raises(MethodError, match="one bonus per token"):
        greedy_facility_location(torch.eye(3), 1, torch.zeros(2))
    with pytest.raises(MethodError, match="smallest is -1"):
        greedy_facility_location(-torch.eye(3), 1)
