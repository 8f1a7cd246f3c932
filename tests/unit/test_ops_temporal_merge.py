"""HoliTom's functions against plain loops, and the token counts that follow from its rules."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops import temporal_merge
from tokensieve.ops.cluster import density_peaks
from tokensieve.ops.merge import apply_merge
from tokensieve.ops.segment import segment_static
from tokensieve.ops.similarity import neighbour_cosine


def _scenes(noise: float = 0.35, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Nine frames of 36 patches: two shots with moving parts, then white noise; and random attention."""
    generator = torch.Generator().manual_seed(seed)
    shots = [torch.randn(36, 16, generator=generator) for _ in range(2)]
    frames = [shots[0]] * 4 + [shots[1]] * 3
    video = torch.stack(frames) + noise * torch.randn(7, 36, 16, generator=generator)
    moving = torch.rand(7, 36, generator=generator) < 0.1
    video[moving] = torch.randn(int(moving.sum()), 16, generator=generator)
    video = torch.cat((video, torch.randn(2, 36, 16, generator=generator)))
    return video, torch.rand(9, 36, generator=generator)


def _plain_outer(
    features: torch.Tensor, attention: torch.Tensor, retention: float, plain_mean: bool, grid: bool
) -> list[tuple[int, torch.Tensor]]:
    """(source, feature) of every output token, following the steps one token at a time."""
    frames, tokens, _ = features.shape
    similarity = neighbour_cosine(features)
    segments, reduced = segment_static(similarity, 0.8)
    ratio = min(1.0, retention / ((frames * tokens - reduced) / (frames * tokens)))
    out = []
    for first, last in segments:
        still = [n for n in range(tokens) if last > first and bool((similarity[first:last, n] > 0.8).all())]
        static = []
        clusters = round(len(still) * ratio)
        if clusters:
            means = torch.stack([features[first : last + 1, n].mean(0) for n in still])
            centres, assignment = density_peaks(means, clusters)
            for number, centre in enumerate(centres.tolist()):
                members = [i for i in range(len(still)) if assignment[i] == number and i != centre]
                token = means[centre]
                if members and plain_mean:
                    token = means[[centre, *members]].mean(0)
                elif members:
                    token = 0.6 * token + 0.4 * means[members].mean(0)
                static.append((first * tokens + still[centre], token))
        for t in range(first, last + 1):
            dynamic = [n for n in range(tokens) if n not in still]
            wanted = math.ceil(len(dynamic) * ratio)
            best = sorted(dynamic, key=lambda n: (-float(attention[t, n]), n))[:wanted]
            frame = [(t * tokens + n, features[t, n]) for n in sorted(best)]
            if t == first:
                frame = sorted(static + frame, key=lambda token: token[0]) if grid else static + frame
            out += frame
    return out


@pytest.mark.parametrize("layout", ["flat", "grid"])
@pytest.mark.parametrize("plain_mean", [False, True])
@pytest.mark.parametrize("retention", [0.05, 0.2, 0.5])
def test_outer_merge_equals_the_plain_steps(layout: str, plain_mean: bool, retention: float) -> None:
    for seed in range(3):
        features, attention = _scenes(seed=seed)
        expected = _plain_outer(features, attention, retention, plain_mean, layout == "grid")
        merged = temporal_merge.outer_merge(features, attention, retention, plain_mean=plain_mean, layout=layout)
        assert merged.source.tolist() == [source for source, _ in expected]
        torch.testing.assert_close(merged.features, torch.stack([token for _, token in expected]))


def test_merge_map_explains_every_token() -> None:
    features, attention = _scenes()
    for context_ratio in (0.0, 0.4):
        merged = temporal_merge.outer_merge(features, attention, 0.3, context_ratio=context_ratio)
        size = merged.source.numel()
        assert len(set(merged.source.tolist())) == size
        remade = apply_merge(features.flatten(0, 1), merged.merge_map, size)
        torch.testing.assert_close(remade, merged.features, rtol=0, atol=1e-5)
        totals = torch.zeros(size).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
        torch.testing.assert_close(totals, torch.ones(size))
        # The token that stands for the others takes part in its own merge.
        own = set(zip(merged.merge_map.source.tolist(), merged.merge_map.target.tolist(), strict=True))
        assert all((source, place) in own for place, source in enumerate(merged.source.tolist()))


