"""CATP: counts of both stages, coverage with agreement, scores inside the LLM."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import catp


def test_counts() -> None:
    counts = catp.stage_counts([576] * 5, 0.778)
    assert counts == catp.StageCounts([351] * 5, 511, 127)
    assert catp.stage_counts([10, 10], 0.9) == catp.StageCounts([5, 5], 1, 1)
    assert catp.stage_counts([576], 0.5) == catp.StageCounts([432], 0, 288)
    assert catp.stage_counts([7, 3], 0.0) == catp.StageCounts([7, 3], 7, 3)
    for sizes, ratio in (([], 0.5), ([4, 0], 0.5), ([4], 1.0)):
        with pytest.raises(MethodError, match="cannot prune"):
            catp.stage_counts(sizes, ratio)


def test_one_token_of_each_cluster_first() -> None:
    features = torch.eye(4)[torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3])]
    keep, order = catp.select_covering(features, 4)
    assert order.tolist() == [0, 6, 9, 11]
    assert keep.tolist() == [0, 6, 9, 11]
    alone, _ = catp.select_covering(features, 4, features[11:], weight=0.0)
    assert torch.equal(alone, keep)


def test_agreement_with_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(30, 8, generator=generator), torch.randn(5, 8, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(features, text.mean(dim=0, keepdim=True))
    keep, _ = catp.select_covering(features, 6, text, weight=1e4)
    assert keep.tolist() == sorted(cosine.topk(6).indices.tolist())
    scaled, _ = catp.select_covering(features, 12, 40 * text)
    assert torch.equal(scaled, catp.select_covering(features, 12, text)[0])
    assert not torch.equal(scaled, catp.select_covering(features, 12)[0])
    similarity = catp.rescaled_cosine(features, features)
    assert float(similarity.min()) >= 0
    torch.testing.assert_close(similarity.diagonal(), torch.ones(30))


def test_scores_of_examples() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, mean = torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)
    now, before = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
    scores = catp.example_scores(now, before, hidden, mean)
    for j in range(6):
        cosine = float(hidden[j] @ mean / hidden[j].norm() / mean.norm())
        assert float(scores[j]) == pytest.approx(max(0.0, float(now[j] - before[j])) + 0.6 * cosine, abs=1e-5)
    torch.testing.assert_close(catp.query_scores(hidden, mean), catp.example_scores(now, now, hidden, mean, weight=1.0))
    falling = catp.example_scores(before.minimum(now), before.maximum(now), hidden, mean, weight=0.0)
    assert falling.tolist() == [0.0] * 6
    assert catp.select_best(falling, 2).tolist() == [0, 1]


def test_examples_are_ranked_together() -> None:
    scores = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7, 0.3])
    assert catp.select_best(scores, 3).tolist() == [2, 3, 4]


def test_cost_of_the_full_model() -> None:
    assert 32 * catp.layer_flops(5 * 576, 4096, 11008) / 1e12 == pytest.approx(20.83, abs=0.01)


def test_bad_shapes() -> None:
    features = torch.randn(5, 4)
    for count in (0, 6):
        with pytest.raises(MethodError, match=f"cannot keep {count} tokens"):
            catp.select_covering(features, count)
    for text in (torch.randn(3, 5), torch.zeros(0, 4), torch.randn(4)):
        with pytest.raises(MethodError, match="text must be embeddings"):
            catp.select_covering(features, 2, text)
    with pytest.raises(MethodError, match="two attention rows"):
        catp.example_scores(torch.rand(5), torch.rand(4), features, torch.rand(4))
