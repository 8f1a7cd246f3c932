"""PruneVid: scenes, merging, budgets, selection for a question."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.registry import build
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods.prunevid import (
    Scenes,
    find_scenes,
    group_clusters,
    merge_scenes,
    question_scores,
    ratio_for_budget,
    refine_labels,
    select_for_question,
)


def _video(cuts: tuple[int, ...] = (7,), frames: int = 16, tokens: int = 49, noise: float = 0.1) -> torch.Tensor:
    torch.manual_seed(0)
    scene = torch.zeros(frames, dtype=torch.long)
    for cut in cuts:
        scene[cut:] += 1
    return torch.randn(len(cuts) + 1, tokens, 24)[scene] + noise * torch.randn(frames, tokens, 24)


def _plan(features: torch.Tensor, **options: object) -> tuple[object, int]:
    frames, tokens, dim = features.shape
    layout = Layout.regular("video", frames, 1, tokens)
    plan = build("prunevid-merge", options).plan_tokens(TokenSample(features.reshape(-1, dim), layout))
    return plan.checked(layout.patches, "prunevid-merge"), plan.keep.numel()


def test_a_scene_cut_is_a_border() -> None:
    for cut in (3, 7, 8, 12):
        found = find_scenes(_video((cut,)), scenes=2 / 16)
        assert found.segments == [(0, cut - 1), (cut, 15)]


@pytest.mark.parametrize(
    ("labels", "refined"),
    [
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
        ([0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]),
        ([0, 0, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]),
        ([0, 0, 1, 2, 2], [0, 0, 0, 2, 2]),
        ([1, 2, 3], [0, 0, 0]),
        ([3, 1, 1], [1, 1, 1]),
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),
        ([0, 0, 2, 1, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]),
        ([5], [0]),
    ],
    ids=str,
)
def test_refinement(labels: list[int], refined: list[int]) -> None:
    assert refine_labels(labels) == refined


def test_refinement_leaves_no_single_frame_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    for frames in (2, 5, 16, 33):
        for _ in range(50):
            labels = torch.randint(0, 4, (frames,), generator=generator).tolist()
            refined = refine_labels(labels)
            assert all(len(list(run)) > 1 for _, run in itertools.groupby(refined)), labels
            assert set(refined) <= {*labels, 0}
            if all(len(list(run)) > 1 for _, run in itertools.groupby(labels)) and len(set(labels)) == len(
                list(itertools.groupby(labels))
            ):
                assert refined == labels


def test_identical_frames_stand_still() -> None:
    torch.manual_seed(1)
    features = torch.randn(1, 49, 24).repeat(12, 1, 1)
    found = find_scenes(features)
    assert found.static.all()
    merged, static, dynamic = merge_scenes(features, found)
    assert static == [24] * len(found.segments)
    assert dynamic == [0] * len(found.segments)
    assert (merged.source < 49 * 12).all()


def test_a_segment_of_one_frame_moves() -> None:
    found = find_scenes(_video(frames=1))
    assert found.segments == [(0, 0)]
    assert not found.static.any()


def test_static_similarity_is_the_mean_over_pairs() -> None:
    features = _video((), frames=6, tokens=20, noise=0.6)
    units = torch.nn.functional.normalize(features, dim=-1)
    pairs = torch.stack([(units[a] * units[b]).sum(-1) for a in range(6) for b in range(6) if a != b]).mean(dim=0)
    threshold = float(pairs.sort().values[9:11].mean())
    found = find_scenes(features, threshold=threshold, scenes=0.1)
    assert found.segments == [(0, 5)]
    assert torch.equal(found.static[0], pairs > threshold)


def test_small_groups_stay_and_large_ones_halve() -> None:
    assert [group_clusters(n, 0.5) for n in (1, 14, 15, 49)] == [1, 14, 7, 24]
    assert [group_clusters(n, 0.01) for n in (14, 15)] == [14, 1]
    assert [group_clusters(n, 0.5, 0) for n in (1, 2, 14)] == [1, 1, 7]


def test_merged_tokens_are_means_of_their_members() -> None:
    features = _video((6,), frames=10, noise=0.5)
    found = find_scenes(features)
    merged, static, dynamic = merge_scenes(features, found)
    flat, total = features.flatten(0, 1), merged.source.numel()
    assert total == sum(static) + sum(dynamic)
    weights = torch.zeros(total).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
    assert torch.allclose(weights, torch.ones(total), atol=1e-5)
    assert merged.merge_map.source.sort().values.tolist() == list(range(490)), "every token is merged exactly once"
    for row in range(total):
        members = merged.merge_map.source[merged.merge_map.target == row]
        assert torch.allclose(merged.features[row], flat[members].mean(dim=0), atol=1e-5)
        assert merged.source[row] in members
    start = 0
    for (first, last), size, moving in zip(found.segments, static, dynamic, strict=True):
        assert (merged.source[start : start + size] // 49 == first).all()
        frames = (merged.source[start + size : start + size + moving] // 49).view(last - first + 1, -1)
        assert (frames == torch.arange(first, last + 1)[:, None]).all()
        start += size + moving


def test_the_budget_is_the_largest_total_within_reach() -> None:
    found = find_scenes(_video((6,), frames=10, noise=0.6))

    def total(ratio: float, small: int) -> int:
        return sum(times * group_clusters(size, ratio, small) for size, times in found.groups() if size)

    for target in range(40, 490, 45):
        ratio, small = ratio_for_budget(found, target)
        assert total(ratio, small) <= target
        denser = [total(step / 2000, small) for step in range(1, 2001)]
        assert total(ratio, small) == max(count for count in denser if count <= target)
        assert small == (14 if total(0.0, 14) <= target else 0)


def test_a_target_below_one_token_per_group_keeps_one() -> None:
    found = Scenes([(0, 3), (4, 7)], torch.zeros(2, 16, dtype=torch.bool))
    ratio, small = ratio_for_budget(found, 3)
    merged, _, dynamic = merge_scenes(_video(frames=8, tokens=16), found, ratio, small=small)
    assert dynamic == [4, 4]
    assert merged.source.numel() == 8


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.5])
def test_retention_bounds_the_total(retention: float) -> None:
    features = _video((5, 11), noise=0.6)
    _, count = _plan(features, retention=retention)
    assert count <= round(16 * 49 * retention)
    assert count > 0.8 * 16 * 49 * retention


def test_published_ratio_ignores_the_retention() -> None:
    features = _video((5, 11), noise=0.6)
    merged, *_ = merge_scenes(features, find_scenes(features))
    assert _plan(features, cluster_ratio=0.5, retention=0.1)[1] == merged.source.numel()


@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (2, 4), (3, 16), (6, 15)])
def test_small_videos_and_pictures(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    _, count = _plan(torch.randn(*shape, 8), retention=0.3)
    assert 1 <= count <= shape[0] * shape[1]


def test_bfloat16_keeps_the_dtype() -> None:
    features = _video().bfloat16()
    merged, *_ = merge_scenes(features, find_scenes(features))
    full, *_ = merge_scenes(features.float(), find_scenes(features.float()))
    assert merged.features.dtype == torch.bfloat16
    assert torch.equal(merged.source, full.source)


def test_selection_takes_the_best_of_every_part() -> None:
    torch.manual_seed(3)
    attention = torch.rand(4, 5, 10 + 3 * 6 + 2 * 4)
    scores = question_scores(attention)
    assert torch.equal(scores, attention.flatten(0, 1).max(dim=0).values)
    kept = select_for_question(scores, [10, 0], [18, 8], [3, 2])
    blocks = [(0, 10), (10, 6), (16, 6), (22, 6), (28, 4), (32, 4)]
    expected = []
    for start, size in blocks:
        best = scores[start : start + size].argsort(descending=True)[: int(size * 0.4)]
        expected += sorted((best + start).tolist())
    assert kept.tolist() == expected
    assert torch.equal(select_for_question(scores, [10, 0], [18, 8], [3, 2], alpha=1.0), torch.arange(36))
    with pytest.raises(MethodError, match="10 static and 18 dynamic"):
        select_for_question(scores, [10], [18], [3])


@pytest.mark.parametrize("options", [{"cluster_ratio": 0.0}, {"scenes": 1.5}, {"neighbours": 0}], ids=str)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(MethodError, match="must be"):
        build("prunevid-merge", options)
