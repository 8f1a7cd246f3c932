"""Ragged density-peak clustering against a plain loop, and against the clustering of equal groups."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.cluster import density_peaks
from tokensieve.ops.peaks import peak_clusters, peak_scores, ragged_clusters


def _loop_scores(points: torch.Tensor, neighbours: int, strict: bool) -> list[float]:
    """Density times delta of one group, member by member."""
    count, dim = points.shape
    distance = [[float((a - b).norm()) / math.sqrt(dim) for b in points.double()] for a in points.double()]
    density = []
    for row in distance:
        nearest = sorted(row)[: min(neighbours, count)]
        density.append(math.exp(-sum(d * d for d in nearest) / len(nearest)))
    scores = []
    for i in range(count):
        denser = [
            j for j in range(count) if density[j] > density[i] or (not strict and density[j] == density[i] and j < i)
        ]
        delta = min((distance[i][j] for j in denser), default=max(map(max, distance)))
        scores.append(density[i] * delta)
    return scores


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sizes", [(9,), (5, 9, 1, 7), (2, 3)])
def test_scores_equal_a_loop_over_members(sizes: tuple[int, ...], strict: bool) -> None:
    torch.manual_seed(0)
    widest = max(sizes)
    points = torch.randn(len(sizes), widest, 6)
    valid = torch.arange(widest) < torch.tensor(sizes)[:, None]
    distances = torch.cdist(points.double(), points.double()) / math.sqrt(6)
    scores = peak_scores(distances, 4, valid, strict=strict)
    for group, size in enumerate(sizes):
        expected = torch.tensor(_loop_scores(points[group, :size], 4, strict), dtype=torch.float64)
        assert torch.allclose(scores[group, :size].exp(), expected, atol=1e-9)
        assert torch.isinf(scores[group, size:]).all()


def test_neighbours_may_differ_between_groups() -> None:
    torch.manual_seed(1)
    points = torch.randn(2, 8, 5)
    distances = torch.cdist(points, points)
    together = peak_scores(distances, torch.tensor([2, 6]))
    assert torch.equal(together[0], peak_scores(distances[:1], 2)[0])
    assert torch.equal(together[1], peak_scores(distances[1:], 6)[0])


def test_strict_lets_both_of_two_duplicates_lead() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])[None]
    distances = torch.cdist(points, points)
    loose, strict = (peak_scores(distances, 2, strict=flag)[0] for flag in (False, True))
    assert loose[1] < loose[[0, 2, 3]].min()
    assert torch.isfinite(loose[1])
    assert strict[1] == strict[0]


def test_large_norms_keep_their_order() -> None:
    """Densities far below the smallest float64 still rank."""
    torch.manual_seed(2)
    points = torch.randn(1, 12, 4) * 60
    scores = peak_scores(torch.cdist(points, points).double() / 2, 5)[0]
    assert torch.isfinite(scores).all()
    assert scores.unique().numel() == 12


def test_clusters_equal_those_of_equal_groups() -> None:
    torch.manual_seed(3)
    points = torch.randn(4, 20, 8)
    ours = peak_clusters(points, 6, 6)
    centres, assignment = density_peaks(points, 6, 7)
    assert torch.equal(ours.centres.sort(dim=1).values, centres)
    assert torch.equal(ours.centres.gather(1, ours.assignment), centres.gather(1, assignment))


def test_blocks_change_nothing() -> None:
    torch.manual_seed(4)
    points = torch.randn(7, 15, 8)
    valid = torch.arange(15) < torch.tensor([15, 3, 9, 4, 15, 8, 2])[:, None]
    clusters = torch.tensor([4, 3, 1, 2, 5, 8, 1])
    whole = peak_clusters(points, clusters, 5, valid)
    blocks = peak_clusters(points, clusters, 5, valid, max_bytes=1)
    exists = torch.arange(8) < clusters[:, None]
    assert torch.equal(whole.centres[exists], blocks.centres[exists])
    assert torch.equal(whole.assignment[valid], blocks.assignment[valid])


def test_ragged_groups_equal_groups_alone() -> None:
    torch.manual_seed(5)
    sizes, clusters = torch.tensor([6, 0, 11, 4, 1, 9]), torch.tensor([2, 0, 5, 4, 1, 1])
    points = torch.randn(int(sizes.sum()), 7)
    label, centres = ragged_clusters(points, sizes, clusters, groups_per_block=2)
    assert centres.numel() == clusters.sum()
    assert torch.equal(label[centres], torch.arange(centres.numel()))
    start = first = 0
    for size, count in zip(sizes.tolist(), clusters.tolist(), strict=True):
        part = slice(start, start + size)
        if 0 < count < size:
            alone = peak_clusters(points[None, part], count, min(count, 7))
            assert torch.equal(label[part] - first, alone.assignment[0])
            assert torch.equal(centres[first : first + count] - start, alone.centres[0])
        elif count:
            assert torch.equal(centres[first : first + count], torch.arange(start, start + size))
        start, first = start + size, first + count


def test_groups_with_as_many_clusters_as_members_stay() -> None:
    label, centres = ragged_clusters(torch.randn(5, 3), torch.tensor([2, 3]), torch.tensor([2, 3]))
    assert label.tolist() == centres.tolist() == [0, 1, 2, 3, 4]
    label, centres = ragged_clusters(torch.randn(0, 3), torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert label.numel() == centres.numel() == 0


def test_identical_members_join_the_first_centre() -> None:
    found = peak_clusters(torch.ones(1, 5, 3), 2, 2)
    assert found.centres.tolist() == [[0, 1]]
    assert found.assignment.tolist() == [[0, 1, 0, 0, 0]]


@pytest.mark.parametrize("clusters", [0, 4])
def test_impossible_numbers_of_clusters_are_refused(clusters: int) -> None:
    with pytest.raises(MethodError, match=r"cannot form \[.*\] clusters"):
        peak_clusters(torch.zeros(1, 3, 2), clusters, 2)
