"""CDPruner's functions: relevance, its variants, and what a determinant promises about the choice."""

from __future__ import annotations

import math

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.methods import cdpruner


def _tokens(batch: int = 2, tokens: int = 30, dim: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator), torch.rand(batch, tokens, generator=generator)


def _log_det(features: torch.Tensor, chosen: torch.Tensor) -> float:
    units = features[chosen].double()
    units = units / units.norm(dim=1, keepdim=True)
    return float(torch.linalg.slogdet(units @ units.T)[1])


def test_relevance_equals_the_plain_steps() -> None:
    image, _ = _tokens(3, 10, 6)
    text = _tokens(1, 2, 6, seed=5)[0][0]
    relevance = cdpruner.relevance_to_question(image, text)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    raw = [[-sum(cosine(v, t) for t in text.tolist()) / 2 for v in picture] for picture in image.tolist()]
    low, high = min(map(min, raw)), max(map(max, raw))
    expected = torch.tensor([[(s - low + 1e-6) / (high - low) for s in picture] for picture in raw])
    torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-5)


def test_relevance_variants() -> None:
    image, _ = _tokens(3, 10, 6)
    text = _tokens(1, 1, 6, seed=5)[0][0]
    joint = cdpruner.relevance_to_question(image, text)
    alone = cdpruner.relevance_to_question(image, text, norm="frame")
    assert alone.amin(dim=1).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert alone.amax(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert int((joint > 1 - 1e-4).sum()) == 1
    positive = cdpruner.relevance_to_question(image, text, negative=False)
    torch.testing.assert_close(positive, 1 - joint, rtol=0, atol=1e-4)
    half = cdpruner.relevance_to_question(image, text, weight=0.5)
    torch.testing.assert_close(half, torch.exp(0.5 * joint))
    assert cdpruner.weigh_relevance(joint, 0.0).unique().tolist() == [1.0]
    assert cdpruner.normalise_relevance(torch.full((2, 4), 0.3)).unique().tolist() == [1.0]


def test_the_first_choice_is_the_most_relevant() -> None:
    features, relevance = _tokens()
    keep, _ = cdpruner.select_conditional(features, 1, relevance)
    assert keep[:, 0].tolist() == relevance.argmax(dim=1).tolist()


def test_duplicates_are_not_kept_twice() -> None:
    features, relevance = _tokens(2, 12)
    doubled = torch.cat((features, features), dim=1)
    keep, _ = cdpruner.select_conditional(doubled, 12, torch.cat((relevance, relevance), dim=1) + 0.5)
    assert [sorted(row) for row in (keep % 12).tolist()] == [list(range(12))] * 2


def test_constant_relevance_is_diversity_alone() -> None:
    features, _ = _tokens(1)
    keep, order = cdpruner.select_conditional(features, 8)
    constant = cdpruner.select_conditional(features, 8, torch.full((1, 30), 0.7))
    assert torch.equal(order, constant[1])
    generator = torch.Generator().manual_seed(3)
    best = _log_det(features[0], keep[0])
    for _ in range(100):
        assert best >= _log_det(features[0], torch.randperm(30, generator=generator)[:8])


def test_a_whole_video_as_one_set() -> None:
    features, relevance = _tokens(4, 16)
    one, _ = cdpruner.select_conditional(features.reshape(1, 64, -1), 20, relevance.reshape(1, 64))
    assert one.shape == (1, 20)
    assert bool((one.diff(dim=1) > 0).all())
    per_frame, _ = cdpruner.select_conditional(features, 5, relevance)
    assert per_frame.shape == (4, 5)


def test_more_tokens_than_dimensions() -> None:
    features, relevance = _tokens(3, 40, 6)
    keep, order = cdpruner.select_conditional(features, 25, relevance)
    assert all(len(set(row)) == 25 for row in order.tolist())
    assert bool((keep.diff(dim=1) > 0).all())


def test_half_precision_is_normalised_in_float32() -> None:
    features, relevance = _tokens()
    half = features.half()
    same = cdpruner.select_conditional(half.float(), 9, relevance)[1]
    assert torch.equal(cdpruner.select_conditional(half, 9, relevance)[1], same)


def test_long_questions_are_cut_in_segments() -> None:
    ids = torch.arange(1, 161)
    segments = cdpruner.text_segments(ids)
    assert segments.shape == (3, 77)
    assert segments.flatten()[:160].tolist() == ids.tolist()
    assert segments.flatten()[160:].unique().tolist() == [0]
    assert cdpruner.text_segments(ids[:77]).tolist() == [ids[:77].tolist()]
    with pytest.raises(MethodError, match="at least one token id"):
        cdpruner.text_segments(ids[:0])


def test_bad_arguments() -> None:
    features, relevance = _tokens()
    for count in (0, 31):
        with pytest.raises(MethodError, match=f"cannot keep {count} tokens"):
            cdpruner.select_conditional(features, count)
    with pytest.raises(MethodError, match=r"\(3, 5\)"):
        cdpruner.question_similarity(features, torch.zeros(3, 5))
    with pytest.raises(MethodError, match="'video' is unknown"):
        cdpruner.normalise_relevance(relevance, "video")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"weight is 1\.5"):
        cdpruner.weigh_relevance(relevance, 1.5)
