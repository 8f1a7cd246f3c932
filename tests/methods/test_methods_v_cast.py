"""V-CAST against a plain loop and the properties its specification lists."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.core.budget import allocate as allocate_budget
from tokensieve.core.layout import Layout
from tokensieve.core.registry import build
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods import v_cast


def _clip(frames: int = 8, tokens: int = 30, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(tokens, dim, generator=generator)
    shift = torch.randn(frames, 1, dim, generator=generator)
    return scene + shift + 0.3 * torch.randn(frames, tokens, dim, generator=generator)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / (max(float(a.norm()), 1e-6) * max(float(b.norm()), 1e-6))


def _plain_budget(features: torch.Tensor, retention: float) -> tuple[list[float], list[int]]:
    """The released allocation, one token at a time."""
    frames, tokens, _ = features.shape
    means = [frame.double().mean(0) for frame in features]
    means = [mean / max(float(mean.norm()), 1e-6) for mean in means]
    bend = [1.0] * frames
    for t in range(1, frames - 1):
        bend[t] = 1 - _cosine(means[t] - means[t - 1], means[t + 1] - means[t])
    weights = [math.exp(c / 0.7) for c in bend]
    total = max(min(max(round(frames * tokens * retention), 1), frames * tokens), frames)
    shares = [w / sum(weights) * (total - frames) for w in weights]
    counts = [1 + min(math.floor(share), tokens - 1) for share in shares]
    fraction = [-1.0 if k >= tokens else s - math.floor(s) for k, s in zip(counts, shares, strict=True)]
    for _ in range(total - sum(counts)):
        best = fraction.index(max(fraction))
        if fraction[best] < 0:
            break
        counts[best] += 1
        if counts[best] >= tokens:
            fraction[best] = -1.0
    return bend, counts


@pytest.mark.parametrize("retention", [0.05, 0.25, 0.6, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_budget_equals_the_plain_steps(retention: float, seed: int) -> None:
    features = _clip(frames=5 + 3 * seed, seed=seed)
    bend, counts = v_cast.frame_budget(features, retention, remainder="official")
    expected_bend, expected_counts = _plain_budget(features, retention)
    torch.testing.assert_close(bend, torch.tensor(expected_bend), rtol=0, atol=1e-5)
    assert counts.tolist() == expected_counts


@pytest.mark.parametrize("score", ["hybrid", "outlier", "norm"])
def test_scores_equal_the_plain_steps(score: v_cast.Score) -> None:
    features = _clip(3, 7)
    vectors = v_cast.frame_vectors(features)
    scores = v_cast.token_scores(features, vectors, score)
    for t in range(3):
        norms = [float(x.norm()) for x in features[t]]
        for n in range(7):
            outlier = 1 - _cosine(features[t, n], vectors[t])
            energy = (norms[n] - min(norms)) / (max(norms) - min(norms) + 1e-6)
            expected = {"hybrid": outlier + energy, "outlier": outlier, "norm": energy}[score]
            assert float(scores[t, n]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("remainder", ["fair", "official"])
@pytest.mark.parametrize("retention", [0.01, 0.05, 0.15, 0.25, 0.5, 0.9])
def test_counts_add_up(remainder: v_cast.Remainder, retention: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for frames, tokens in ((2, 9), (3, 400), (7, 49), (16, 13), (33, 100), (64, 9), (64, 400)):
        weights = v_cast.frame_weights(2 * torch.rand(frames, generator=generator))
        total = v_cast.total_budget(frames, tokens, retention)
        counts = v_cast.allocate(weights, total, tokens, remainder=remainder)
        assert int(counts.sum()) == total
        assert 1 <= int(counts.min()) <= int(counts.max()) <= tokens


def test_only_the_official_remainder_overloads_a_frame() -> None:
    weights = torch.full((16,), 1 / 16)
    weights[5] += 1e-4
    fair = v_cast.allocate(weights, 63, 40)
    official = v_cast.allocate(weights, 63, 40, remainder="official")
    assert fair.tolist() == [4] * 15 + [3]
    assert official.tolist() == [3] * 5 + [18] + [3] * 10


def test_a_straight_path_favours_the_ends() -> None:
    angle = torch.arange(8) * 1e-2
    path = torch.stack((angle.cos(), angle.sin()), dim=1)
    bend = v_cast.curvature(path)
    assert float(bend[1:-1].abs().max()) < 1e-3
    weights = v_cast.frame_weights(bend)
    assert float(weights[0] / weights[3]) == pytest.approx(math.exp(1 / 0.7), rel=1e-2)
    assert float(weights[0]) == float(weights[-1])


def test_a_reversal_gets_seventeen_times_the_weight() -> None:
    place = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0, 1.0, 0.0]) * 1e-2
    path = torch.stack((place.cos(), place.sin()), dim=1)
    weights = v_cast.frame_weights(v_cast.curvature(path))
    assert int(weights.argmax()) == 3
    assert float(weights[3] / weights[1]) == pytest.approx(math.exp(2 / 0.7), rel=1e-2)


def test_a_still_video_is_neutral() -> None:
    bend, counts = v_cast.frame_budget(_clip(1).repeat(6, 1, 1), 0.2)
    assert bend.tolist() == [1.0] * 6
    assert counts.tolist() == [6] * 6


@pytest.mark.parametrize("dim", [12, 130, 3584])
def test_equal_tokens_keep_the_lowest_ids(dim: int) -> None:
    features = _clip(4, 1, dim).expand(-1, 37, -1).contiguous()
    plan = v_cast.VCast(retention=0.3).run_tokens(
        TokenSample(features.flatten(0, 1), Layout.regular("video", 4, 1, 37))
    )
    counts = plan.info["frame_count"].tolist()
    assert plan.keep.tolist() == [t * 37 + n for t in range(4) for n in range(counts[t])]


def test_pictures_are_pruned_and_one_step_passes() -> None:
    features = _clip(1, 16)[0]
    method = v_cast.VCast(retention=0.3)
    picture = Layout.regular("image", 1, 4, 4)
    assert method.run_tokens(TokenSample(features, picture)).keep.numel() == method.token_count(picture) == 5
    video = Layout.regular("video", 1, 4, 4)
    assert method.run_tokens(TokenSample(features, video)).keep.numel() == method.token_count(video) == 16


def test_budgets_are_exchangeable() -> None:
    features = _clip()
    sample = TokenSample(features.flatten(0, 1), Layout.regular("video", 8, 5, 6))
    counts = allocate_budget("v-cast", sample, 0.3)
    assert counts.tolist() == v_cast.frame_budget(features, 0.3)[1].tolist()
    sample.budget = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    plan = build("v-cast", {"budget": "vidcom2"}).run_tokens(sample)
    assert torch.bincount(plan.keep // 30).tolist() == sample.budget.tolist()
    ragged = Layout.from_cells(
        "image", [(2, 2), (1, 2)], torch.tensor([[0, i, j] for i in (0, 1) for j in (0, 1)] + [[1, 0, 0], [1, 0, 1]])
    )
    assert allocate_budget("v-cast", TokenSample(features[0, :6], ragged), 0.5).tolist() == [2, 1]
    assert v_cast.VCast(retention=0.5).run_tokens(TokenSample(features[0, :6], ragged)).keep.numel() == 3


def test_uniform_allocation_and_minimum() -> None:
    features = _clip()
    assert v_cast.frame_budget(features, 0.2, allocation="uniform")[1].tolist() == [6] * 8
    counts = v_cast.frame_budget(features, 0.01, minimum=3)[1]
    assert counts.tolist() == [3] * 8
    assert int(v_cast.frame_budget(features, 0.01, minimum=0)[1].sum()) == 2


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="'entropy' is no option of V-CAST"):
        v_cast.VCast(score="entropy")
    with pytest.raises(MethodError, match="temperature is 0"):
        v_cast.VCast(temperature=0)
    with pytest.raises(MethodError, match="temperature is -1"):
        v_cast.frame_weights(torch.ones(3), -1)
    with pytest.raises(MethodError, match="minimum is -1"):
        v_cast.VCast(minimum=-1)
