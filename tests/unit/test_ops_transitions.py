"""Segments that end where consecutive frames differ."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokensieve.ops.transitions import segment_transitions, transition_similarity


def _loop(similarity: list[float], threshold: float, minimum: int) -> list[tuple[int, int]]:
    """Cut below the threshold, then cut the smallest of the rest one by one."""
    cuts = {t for t, value in enumerate(similarity) if value < threshold}
    while len(cuts) + 1 < minimum and len(cuts) < len(similarity):
        cuts.add(min((t for t in range(len(similarity)) if t not in cuts), key=lambda t: (similarity[t], t)))
    segments, start = [], 0
    for t in sorted(cuts):
        segments.append((start, t))
        start = t + 1
    return [*segments, (start, len(similarity))]


@pytest.mark.parametrize("minimum", [0, 1, 4, 30])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, 2.0])
def test_equals_a_loop_over_cuts(minimum: int, threshold: float) -> None:
    torch.manual_seed(0)
    for frames in (1, 2, 9, 16):
        similarity = torch.rand(frames - 1)
        expected = _loop(similarity.tolist(), threshold, minimum)
        assert segment_transitions(similarity, threshold, minimum) == expected


def test_equal_values_are_cut_from_the_front() -> None:
    assert segment_transitions(torch.ones(5), 0.9, 3) == [(0, 0), (1, 1), (2, 5)]


def test_similarity_is_the_cosine_of_neighbours() -> None:
    torch.manual_seed(1)
    vectors = torch.randn(6, 9)
    vectors[3] = 0
    expected = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.pairwise(vectors)]
    assert torch.allclose(transition_similarity(vectors), torch.stack(expected), atol=1e-6)
    assert transition_similarity(vectors[:1]).shape == (0,)
    assert transition_similarity(vectors.bfloat16()).dtype == torch.float32
