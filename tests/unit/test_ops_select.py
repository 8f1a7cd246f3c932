"""Top-k with ties, and farthest-point selection against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops import diversity
from tokensieve.ops.diversity import farthest_point
from tokensieve.ops.select import top_indices, top_mask


def _features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _top_by_definition(row: list[float], count: int, largest: bool) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i] if largest else row[i], i))[:count]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_indices_with_ties(largest: bool, dtype: torch.dtype) -> None:
    scores = torch.randint(0, 4, (3, 5, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (0, 1, 17, 40, 99):
        ranked = top_indices(scores, count, largest, order="rank")
        ascending = top_indices(scores, count, largest)
        assert ranked.shape == (3, 5, min(count, 40))
        for i, j in itertools.product(range(3), range(5)):
            expected = _top_by_definition(scores[i, j].tolist(), count, largest)
            assert ranked[i, j].tolist() == expected
            assert ascending[i, j].tolist() == sorted(expected)


@pytest.mark.parametrize("largest", [True, False])
def test_not_a_number_ranks_last(largest: bool) -> None:
    scores = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf"), float("nan")])
    ranked = top_indices(scores, 3, largest, order="rank").tolist()
    assert ranked[:2] == ([2, 1] if largest else [3, 1])


def test_top_mask_with_a_count_per_row() -> None:
    scores = torch.randint(0, 3, (6, 12), generator=torch.Generator().manual_seed(2)).float()
    counts = torch.tensor([0, 1, 5, 7, 12, 3])
    mask = top_mask(scores, counts, largest=False)
    for row in range(6):
        expected = _top_by_definition(scores[row].tolist(), int(counts[row]), largest=False)
        assert mask[row].nonzero()[:, 0].tolist() == sorted(expected)
    assert top_mask(scores, 4).sum(dim=1).tolist() == [4] * 6


def _greedy_by_definition(features: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    distance = 1 - units @ units.T
    total = len(distance)
    nearest = [min(float(distance[i, j]) for j in range(total) if j != i) for i in range(total)]
    order = [max(range(total), key=lambda i: (round(nearest[i], 12), -i))]
    values = [nearest[order[0]]]
    while len(order) < count:
        left = [i for i in range(total) if i not in order]
        gap = {i: min(float(distance[i, j]) for j in order) for i in left}
        order.append(max(left, key=lambda i: (gap[i], -i)))
        values.append(gap[order[-1]])
    return order, values


@pytest.mark.parametrize("strategy", ["auto", "matrix", "running", "pool"])
@pytest.mark.parametrize(("count", "dim"), [(60, 5), (90, 24)])
def test_farthest_point_follows_its_definition(
    strategy: diversity.Strategy, count: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "_POOL", 7)
    features = _features(count, dim)
    expected, values = _greedy_by_definition(features, count // 2)
    order, distances = farthest_point(features, count // 2, strategy=strategy, max_matrix_bytes=4000)
    assert order.tolist() == expected
    torch.testing.assert_close(distances, torch.tensor(values), rtol=0, atol=1e-6)


def test_strategies_agree_on_a_large_pool() -> None:
    scene = _features(90, 32, seed=3)
    features = torch.cat([scene + 0.2 * _features(90, 32, seed=10 + t) for t in range(15)])
    expected, distances = farthest_point(features, 250, strategy="matrix")
    for strategy in ("running", "pool"):
        order, other = farthest_point(features, 250, strategy=strategy)
        assert order.tolist() == expected.tolist()
        torch.testing.assert_close(other, distances, rtol=0, atol=1e-6)


def test_pruned_nearest_neighbours_find_the_same_first_token() -> None:
    for seed in range(5):
        units = torch.nn.functional.normalize(_features(700, 16, seed), dim=1)
        full = diversity._nearest_blockwise(units, 100_000)
        pruned = diversity._nearest_pruned(units, columns=64, probes=4)
        assert int(full.argmin()) == int(pruned.argmin())
        exact = pruned.isfinite()
        assert int(exact.sum()) < 700
        torch.testing.assert_close(pruned.min(), full.min(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["matrix", "running", "pool"])
def test_mutual_neighbours_tie_to_the_lowest_index(strategy: diversity.Strategy) -> None:
    # Tokens 2 and 5 are each other's nearest neighbours and farther from all others than anyone else.
    features = torch.eye(6)[0] + 0.01 * _features(8, 6)
    features[2] = torch.tensor([0, 0, 1.0, 0.6, 0, 0])
    features[5] = torch.tensor([0, 0, 0.6, 1.0, 0, 0])
    order, _ = farthest_point(features, 1, strategy=strategy)
    assert order.tolist() == [2]


@pytest.mark.parametrize("strategy", ["matrix", "running", "pool"])
def test_duplicates_are_chosen_last_and_all_tokens_once(strategy: diversity.Strategy) -> None:
    features = _features(30, 12).repeat(2, 1)
    order, distances = farthest_point(features, 60, strategy=strategy)
    assert len(set((order[:30] % 30).tolist())) == 30
    assert sorted(order.tolist()) == list(range(60))
    assert bool((distances[2:] <= distances[1:-1]).all())
    assert float(distances[30:].max()) < 1e-6


def test_scale_of_a_token_does_not_matter() -> None:
    features = _features(80, 10)
    factors = torch.rand(80, 1, generator=torch.Generator().manual_seed(5)) * 100 + 0.01
    assert farthest_point(features, 20)[0].tolist() == farthest_point(features * factors, 20)[0].tolist()


def test_greedy_is_at_least_half_of_the_optimum_in_the_angular_metric() -> None:
    for seed in range(5):
        features = _features(10, 4, seed)
        units = torch.nn.functional.normalize(features.double(), dim=1)
        angle = torch.arccos((units @ units.T).clamp(-1, 1))
        best = max(
            min(float(angle[i, j]) for i, j in itertools.combinations(subset, 2))
            for subset in itertools.combinations(range(10), 3)
        )
        order = farthest_point(features, 3)[0].tolist()
        assert min(float(angle[i, j]) for i, j in itertools.combinations(order, 2)) >= best / 2


def test_zero_vectors_are_duplicates_of_each_other() -> None:
    features = _features(12, 6)
    features[[1, 4, 9]] = 0
    order, _ = farthest_point(features, 10)
    assert len({1, 4, 9} & set(order.tolist())) == 1


def test_small_and_bad_inputs() -> None:
    assert farthest_point(_features(3, 4), 0)[0].tolist() == []
    order, distances = farthest_point(_features(1, 4), 5)
    assert (order.tolist(), distances.tolist()) == ([0], [0.0])
    with pytest.raises(MethodError, match="'fast' is unknown"):
        farthest_point(_features(5, 4), 2, strategy="fast")
    with pytest.raises(MethodError, match="infinite or not a number"):
        farthest_point(torch.full((5, 4), float("nan")), 2)
    with pytest.raises(MethodError, match=r"\(2, 5, 4\)"):
        farthest_point(torch.zeros(2, 5, 4), 2)


def test_half_precision_input_is_scored_in_float32() -> None:
    features = _features(200, 32).bfloat16()
    assert farthest_point(features, 50)[0].tolist() == farthest_point(features.float(), 50)[0].tolist()
