"""CDPruner: relevance, its variants, what a determinant promises about the choice, and the method on models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.registry import build
from tokensieve.errors import MethodError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods import cdpruner
from tokensieve.pairing import load_pair


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


# -- the method on models ------------------------------------------------------------------------------------


def _plan(model: Any, inputs: Any, **options: Any) -> Any:
    with torch.no_grad(), tokensieve.compress(model, "cdpruner", **options) as run:
        model(**inputs)
    return run.history[-1].items


def test_relevance_follows_the_host(tiny_host: Any) -> None:
    """The pair where it is given, the words of the question elsewhere, always named in the plan."""
    for family in ("llava", "llava_next_video", "llava_onevision"):
        model, processor = tiny_host(family)
        inputs = tiny.example_inputs(family, processor)
        pair = load_pair(*tiny.pair_of(model))
        assert _plan(model, inputs)[0].info["relevance"] == "words"
        assert _plan(model, inputs, text_tower=pair)[0].info["relevance"] == "pair"
        assert _plan(model, inputs, relevance="none")[0].info["relevance"] == "none"
    with pytest.raises(SignalError, match="no CLIP or SigLIP tower"):
        tokensieve.compress(model, "cdpruner", relevance="pair")


def test_by_hand_with_a_clip_pair(tiny_host: Any) -> None:
    """Patches of the feature layer through norm and projection, against the question, min-max over all frames."""
    model, processor = tiny_host("llava")
    inputs = tiny.example_inputs("llava", processor)
    pair = load_pair(*tiny.pair_of(model))
    (item,) = _plan(model, inputs, text_tower=pair, retention=0.2)
    base = model.base_model
    with torch.no_grad():
        states = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = base.multi_modal_projector(states)
    image = pair.align(states)
    text = pair.embed_segments("What happens in the video?")
    relevance = cdpruner.relevance_to_question(image, text)
    keep, _ = cdpruner.select_conditional(features, round(64 * 0.2), relevance)
    assert torch.equal(item.keep, keep[0])
    assert torch.allclose(item.info["question_relevance"], relevance[0], atol=1e-5)


def test_the_question_decides(tiny_host: Any) -> None:
    """Other questions keep other tokens, with a pair and with words; a batch gives each row its own."""
    for family in ("llava_next_video", "qwen2_5_vl"):
        model, processor = tiny_host(family)
        options = {"text_tower": load_pair(*tiny.pair_of(model))} if family.startswith("llava") else {}
        inputs = tiny.example_inputs(family, processor)
        first, second = (
            _plan(model, inputs, question=text, retention=0.2, **options)[0].keep
            for text in ("Where is the dog?", "How many people cross the road in the rain?")
        )
        assert first.numel() == second.numel()
        assert not torch.equal(first, second)
        batch = _plan(model, tiny.example_inputs(family, processor, batch=2), retention=0.2, **options)
        for row, item in enumerate(batch):
            (alone,) = _plan(model, tiny.example_inputs(family, processor, batch=2, row=row), retention=0.2, **options)
            assert torch.equal(item.keep, alone.keep)


def test_scopes_and_budgets(tiny_host: Any) -> None:
    model, processor = tiny_host("llava_next_video")
    inputs = tiny.example_inputs("llava_next_video", processor)
    (item,) = _plan(model, inputs, retention=0.3)
    views = item.layout.patch_view[item.keep]
    assert torch.bincount(views).tolist() == [round(16 * 0.3)] * 4
    (whole,) = _plan(model, inputs, retention=0.3, scope="video")
    assert whole.keep.numel() == round(64 * 0.3)
    (budgeted,) = _plan(model, inputs, retention=0.3, budget="vidcom2")
    counts = torch.bincount(budgeted.layout.patch_view[budgeted.keep], minlength=4)
    assert int(counts.sum()) == budgeted.keep.numel()


def test_any_resolution_images(tiny_host: Any) -> None:
    model, processor = tiny_host("llava_next")
    inputs = tiny.example_inputs("llava_next", processor)
    pair = load_pair(*tiny.pair_of(model))
    (item,) = _plan(model, inputs, retention=0.25, text_tower=pair)
    sizes = item.layout.patches_per_view.tolist()
    assert len(set(sizes)) == 2
    counts = torch.bincount(item.layout.patch_view[item.keep]).tolist()
    assert counts == [round(n * 0.25) for n in sizes]
    assert build("cdpruner", {"retention": 0.25}).token_count(item.layout) == sum(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relevance": "clip"}, "relevance must be one of"),
        ({"scope": "tile"}, "scope must be one of"),
        ({"relevance_norm": "video"}, "'video' is unknown"),
        ({"weight": 1.5}, "weight is 1"),
        ({"question": ""}, "question is ''"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build("cdpruner", options)
