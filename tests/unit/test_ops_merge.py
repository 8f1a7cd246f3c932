"""Merge maps, means and sequential averages against loops."""

from __future__ import annotations

import pytest
import torch

from tokensieve.ops.merge import (
    MergedTokens,
    MergeMap,
    apply_merge,
    join_merged,
    mean_merge,
    sequential_average,
    sequential_average_weights,
    sort_merged,
    unmerged,
    weighted_merge,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _groups(count: int, groups: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(seed))


def test_apply_merge_by_definition() -> None:
    features = _random(20, 4)
    merge_map = MergeMap(_groups(50, 20, 2), _groups(50, 7, 3), torch.rand(50))
    expected = torch.zeros(8, 4)
    for source, target, weight in zip(*merge_map, strict=True):
        expected[target] += weight * features[source]
    merged = apply_merge(features, merge_map, 8)
    torch.testing.assert_close(merged, expected)
    assert float(merged[7].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_and_plain_mean(dtype: torch.dtype) -> None:
    features, weights, group = _random(30, 5).to(dtype), torch.rand(30), _groups(30, 6)
    weighted = weighted_merge(features, weights, group, 7)
    plain = mean_merge(features, group, 7)
    assert weighted.dtype == plain.dtype == dtype
    for g in range(6):
        inside = group == g
        w = weights[inside].unsqueeze(1)
        expected = (features[inside].float() * w).sum(0) / w.sum()
        torch.testing.assert_close(weighted[g], expected.to(dtype))
        torch.testing.assert_close(plain[g], features[inside].float().mean(0).to(dtype))
    assert float(weighted[6].abs().max()) == float(plain[6].abs().max()) == 0.0


def _one_after_the_other(base: torch.Tensor, arrivals: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    result = base.clone()
    for arrival, j in zip(arrivals, target.tolist(), strict=True):
        result[j] = (result[j] + arrival) / 2
    return result


def test_sequential_average_equals_the_loop() -> None:
    base, arrivals, target = _random(9, 6), _random(60, 6, seed=1), _groups(60, 8)
    expected = _one_after_the_other(base, arrivals, target)
    torch.testing.assert_close(sequential_average(base, arrivals, target), expected, rtol=0, atol=1e-6)
    assert torch.equal(sequential_average(base, arrivals, target)[8], base[8])


def test_sequential_average_with_very_many_arrivals_at_one_target() -> None:
    base, arrivals, target = _random(2, 3), _random(300, 3, seed=1), torch.zeros(300, dtype=torch.int64)
    expected = _one_after_the_other(base, arrivals, target)
    torch.testing.assert_close(sequential_average(base, arrivals, target), expected, rtol=0, atol=1e-6)


def test_sequential_weights_add_up_and_favour_the_last() -> None:
    target = torch.tensor([2, 0, 2, 2])
    of_base, of_arrivals = sequential_average_weights(target, 3)
    assert of_base.tolist() == [0.5, 1.0, 0.125]
    assert of_arrivals.tolist() == [0.125, 0.5, 0.25, 0.5]


def test_nothing_to_merge() -> None:
    base, none = _random(3, 2), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(sequential_average(base, base[:0], none), base)
    assert torch.equal(mean_merge(base[:0], none, 2), torch.zeros(2, 2))


def test_parts_are_joined_and_sorted_with_their_maps() -> None:
    features = _random(12, 3)
    means = mean_merge(features[[7, 5, 9]], torch.tensor([0, 0, 1]), 2)
    merged = MergedTokens(
        means,
        torch.tensor([7, 9]),
        MergeMap(torch.tensor([7, 5, 9]), torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 1.0])),
    )
    joined = join_merged([merged, unmerged(features, torch.tensor([8, 2]))])
    assert joined.source.tolist() == [7, 9, 8, 2]
    ordered = sort_merged(joined)
    assert ordered.source.tolist() == [2, 7, 8, 9]
    for tokens in (joined, ordered):
        torch.testing.assert_close(apply_merge(features, tokens.merge_map, 4), tokens.features)
    assert torch.equal(ordered.features[0], features[2])
