"""Greedy max-sum selection against a plain loop."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops import maxsum
from tokensieve.ops.maxsum import greedy_max_sum

STRATEGIES = get_args(maxsum.Strategy)


def _loop(features: torch.Tensor, count: int, first: int) -> tuple[list[int], list[float]]:
    """Every sum recomputed from the members chosen, in float64."""
    units = torch.nn.functional.normalize(features.double(), dim=1)
    order, sums = [first], [0.0]
    while len(order) < count:
        rest = [j for j in range(len(units)) if j not in order]
        values = {j: sum(float(units[j] @ units[i]) for i in order) for j in rest}
        order.append(min(rest, key=lambda j: (values[j], j)))
        sums.append(values[order[-1]])
    return order, sums


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_equals_a_loop_over_tokens(strategy: maxsum.Strategy, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(40, 6, generator=generator) + torch.randn(6, generator=generator)
    order, sums = greedy_max_sum(features, count, 7, strategy=strategy)
    expected, values = _loop(features, count, 7)
    assert order.tolist() == expected
    torch.testing.assert_close(sums.tolist(), values, rtol=0, atol=1e-5)


def test_strategies_agree_when_rows_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsum, "_AHEAD", 3)
    monkeypatch.setattr(maxsum, "_MAX_BYTES", 1)
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(3)) + 0.5
    running, _ = greedy_max_sum(features, 200, 0, strategy="running")
    ahead, _ = greedy_max_sum(features, 200, 0, strategy="prefetch")
    assert torch.equal(running, ahead)


def test_a_factor_per_token_changes_nothing_and_zeros_are_allowed() -> None:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(30, 8, generator=generator)
    factor = 0.1 + torch.rand(30, 1, generator=generator)
    assert torch.equal(greedy_max_sum(features, 12, 4)[0], greedy_max_sum(features * factor, 12, 4)[0])
    features[9] = 0
    order, sums = greedy_max_sum(features, 30, 9)
    assert sorted(order.tolist()) == list(range(30))
    assert bool(torch.isfinite(sums).all())


def test_limits() -> None:
    assert greedy_max_sum(torch.randn(4, 2), 9, 0)[0].sort().values.tolist() == [0, 1, 2, 3]
    assert greedy_max_sum(torch.randn(4, 2), 0, 0)[0].shape == (0,)
    assert greedy_max_sum(torch.randn(4, 2).half(), 2, 3)[1].dtype == torch.float32
    with pytest.raises(MethodError, match="first token 4"):
        greedy_max_sum(torch.randn(4, 2), 2, 4)
    with pytest.raises(MethodError, match="'matrix' is unknown"):
        greedy_max_sum(torch.randn(4, 2), 2, 0, strategy="matrix")  # type: ignore[arg-type]
