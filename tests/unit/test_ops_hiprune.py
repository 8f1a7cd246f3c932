"""HiPrune's functions against a plain loop, and their edge cases."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import hiprune


def _scores(frames: int, tokens: int, scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.rand(2, frames, tokens, generator=generator) * scale
    return both[0], both[1]


def _plain(
    object_score: list[float], deep_score: list[float], budget: int, width: int, alpha: float, official: bool
) -> list[int]:
    total = len(object_score)
    anchors = sorted(range(total), key=lambda i: (-object_score[i], i))[: round(budget * alpha / 5)]
    chosen = {min(max(a + step, 0), total - 1) for a in anchors for step in (0, -1, 1, -width, width)}
    deep = [score - (i in chosen) for i, score in enumerate(deep_score)]
    candidates = range(total) if official else [i for i in range(total) if i not in chosen]
    registers = sorted(candidates, key=lambda i: (-deep[i], i))[: budget - len(chosen)]
    return sorted(chosen | set(registers))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("scale", [0.01, 2.0])
@pytest.mark.parametrize(("budget", "alpha"), [(12, 0.5), (40, 0.1), (30, 0.9), (60, 0.3)])
def test_equals_the_plain_steps(official: bool, scale: float, budget: int, alpha: float) -> None:
    object_score, deep_score = _scores(6, 70, scale)
    mask = hiprune.select_hierarchical(object_score, deep_score, budget, grid_width=10, alpha=alpha, official=official)
    for frame in range(6):
        expected = _plain(object_score[frame].tolist(), deep_score[frame].tolist(), budget, 10, alpha, official)
        assert mask[frame].nonzero()[:, 0].tolist() == expected


def test_corrected_mode_always_meets_the_budget() -> None:
    for budget in (1, 2, 3, 7, 13, 35, 70):
        for alpha in (0.0, 0.1, 0.8, 1.0):
            mask = hiprune.select_hierarchical(*_scores(9, 70, 3.0), budget, grid_width=7, alpha=alpha)
            assert mask.sum(dim=1).tolist() == [budget] * 9


def test_official_mode_loses_tokens_on_scores_above_one() -> None:
    object_score, deep_score = _scores(1, 70, 5.0)
    deep_score = deep_score + 5 * object_score
    mask = hiprune.select_hierarchical(object_score, deep_score, 30, grid_width=10, alpha=0.5, official=True)
    assert int(mask.sum()) < 30


def test_official_mode_refuses_buffers_beyond_the_budget() -> None:
    with pytest.raises(MethodError, match="exceed the budget of 3"):
        hiprune.select_hierarchical(*_scores(2, 100), 3, grid_width=10, alpha=1.0, official=True)


def test_alpha_zero_is_the_deep_attention_alone() -> None:
    object_score, deep_score = _scores(2, 50)
    mask = hiprune.select_hierarchical(object_score, deep_score, 9, grid_width=10, alpha=0.0)
    for frame in range(2):
        assert set(mask[frame].nonzero()[:, 0].tolist()) == set(deep_score[frame].topk(9).indices.tolist())


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [(0, [0, 1, 24]), (48, [24, 47, 48, 49, 72]), (575, [551, 574, 575]), (30, [6, 29, 30, 31, 54])],
)
def test_buffers_wrap_and_clamp(anchor: int, expected: list[int]) -> None:
    score = torch.zeros(1, 576)
    score[0, anchor] = 1.0
    assert hiprune.anchors_and_buffers(score, 1, 24)[0].nonzero()[:, 0].tolist() == expected


def test_frames_with_different_numbers_of_anchors() -> None:
    score = _scores(3, 40)[0]
    marked = hiprune.anchors_and_buffers(score, torch.tensor([0, 1, 3]), 8)
    assert int(marked[0].sum()) == 0
    assert torch.equal(marked[1], hiprune.anchors_and_buffers(score[1:2], 1, 8)[0])
    assert torch.equal(marked[2], hiprune.anchors_and_buffers(score[2:], 3, 8)[0])


def test_counts() -> None:
    assert [hiprune.anchor_count(b, 0.1) for b in (24, 25, 26, 75, 192)] == [0, 0, 1, 2, 4]
    assert hiprune.frame_share(640, 5) == 128
    assert hiprune.frame_share(643, 5) == 128
    assert hiprune.frame_share(3, 5) == 1
    with pytest.raises(MethodError, match=r"alpha is 1\.2"):
        hiprune.anchor_count(10, 1.2)


def test_merged_unit_scores() -> None:
    score = torch.arange(12.0)
    assert hiprune.merged_unit_scores(score).tolist() == [1.5, 5.5, 9.5]
    assert hiprune.merged_unit_scores(score, 4, torch.tensor([2, 0, 1])).tolist() == [9.5, 1.5, 5.5]


def test_bad_shapes_and_budgets() -> None:
    object_score, deep_score = _scores(2, 30)
    with pytest.raises(MethodError, match="equal shape"):
        hiprune.select_hierarchical(object_score, deep_score[:1], 5, grid_width=6)
    for budget in (0, 31):
        with pytest.raises(MethodError, match=f"cannot keep {budget} of 30"):
            hiprune.select_hierarchical(object_score, deep_score, budget, grid_width=6)
