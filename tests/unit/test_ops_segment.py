"""Static segmentation against brute force over all segmentations."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.segment import segment_static, static_run_counts


def _runs(frames: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.rand(frames - 1, tokens, generator=torch.Generator().manual_seed(seed))


def _gain(similar: torch.Tensor, first: int, last: int) -> int:
    if first == last:
        return 0
    return int(similar[first:last].all(dim=0).sum()) * (last - first)


def _dynamic_programme(similar: torch.Tensor, longest: int) -> tuple[list[tuple[int, int]], int]:
    """The recurrence written out: a longer window wins only if it is strictly better."""
    best: list[int] = []
    width: list[int] = []
    for i in range(similar.shape[0] + 1):
        value, chosen = (best[i - 1] if i else 0), 1
        for w in range(2, min(i + 1, longest) + 1):
            candidate = (best[i - w] if i - w >= 0 else 0) + _gain(similar, i - w + 1, i)
            if candidate > value:
                value, chosen = candidate, w
        best.append(value)
        width.append(chosen)
    segments, i = [], len(best) - 1
    while i >= 0:
        segments.append((i - width[i] + 1, i))
        i -= width[i]
    return segments[::-1], best[-1]


def test_run_counts_by_definition() -> None:
    similar = _runs(9, 25, seed=0) > 0.3
    counts = static_run_counts(similar)
    for t in range(8):
        for r in range(1, 9):
            expected = int(similar[t - r + 1 : t + 1].all(dim=0).sum()) if r <= t + 1 else 0
            assert int(counts[t, r]) == expected
    assert counts[:, 0].tolist() == [25] * 8


@pytest.mark.parametrize("longest", [1, 2, 3, 1024])
def test_segmentation_follows_the_recurrence(longest: int) -> None:
    for seed in range(12):
        # Few tokens make ties common.
        similarity = _runs(12, 3 + seed, seed)
        expected = _dynamic_programme(similarity > 0.35, longest)
        assert segment_static(similarity, 0.35, longest) == expected


def test_no_segmentation_saves_more() -> None:
    for seed in range(4):
        similarity = _runs(8, 20, seed)
        similar = similarity > 0.3
        best = 0
        for cuts in itertools.product([False, True], repeat=7):
            bounds = [0] + [t + 1 for t in range(7) if cuts[t]] + [8]
            best = max(best, sum(_gain(similar, a, b - 1) for a, b in itertools.pairwise(bounds)))
        segments, reduced = segment_static(similarity, 0.3)
        assert reduced == best
        assert reduced == sum(_gain(similar, first, last) for first, last in segments)


def test_extremes() -> None:
    assert segment_static(torch.ones(7, 5), 0.8) == ([(0, 7)], 35)
    assert segment_static(torch.zeros(3, 5), 0.8) == ([(t, t) for t in range(4)], 0)
    assert segment_static(torch.zeros(0, 5), 0.8) == ([(0, 0)], 0)
    # The threshold itself does not count as similar.
    assert segment_static(torch.full((1, 5), 0.5), 0.5)[1] == 0
    with pytest.raises(MethodError, match="max_window is 0"):
        segment_static(torch.zeros(3, 5), 0.8, 0)
