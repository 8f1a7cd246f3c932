"""Local outlier factors against the definition, written as loops."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.outliers import local_outlier_factor, outlier_ratio


def _definition(values: list[float], k: int) -> list[float]:
    """Breunig et al.: reachability, its mean's inverse as density, and the ratio of densities."""
    k = min(k, len(values) - 1)
    near, radius = [], []
    for i, value in enumerate(values):
        others = sorted((abs(value - other), j) for j, other in enumerate(values) if j != i)[:k]
        near.append(others)
        radius.append(others[-1][0])
    density = [1 / (sum(max(gap, radius[j]) for gap, j in others) / k + 1e-10) for others in near]
    return [sum(density[j] for _, j in others) / k / density[i] for i, others in enumerate(near)]


@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("count", [2, 11, 60])
def test_equals_the_definition(k: int, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(k), dtype=torch.float64).pow(3)
    expected = torch.tensor(_definition(values.tolist(), k), dtype=torch.float64)
    torch.testing.assert_close(local_outlier_factor(values, k), expected, rtol=1e-9, atol=1e-9)


def test_order_scale_and_place_do_not_matter() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = local_outlier_factor(values, 7)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(local_outlier_factor(values[order], 7), factor[order])
    torch.testing.assert_close(local_outlier_factor(3 * values + 8, 7), factor, rtol=1e-6, atol=0)


def test_outliers_and_none() -> None:
    values = torch.cat((torch.linspace(0, 1, 95), torch.tensor([9.0, -7.0, 20.0, 30.0, 50.0])))
    assert outlier_ratio(values, 10) == 0.05
    assert outlier_ratio(torch.full((40,), 2.5), 10) == 0.0
    assert outlier_ratio(torch.tensor([1.0]), 10) == 0.0
    assert outlier_ratio(torch.zeros(0), 10) == 0.0


def test_bad_input() -> None:
    for values, k in ((torch.zeros(1), 3), (torch.zeros(2, 2), 3), (torch.zeros(5), 0)):
        with pytest.raises(MethodError, match="outlier factors need"):
            local_outlier_factor(values, k)
