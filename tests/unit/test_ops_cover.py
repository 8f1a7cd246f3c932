"""The greedy cover in rounds against the walk token by token; runs of frames against loops."""

from __future__ import annotations

import pytest
import torch

from tokensieve.ops.cover import greedy_cover
from tokensieve.ops.frame_groups import fuse_frames, over_frames
from tokensieve.ops.merge import MergeMap, apply_merge


def _walk(near: torch.Tensor, order: torch.Tensor) -> list[bool]:
    kept, visited = [False] * order.numel(), [False] * order.numel()
    for token in order.tolist():
        if not visited[token]:
            kept[token] = True
            visited = [seen or bool(near[token, other]) for other, seen in enumerate(visited)]
    return kept


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_cover_equals_the_walk(density: float) -> None:
    generator = torch.Generator().manual_seed(int(density * 100))
    half = torch.rand(4, 50, 50, generator=generator) < density
    near = half | half.transpose(1, 2) | torch.eye(50, dtype=torch.bool)
    order = torch.rand(4, 50, generator=generator).argsort(dim=1)
    kept = greedy_cover(near, order)
    for row in range(4):
        assert kept[row].tolist() == _walk(near[row], order[row])


def test_a_long_chain_of_decisions() -> None:
    index = torch.arange(80)
    near = ((index[:, None] - index).abs() <= 1)[None]
    assert greedy_cover(near, index[None])[0].nonzero().flatten().tolist() == list(range(0, 80, 2))


def test_without_any_neighbour_everything_is_kept() -> None:
    assert bool(greedy_cover(torch.zeros(1, 5, 5, dtype=torch.bool), torch.arange(5)[None]).all())


def test_fused_frames_are_means_of_runs() -> None:
    features = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 3, 4])
    fused = fuse_frames(features, starts)
    for number, (first, end) in enumerate(((0, 3), (3, 4), (4, 7))):
        torch.testing.assert_close(fused[number], features[first:end].mean(0))
    assert fuse_frames(features, torch.arange(7)) is features
    assert fuse_frames(features.bfloat16(), starts).dtype == torch.bfloat16


def test_a_map_of_fused_frames_becomes_one_of_frames() -> None:
    features = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    fused = fuse_frames(features, torch.tensor([0, 2]))
    in_fused = MergeMap(torch.tensor([1, 2, 7]), torch.tensor([0, 0, 1]), torch.tensor([0.25, 0.75, 1.0]))
    expected = apply_merge(fused.flatten(0, 1), in_fused, 2)
    # Patch 3 of the second run stands at token 2 * 4 + 3 of its first frame.
    first = in_fused._replace(source=torch.tensor([1, 2, 11]))
    spread = over_frames(first, torch.tensor([2, 2, 3]), 4)
    assert spread.source.tolist() == [1, 5, 2, 6, 11, 15, 19]
    torch.testing.assert_close(apply_merge(features.flatten(0, 1), spread, 2), expected)