def test_white_noise_is_only_pruned() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(5, 40, 64, generator=generator)
    attention = torch.rand(5, 40, generator=generator)
    merged = temporal_merge.outer_merge(features, attention, 0.22)
    assert merged.source.numel() == 5 * math.ceil(40 * 0.22)
    assert torch.equal(merged.features, features.flatten(0, 1)[merged.source])


def test_constant_video_becomes_one_frame() -> None:
    frame = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(4))
    merged = temporal_merge.outer_merge(frame.repeat(8, 1, 1), torch.rand(8, 30), 0.25)
    assert merged.source.tolist() == list(range(30))
    torch.testing.assert_close(merged.features, frame[0])
    assert temporal_merge.adjusted_retention(0.25, 8, 30, 210) == 1.0


def test_context_tokens_keep_the_count_and_order() -> None:
    features, attention = _scenes()
    plain = temporal_merge.outer_merge(features, attention, 0.3)
    context = temporal_merge.outer_merge(features, attention, 0.3, context_ratio=0.5)
    frames = [(merged.source // 36).bincount(minlength=9).tolist() for merged in (plain, context)]
    assert frames[0] == frames[1]
    # The last frames have no static part: their tokens stay in patch order.
    tail = context.source[context.source // 36 >= 7]
    assert tail.tolist() == sorted(tail.tolist())
    unchanged = (context.features == features.flatten(0, 1)[context.source]).all(dim=1)
    assert int((~unchanged).sum()) > 0


def test_outer_merge_keeps_half_precision() -> None:
    features, attention = _scenes()
    merged = temporal_merge.outer_merge(features.bfloat16(), attention, 0.3)
    assert merged.features.dtype == torch.bfloat16


def test_outer_merge_errors() -> None:
    features, attention = _scenes()
    with pytest.raises(MethodError, match="attention"):
        temporal_merge.outer_merge(features, attention[:, :5], 0.3)
    with pytest.raises(MethodError, match=r"context_ratio is 1\.5"):
        temporal_merge.outer_merge(features, attention, 0.3, context_ratio=1.5)
    with pytest.raises(MethodError, match="leaves no token"):
        temporal_merge.outer_merge(torch.ones(2, 10, 4), torch.rand(2, 10), 0.01)


def _plain_inner(
    hidden: torch.Tensor, attention: torch.Tensor, start: int, length: int, drop_ratio: float
) -> tuple[list[int], torch.Tensor]:
    span = range(start, start + length)
    wanted = round(length * (1 - drop_ratio))
    kept = sorted(sorted(span, key=lambda i: (-float(attention[i]), i))[:wanted])
    new = hidden.clone()
    for i in span:
        if i not in kept:
            cosine = [float(torch.cosine_similarity(hidden[i], hidden[j], dim=0)) for j in kept]
            target = kept[cosine.index(max(cosine))]
            new[target] = (new[target] + hidden[i]) / 2
    positions = [i for i in range(len(hidden)) if i not in span or i in kept]
    return positions, new[positions]


@pytest.mark.parametrize("drop_ratio", [0.0, 0.3, 0.5, 0.9])
def test_inner_merge_equals_the_plain_steps(drop_ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, attention = torch.randn(50, 8, generator=generator), torch.rand(50, generator=generator)
    positions, expected = _plain_inner(hidden, attention, 7, 31, drop_ratio)
    kept, new = temporal_merge.inner_merge(hidden, attention, 7, 31, drop_ratio)
    assert kept.tolist() == positions
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    text = [place for place, position in enumerate(positions) if not 7 <= position < 38]
    assert torch.equal(new[text], hidden[kept[text]])


def test_inner_plan_describes_the_inner_merge() -> None:
    generator = torch.Generator().manual_seed(1)
    visual, scores = torch.randn(40, 8, generator=generator), torch.rand(40, generator=generator)
    keep, merge_map = temporal_merge.inner_plan(visual, scores, 0.5)
    _, new = temporal_merge.inner_merge(visual, scores, 0, 40, 0.5)
    torch.testing.assert_close(apply_merge(visual, merge_map, keep.numel()), new)


def test_inner_merge_errors() -> None:
    hidden, attention = torch.randn(10, 4), torch.rand(10)
    with pytest.raises(MethodError, match=r"span 5\.\.11"):
        temporal_merge.inner_merge(hidden, attention, 5, 7)
    with pytest.raises(MethodError, match=r"drop_ratio is 1\.0"):
        temporal_merge.inner_merge(hidden, attention, 2, 5, 1.0)
    with pytest.raises(MethodError, match=r"states \[T, D\]"):
        temporal_merge.inner_plan(hidden, attention[:3], 0.5)
