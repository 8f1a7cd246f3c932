"""Density-peak clustering against a loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.cluster import density_peaks, scaled_distances


def _points(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _by_definition(features: torch.Tensor, clusters: int, neighbours: int) -> tuple[list[int], list[int]]:
    points, count, dim = features.tolist(), *features.shape
    distance = [[math.dist(a, b) / math.sqrt(dim) for b in points] for a in points]
    k = min(neighbours, clusters)
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in distance]
    farthest = max(map(max, distance))
    score = []
    for i in range(count):
        # Two mutual neighbours have one density when k is 2; the lower index counts as denser.
        denser = [distance[i][j] for j in range(count) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * (min(denser) if denser else farthest))
    centres = sorted(sorted(range(count), key=lambda i: (-score[i], i))[:clusters])
    assignment = [
        centres.index(i) if i in centres else min(range(clusters), key=lambda c: (distance[i][centres[c]], c))
        for i in range(count)
    ]
    return centres, assignment


@pytest.mark.parametrize(("clusters", "neighbours"), [(2, 7), (5, 3), (9, 7), (40, 7)])
def test_follows_the_definition(clusters: int, neighbours: int) -> None:
    for seed in range(4):
        features = _points(40, 6, seed)
        centres, assignment = density_peaks(features, clusters, neighbours)
        assert (centres.tolist(), assignment.tolist()) == _by_definition(features, clusters, neighbours)


def test_batch_equals_single() -> None:
    batch = torch.stack([_points(30, 8, seed) for seed in range(5)])
    centres, assignment = density_peaks(batch, 6)
    for item in range(5):
        single = density_peaks(batch[item], 6)
        assert centres[item].tolist() == single[0].tolist()
        assert assignment[item].tolist() == single[1].tolist()


def test_separated_groups_are_found() -> None:
    groups = torch.arange(4).repeat_interleave(6)
    features = 50 * torch.eye(4)[groups] + _points(24, 4)
    _, assignment = density_peaks(features, 4)
    for group in range(4):
        assert len(set(assignment[groups == group].tolist())) == 1
    assert len(set(assignment.tolist())) == 4


def test_duplicates_do_not_all_become_centres() -> None:
    # Without a rule for equal densities each copy would get the largest delta of all.
    features = torch.cat((torch.ones(10, 3), 4 * torch.eye(3)))
    centres, _ = density_peaks(features, 4)
    assert sum(int(c) < 10 for c in centres) == 1


def test_one_cluster_and_identical_points() -> None:
    centres, assignment = density_peaks(torch.ones(5, 3), 1)
    assert (centres.tolist(), assignment.tolist()) == ([0], [0] * 5)
    centres, assignment = density_peaks(torch.ones(5, 3), 5)
    assert centres.tolist() == assignment.tolist() == list(range(5))


def test_distances_of_near_duplicates_keep_their_precision() -> None:
    base = 100 + _points(1, 512)
    features = torch.cat((base, base + 1e-3 * _points(6, 512, seed=1)))
    expected = torch.cdist(features.double(), features.double()) / math.sqrt(512)
    torch.testing.assert_close(scaled_distances(features[None])[0], expected.float(), rtol=1e-4, atol=1e-9)


def test_bad_number_of_clusters() -> None:
    for clusters in (0, 6):
        with pytest.raises(MethodError, match=f"form {clusters} clusters"):
            density_peaks(torch.ones(5, 3), clusters)
