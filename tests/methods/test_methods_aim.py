"""AIM: rounds, order and weights of merged tokens, the schedule and the ranking inside the LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.plan import reading_order
from tokensieve.core.registry import build
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods.aim import (
    KEYS,
    STATES,
    Aim,
    AimMerge,
    attention_rank,
    keep_visible,
    merge_frames,
    merge_rounds,
    prune_window,
    visual_share,
)
from tokensieve.ops.merge import apply_merge


def _features(frames: int, patches: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, patches, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("tokens", "retention", "rounds"),
    [
        (196, 0.25, [98, 49]),
        (169, 0.25, [84, 42]),
        (576, 0.4375, [288, 36]),
        (576, 0.125, [288, 144, 72]),
        (16, 0.3, [8, 3]),
        (16, 0.001, [8, 4, 2, 1]),
        (16, 2.0**-9, [8, 4, 2, 1]),
        (1, 0.25, []),
        (3, 0.5, [1]),
        (50, 1.0, []),
    ],
)
def test_rounds(tokens: int, retention: float, rounds: list[int]) -> None:
    assert merge_rounds(tokens, retention) == rounds


def test_published_rounds_keep_the_order_of_space() -> None:
    """Every output of two full rounds holds the token at an odd place of the odd ones."""
    merged = merge_frames(_features(3, 196), [98, 49])
    places = (2 * (2 * torch.arange(49) + 1) + 1).repeat(3) + torch.arange(3).repeat_interleave(49) * 196
    assert torch.equal(merged.source, places)
    assert torch.equal(merged.merge_map.target[places], torch.arange(147))


def test_means_ignore_earlier_merges() -> None:
    features = torch.zeros(1, 8, 2)
    features[0, :, 0] = 1
    features[0, :, 1] = torch.tensor([0.0, 0.1, 5.0, 5.1, 10.0, 10.1, 50.0, 50.1])
    merged = merge_frames(features, [4, 2])
    weights = merged.merge_map.weight
    assert sorted(weights.unique().tolist()) == [0.25]
    torch.testing.assert_close(apply_merge(features[0], merged.merge_map, 2), merged.features)
    three = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    merged = merge_frames(three, [2, 1])
    # Both even tokens join token 1 first, and their mean counts once in the second round.
    assert merged.merge_map.weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert merged.features[0].tolist() == pytest.approx([0.5, 0.5])


def test_a_metric_of_its_own() -> None:
    features, metric = _features(2, 20), _features(2, 20, seed=1)
    merged = merge_frames(features, [6, 5], metric)
    torch.testing.assert_close(apply_merge(features.flatten(0, 1), merged.merge_map, 18), merged.features)
    same = merge_frames(metric, [6, 5])
    assert torch.equal(merged.source, same.source)
    assert not torch.equal(merged.source, merge_frames(features, [6, 5]).source)
    with pytest.raises(MethodError, match="by a metric"):
        merge_frames(features, [6], metric[:, :4])


def test_frames_do_not_mix_and_zeros_do_no_harm() -> None:
    features = _features(3, 16)
    together = merge_frames(features, [8, 3])
    alone = torch.cat([merge_frames(frame[None], [8, 3]).features for frame in features])
    torch.testing.assert_close(together.features, alone)
    assert bool(torch.isfinite(merge_frames(torch.zeros(1, 6, 4), [3]).features).all())
    assert torch.equal(merge_frames(features, []).features, features.flatten(0, 1))


@pytest.mark.parametrize(("retention", "each"), [(0.25, 4), (0.3, 5), (0.9, 14), (0.01, 1)])
def test_method(retention: float, each: int) -> None:
    for separators in ("none", "row", "end"):
        layout = Layout.regular("video", 3, 4, 4, separators)
        method = AimMerge(retention=retention)
        plan = method.plan_tokens(TokenSample(_features(3, 16).flatten(0, 1), layout))
        assert plan.keep.numel() == method.token_count(layout) == 3 * each
        assert torch.bincount(plan.keep // 16).tolist() == [each] * 3
        tokens, slots = reading_order(layout, plan)
        assert int((slots >= 0).sum()) == 3 * each
        assert separators != "row" or bool((tokens.diff() > 0).all())
    ordered = AimMerge(retention=retention, keep_order=True)
    assert bool((ordered.plan_tokens(TokenSample(_features(3, 16).flatten(0, 1), layout)).keep.diff() > 0).all())


def test_schedule() -> None:
    first, last = prune_window(28)
    counts = [int(48 * visual_share(i, first, last) + 20) - 20 for i in range(28)]
    assert counts == [48] * 14 + [42, 36, 30, 24, 18, 12, 6] + [0] * 7
    assert prune_window(32) == (13, 21)
    assert prune_window(56) == (28, 44)
    with pytest.raises(MethodError, match=r"14\.\.14"):
        visual_share(3, 14, 14)


def test_rank_equals_a_walk_of_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    length = 9
    logits = 0.3 * torch.randn(2, length, length, generator=generator)
    logits = logits.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf"))
    squares = [0.0] * length
    for head in logits.tolist():
        mass = [1 / length] * length
        for _ in range(5):
            spread = [0.0] * length
            for i, row in enumerate(head):
                shares = torch.tensor(row).div(0.1).softmax(0).tolist()
                spread = [s + mass[i] * p for s, p in zip(spread, shares, strict=True)]
            mass = spread
        squares = [s + m * m / 2 for s, m in zip(squares, mass, strict=True)]
    expected = torch.tensor(squares).sqrt()
    torch.testing.assert_close(attention_rank(logits), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(attention_rank(logits, total=18), expected / 2, rtol=1e-4, atol=1e-7)
    with pytest.raises(MethodError, match=r"\[H, L, L\]"):
        attention_rank(logits[:, :4])


def test_removed_tokens_stay_away_and_text_stays() -> None:
    visual = torch.tensor([False, True, True, True, True, False])
    visible = torch.tensor([True, True, False, True, True, True])
    importance = torch.tensor([0.0, 0.1, 0.9, 0.3, 0.2, 0.0])
    assert keep_visible(importance, visual, visible, 0.5).tolist() == [True, False, False, True, True, True]
    assert keep_visible(importance, visual, visible, 0.0).tolist() == [True, False, False, False, False, True]
    assert keep_visible(importance, visual, visible, 1.0).tolist() == visible.tolist()
    with pytest.raises(MethodError, match="one entry per token"):
        keep_visible(importance[:5], visual, visible, 0.5)


def test_bad_retention() -> None:
    with pytest.raises(RetentionError):
        merge_rounds(16, 0.0)
    with pytest.raises(MethodError, match="takes no frame budget"):
        AimMerge(budget="vidcom2")


def test_pictures_merge_in_front_of_the_projector() -> None:
    """LLaVA 1.5: keys of the last tower layer match, states of the projected layer merge."""
    model, processor = tiny.load("llava")
    base: Any = model.eval().model
    inputs: Any = tiny.example_inputs("llava", processor)
    keys: list[torch.Tensor] = []
    embeds: list[torch.Tensor] = []
    projection = base.vision_tower.get_submodule(
        next(name for name, _ in reversed(list(base.vision_tower.named_modules())) if name.endswith("k_proj"))
    )
    with torch.no_grad(), tokensieve.compress(model, "aim-merge:retention=0.25") as run:
        handles = [
            projection.register_forward_hook(lambda module, args, output: keys.append(output[0, 1:])),
            base.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"][0]), with_kwargs=True
            ),
        ]
        model(**inputs)
        states = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = states.shape[1]
        merged = merge_frames(states, merge_rounds(patches, 0.25), keys[0][None])
        expected = base.multi_modal_projector(merged.features)
    for handle in handles:
        handle.remove()
    start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    assert torch.allclose(embeds[0][start : start + expected.shape[0]], expected, atol=1e-5)
    assert torch.equal(run.history[-1].items[0].keep, merged.source)
    assert embeds[0].shape[0] == inputs["input_ids"].shape[1] - patches + expected.shape[0]


def test_metrics() -> None:
    pictures, videos = HostFacts("a", 28, 24, 22, True, patch_tokens=True), HostFacts("b", 28, 24, 22, False)
    assert AimMerge().signals(pictures) == AimMerge(metric="keys").signals(videos) == (KEYS, STATES)
    assert AimMerge().signals(videos) == AimMerge(metric="features").signals(pictures) == ()
    with pytest.raises(MethodError, match="metric must be one of"):
        build("aim-merge", {"metric": "values"})
    sample = TokenSample(torch.rand(16, 4), Layout.regular("image", 1, 4, 4), {KEYS: torch.rand(16, 4)})
    with pytest.raises(MethodError, match="in front of the projector"):
        AimMerge().plan_tokens(sample)


def test_windows() -> None:
    def cuts(layers: int, deepstack: int = 0, **options: Any) -> tuple[int, ...]:
        return Aim(**options).decoder_layers(HostFacts("any", layers, 24, 22, False, 1, deepstack))

    assert cuts(28) == tuple(range(15, 23))
    assert cuts(32) == tuple(range(14, 22))
    assert cuts(28, first=20, last=21) == (21,)
    assert cuts(5, 4) == (4,)
    with pytest.raises(MethodError, match=r"window 8\.\.8 is empty"):
        cuts(28, first=8, last=8)
