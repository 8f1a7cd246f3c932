"""Recycling clusters and raters against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.raters import SMALLEST_BIAS, rank_count, rater_attention, text_raters, text_relevance
from tokensieve.ops.recycle import peak_clusters, recycle, recycle_counts


def _by_definition(points: list[list[float]], clusters: int, noise: list[float]) -> tuple[list[int], list[int]]:
    count, dim = len(points), len(points[0])
    distance = [[math.dist(a, b) / math.sqrt(dim) for b in points] for a in points]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) + 1e-6 * u
        for row, u in zip(distance, noise, strict=True)
    ]
    farthest = max(map(max, distance))
    score = []
    for i in range(count):
        denser = [distance[i][j] for j in range(count) if density[j] > density[i]]
        score.append(density[i] * min(denser, default=farthest))
    centres = sorted(range(count), key=lambda i: -score[i])[:clusters]
    nearest = [min(range(clusters), key=lambda c: distance[i][centres[c]]) for i in range(count)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(count)]


@pytest.mark.parametrize("clusters", [3, 6, 10])
def test_clusters_follow_the_definition(clusters: int) -> None:
    """Centres in score order, assignment, and the published mean."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(40, 6, generator=generator)
        noise = torch.rand(40, generator=generator)
        centres, assignment = _by_definition(points.tolist(), clusters, noise.tolist())
        merged = recycle(points, clusters, noise)
        assert merged.centres.tolist() == centres
        assert merged.assignment.tolist() == assignment
        for cluster in range(clusters):
            members = points[torch.tensor(assignment) == cluster]
            assert torch.allclose(merged.features[cluster], members.sum(0) / (len(members) + 1e-6), atol=1e-6)


def test_one_cluster_is_the_mean() -> None:
    """Whatever the centre is."""
    points = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(recycle(points, 1).features[0], points.mean(0), atol=1e-5)


def test_without_noise_equal_densities_follow_the_index() -> None:
    """Two clusters: mutual neighbours are equally dense; the lower index is the denser one, every time."""
    points = torch.tensor([[0.0], [1.0], [10.0], [11.5]])
    centres, assignment = peak_clusters(points, 2)
    assert centres.tolist() == [0, 2]
    assert assignment.tolist() == [0, 0, 1, 1]


def test_identical_tokens_merge_into_themselves() -> None:
    """Duplicates leave no empty cluster and no NaN."""
    merged = recycle(torch.ones(9, 3, dtype=torch.bfloat16), 3)
    assert merged.features.dtype == torch.bfloat16
    assert torch.allclose(merged.features.float(), torch.ones(3, 3), atol=1e-2)
    assert merged.assignment.bincount(minlength=3).min() >= 1


def test_counts() -> None:
    """30 % of the dropped and a tenth of these, plus one each, never more than there are."""
    assert recycle_counts(276) == (83, 9)
    assert recycle_counts(100) == (31, 4)
    assert recycle_counts(1) == (1, 1)


@pytest.mark.parametrize(("clusters", "noise", "message"), [(0, None, "0 clusters"), (2, torch.rand(3), "noise")])
def test_refused(clusters: int, noise: torch.Tensor | None, message: str) -> None:
    """Impossible numbers are named."""
    with pytest.raises(MethodError, match=message):
        peak_clusters(torch.randn(5, 2), clusters, noise)


def test_relevance_and_raters() -> None:
    """Softmax over the text, mean over the picture; raters lie above the mean, all rate when none does."""
    generator = torch.Generator().manual_seed(1)
    visual, text = torch.randn(20, 8, generator=generator), torch.randn(6, 8, generator=generator)
    relevance = text_relevance(visual, text)
    expected = [0.0] * 6
    for row in visual.tolist():
        powers = [math.exp(sum(a * b for a, b in zip(row, word, strict=True))) for word in text.tolist()]
        expected = [total + power / sum(powers) / 20 for total, power in zip(expected, powers, strict=True)]
    assert relevance.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(relevance.sum()) == pytest.approx(1.0)
    assert text_raters(relevance).tolist() == [i for i, g in enumerate(expected) if g > 1 / 6]
    assert text_raters(torch.full((4,), 0.25)).tolist() == [0, 1, 2, 3]


def test_rater_attention() -> None:
    """Division by the bias, the busiest heads, mean over heads."""
    generator = torch.Generator().manual_seed(3)
    attention, bias = torch.rand(3, 5, 9, generator=generator), torch.rand(5, 9, generator=generator) + 0.1
    bias[2, 4] = -1e-5
    raters = torch.tensor([0, 2])
    held = bias.clone()
    held[2, 4] = -SMALLEST_BIAS
    weighted = attention[:, raters] / held[raters]
    heads = sorted(range(3), key=lambda head: -float(weighted[head].sum()))[:2]
    expected = (weighted[heads[0]] + weighted[heads[1]]) / 2
    assert torch.allclose(rater_attention(attention, raters, bias, 2), expected)
    assert torch.allclose(rater_attention(attention, raters), attention[:, [0, 2]].mean(0))


def test_rank_rule() -> None:
    """Rank times scale plus bias, truncated; nothing to prune at full rank; at least one token."""
    generator = torch.Generator().manual_seed(4)
    low = torch.rand(6, 2, generator=generator) @ torch.rand(2, 30, generator=generator)
    assert rank_count(low, 6.5, 2.0) == 15
    assert rank_count(low, 100.0, 0.0) == 29
    assert rank_count(low, 0.1, 0.0) == 1
    assert rank_count(torch.eye(4), 2.0, 0.0) is None
