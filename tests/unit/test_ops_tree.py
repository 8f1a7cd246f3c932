"""Trees over consecutive frames against plain loops over tokens."""

from __future__ import annotations

import pytest
import torch

from tokensieve.ops.merge import apply_merge
from tokensieve.ops.tree import Trees, link_frames, previous_frame_matches, tree_means

SEGMENTS = [(0, 3), (4, 4), (5, 8)]


def _video(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Nine frames of ten drifting tokens, and which of them are free."""
    torch.manual_seed(seed)
    steps = torch.randn(9, 10, 6) * 0.4
    return steps.cumsum(dim=0) + torch.randn(1, 10, 6), torch.rand(9, 10) > 0.2


def _loop_matches(features: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    frames, tokens, _ = features.shape
    similarity, parent = torch.full((frames, tokens), -1.0), torch.zeros(frames, tokens, dtype=torch.long)
    for t in range(1, frames):
        for n in range(tokens):
            for m in range(tokens):
                cosine = torch.cosine_similarity(features[t, n], features[t - 1, m], dim=0)
                if free[t, n] and free[t - 1, m] and cosine > similarity[t, n]:
                    similarity[t, n], parent[t, n] = cosine, m
    return similarity, parent


def _loop_sums(features: torch.Tensor, trees: Trees, parent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sizes collected from the last frame to the first."""
    sums, sizes = features.clone(), torch.ones(features.shape[:2])
    for t in range(features.shape[0] - 1, 0, -1):
        for n in range(features.shape[1]):
            if trees.linked[t, n]:
                sums[t - 1, parent[t, n]] += sums[t, n]
                sizes[t - 1, parent[t, n]] += sizes[t, n]
    return sums, sizes


def test_matches_equal_a_loop_over_pairs() -> None:
    features, free = _video()
    similarity, parent = previous_frame_matches(features, free)
    expected, expected_parent = _loop_matches(features, free)
    assert torch.allclose(similarity, expected, atol=1e-6)
    assert torch.equal(parent[expected > -1], expected_parent[expected > -1])
    assert (similarity[0] == -1).all()
    assert (similarity[~free] == -1).all()


@pytest.mark.parametrize("keep", [0, 4, 10])
@pytest.mark.parametrize("threshold", [-0.5, 0.5, 0.9])
def test_links(threshold: float, keep: int) -> None:
    features, free = _video()
    similarity, parent = previous_frame_matches(features, free)
    trees = link_frames(similarity, parent, SEGMENTS, threshold, keep)
    for first, last in SEGMENTS:
        part = slice(first, last + 1)
        assert not trees.linked[first].any(), "a link crosses the border of a segment"
        assert int((~trees.linked[part]).sum()) >= keep * (last - first + 1)
        wanted = similarity[part] > threshold
        wanted[0] = False
        if int(wanted.sum()) <= (10 - keep) * (last - first + 1):
            assert torch.equal(trees.linked[part], wanted)
        elif trees.linked[part].any():
            assert similarity[part][trees.linked[part]].min() > similarity[part][wanted & ~trees.linked[part]].max()
    for t in range(1, 9):
        for n in range(10):
            above = trees.root[t - 1, parent[t, n]] if trees.linked[t, n] else t * 10 + n
            assert trees.root[t, n] == above
    count = torch.zeros(9, 10, dtype=torch.long)
    for t, n in trees.linked.nonzero().tolist():
        count[t - 1, parent[t, n]] += 1
    assert torch.equal(trees.children, count)


@pytest.mark.parametrize("by_children", [False, True])
def test_means_equal_sums_collected_backwards(by_children: bool) -> None:
    features, free = _video(1)
    similarity, parent = previous_frame_matches(features, free)
    trees = link_frames(similarity, parent, SEGMENTS, 0.6, 0)
    survives = free & ~trees.linked
    assert 10 < int(survives.sum()) < int(free.sum()), "the example links nothing or everything"
    merged = tree_means(features, trees, survives, by_children=by_children)
    assert torch.equal(merged.source, survives.flatten().nonzero()[:, 0])
    sums, sizes = _loop_sums(features, trees, parent)
    divisor = 1 + trees.children if by_children else sizes
    expected = (sums / divisor.unsqueeze(-1))[survives]
    assert torch.allclose(merged.features, expected, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    assert torch.allclose(remade, merged.features, atol=1e-5)
    if not by_children:
        totals = torch.zeros(merged.source.numel()).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
        assert torch.allclose(totals, torch.ones_like(totals), atol=1e-6)
