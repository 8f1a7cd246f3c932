"""FlashVID: budgets, selection, trees, expansion, the cut inside the LLM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan
from tokensieve.core.registry import build
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods.flashvid import (
    FlashVID,
    attended_diverse,
    flash_merge,
    frame_budget,
    merge_trees,
    prune_visual,
)
from tokensieve.ops.merge import apply_merge

SIGNAL = "encoder.received_attention@feature"


def _facts(layers: int = 28, axes: int = 1, deepstack: int = 0) -> HostFacts:
    return HostFacts("family", layers, 27, 25, False, axes, deepstack)


def _video(frames: int = 12, tokens: int = 49, dim: int = 16, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    looks = torch.randn(-(-frames // 4), tokens, dim).repeat_interleave(4, dim=0)[:frames]
    return looks + noise * torch.randn(frames, tokens, dim), torch.rand(frames, tokens)


def _sample(features: torch.Tensor, attention: torch.Tensor, facts: HostFacts) -> TokenSample:
    frames, tokens, _ = features.shape
    layout = Layout.regular("video", frames, 1, tokens)
    return TokenSample(features.flatten(0, 1), layout, {SIGNAL: attention.flatten()}, facts)


def _plan(features: torch.Tensor, attention: torch.Tensor, facts: HostFacts, **options: Any) -> Plan:
    plan = build("flashvid", options).plan_tokens(_sample(features, attention, facts))
    return plan.checked(features.shape[0] * features.shape[1], "flashvid")


def test_published_budget() -> None:
    """196 tokens, R = 0.25: 62 a frame, 44 selected and 18 merged."""
    assert frame_budget(196, 0.25) == (44, 18)
    assert frame_budget(196, 1.0) == (138, 58)
    assert frame_budget(16, 0.01) == (1, 0)


@pytest.mark.parametrize(("layers", "deepstack", "cut"), [(28, 0, 20), (36, 3, 28)])
def test_published_cut_makes_up_for_an_expansion_of_1_25(layers: int, deepstack: int, cut: int) -> None:
    method, facts = FlashVID(), _facts(layers, deepstack=deepstack)
    assert method.decoder_layers(facts) == (cut,)
    features, attention = _video(tokens=196)
    plan = _plan(features, attention, facts)
    assert plan.info["selected"].shape == (12, 44)


@pytest.mark.parametrize("layers", [2, 5, 32, 40])
def test_other_depths_average_to_the_retention(layers: int) -> None:
    facts, method = _facts(layers), FlashVID(retention=0.2)
    (cut,) = method.decoder_layers(facts)
    method.check_host(facts)
    features, attention = _video(tokens=400, noise=0.0)
    entering = method.plan_tokens(_sample(features, attention, facts)).info["selected"].shape[1] / 0.7 / 400
    assert entering * (cut + (layers - cut) * 0.3) / layers == pytest.approx(0.2, rel=0.02)


def test_without_the_inner_part_nothing_is_expanded() -> None:
    features, attention = _video(tokens=100)
    method = FlashVID(retention=0.2, inner=False)
    assert method.decoder_layers(_facts()) == ()
    assert method.plan_tokens(_sample(features, attention, _facts())).info["selected"].shape == (12, 14)


@pytest.mark.parametrize("selection", ["attended", "attended_event", "diversity", "attention"])
def test_selected_tokens_are_untouched_and_the_total_is_bounded(selection: Any) -> None:
    features, attention = _video()
    budget = frame_budget(49, 0.25)
    segments = [(0, 3), (4, 4), (5, 11)]
    merged, selected = flash_merge(features, attention, budget, segments, selection=selection)
    assert selected.shape == (12, budget[0])
    assert all(len(set(row)) == budget[0] for row in selected.tolist())
    assert 12 * budget[0] <= merged.source.numel() <= 12 * (sum(budget) + 1)
    assert (merged.source.diff() > 0).all()
    ids = (torch.arange(12)[:, None] * 49 + selected).flatten()
    rows = torch.searchsorted(merged.source, ids)
    assert torch.equal(merged.source[rows], ids)
    assert torch.equal(merged.features[rows], features.flatten(0, 1)[ids])
    totals = torch.zeros(merged.source.numel()).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
    assert torch.allclose(totals, torch.ones_like(totals), atol=1e-5)
    remade = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    assert torch.allclose(remade, merged.features, atol=1e-5)
    assert merged.merge_map.source.sort().values.tolist() == list(range(12 * 49)), "every token counts once"


def test_uniform_attention_equals_diversity() -> None:
    features, _ = _video()
    uniform = torch.full((12, 49), 1 / 49)
    ours = attended_diverse(features, uniform, 9, [(0, 11)], "attended")
    assert torch.equal(ours, attended_diverse(features, uniform, 9, [(0, 11)], "diversity"))


def test_selection_equals_a_loop() -> None:
    """Max-min over distances whose columns are scaled by attention and event."""
    features, attention = _video(frames=4, tokens=12)
    segments = [(0, 1), (2, 3)]
    ours = attended_diverse(features, attention, 5, segments, "attended_event")
    means = features.mean(dim=1)
    for t in range(4):
        frames = segments[t // 2]
        scale = [
            float(attention[t, j]) * sum(float(features[t, j] @ means[c]) for c in range(frames[0], frames[1] + 1)) / 2
            for j in range(12)
        ]
        rows = [
            [(1 - float(torch.cosine_similarity(features[t, i], features[t, j], dim=0))) * scale[j] for j in range(12)]
            for i in range(12)
        ]
        order = [max(range(12), key=lambda j: sorted(rows[i][j] for i in range(12))[1])]
        while len(order) < 5:
            rest = [j for j in range(12) if j not in order]
            order.append(max(rest, key=lambda j: min(rows[i][j] for i in order)))
        assert ours[t].tolist() == sorted(order)


@pytest.mark.parametrize("length", [2, 3, 4, 6])
def test_a_chain_of_equal_tokens(length: int) -> None:
    """A tree of equal tokens is the token; the released count makes it length / 2 times as large."""
    torch.manual_seed(0)
    token = torch.randn(8)
    features = torch.zeros(length, 4, 8)
    features[:, 0] = token
    features[:, 1:] = torch.randn(length, 3, 8)
    segments = [(0, length - 1)]
    none = torch.zeros(length, 4, dtype=torch.bool)
    for official, factor in ((False, 1.0), (True, length / 2)):
        merged = merge_trees(features, none, segments, (0, 3), threshold=0.999, official=official)
        row = (merged.source == 0).nonzero()[0, 0]
        assert torch.allclose(merged.features[row], factor * token, atol=1e-5)


def test_extreme_shares() -> None:
    features, attention = _video()
    facts = _facts()
    only_selected = _plan(features, attention, facts, alpha=1.0, retention=0.2)
    assert only_selected.keep.numel() == 12 * math.ceil(49 * 0.25)
    only_merged = _plan(features, attention, facts, alpha=0.0, retention=0.2)
    assert only_merged.info["selected"].shape == (12, 0)
    assert 12 <= only_merged.keep.numel() <= 12 * (math.ceil(49 * 0.25) + 1)


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (2, 16), (9, 4), (3, 1)])
def test_small_videos_and_pictures(shape: tuple[int, int], axes: int) -> None:
    features, attention = _video(*shape)
    for retention in (0.05, 0.3, 0.9):
        for official in (False, True):
            plan = _plan(features, attention, _facts(axes=axes), retention=retention, official=official)
            assert plan.features is not None
            assert torch.isfinite(plan.features).all()


def test_a_static_video_keeps_its_budget() -> None:
    """The threshold of the links rises until the budget is left."""
    torch.manual_seed(0)
    features = torch.randn(1, 49, 16).repeat(8, 1, 1)
    merged, _ = flash_merge(features, torch.rand(8, 49), (9, 4), [(0, 7)])
    assert merged.source.numel() >= 8 * 13


def test_defaults_follow_the_position_axes() -> None:
    features, attention = _video(frames=12, noise=0.05)
    one, three = (_plan(features, attention, _facts(axes=axes)) for axes in (1, 3))
    assert (len(one.info["segments"]), len(three.info["segments"])) == (8, 4)
    named = _plan(features, attention, _facts(axes=3), selection="attended_event", segments=8)
    assert torch.equal(named.keep, one.keep)


def test_official_tokens_at_one_position() -> None:
    """Single frames repeat positions: one axis keeps both tokens apart, three axes keep the merged one."""
    features, attention = _video(frames=8, noise=2.0)
    alone = [(t, t) for t in range(8)]
    both, _ = flash_merge(features, attention, frame_budget(49, 0.25), alone, selection="attended", official=True)
    assert both.source.unique().numel() < both.source.numel()
    options = {"official": True, "selection": "attended", "segments": 8}
    one, three = (_plan(features, attention, _facts(axes=axes), **options) for axes in (1, 3))
    assert one.keep.numel() == both.source.numel()
    assert one.features is not None
    assert torch.equal(one.features, both.features)
    assert torch.equal(one.keep // 49, both.source // 49)
    assert three.keep.tolist() == both.source.unique().tolist()
    assert three.features is not None
    assert three.merged is not None
    remade = apply_merge(features.flatten(0, 1), three.merged, three.keep.numel())
    assert torch.allclose(remade, three.features, atol=1e-5)


def test_official_tokens_beyond_the_patches_of_a_frame() -> None:
    """Selecting with repetition can leave no patch free; then repeated positions keep one token."""
    features, attention = _video(frames=3)
    for tokens in range(1, 49):
        part = features[:, :tokens], attention[:, :tokens]
        plan = _plan(*part, _facts(), official=True, retention=0.95, segments=3)
        assert plan.keep.numel() <= 3 * tokens


def test_cut_inside() -> None:
    torch.manual_seed(0)
    attention = torch.rand(101)
    assert prune_visual(attention, 0.3).tolist() == sorted(attention.argsort(descending=True)[:31].tolist())
    sample = DecoderSample(
        hidden=torch.randn(101, 4),
        signals={"decoder.last_query_attention": attention},
        layer=28,
        entered=400,
        view=torch.zeros(101, dtype=torch.long),
        item=torch.zeros(101, dtype=torch.long),
        facts=_facts(36, 3, 3),
    )
    plan = FlashVID().plan_decoder(sample)
    assert plan.keep.tolist() == prune_visual(attention, 0.1).tolist()
    assert plan.positions == "original"


def test_half_precision_keeps_the_selection() -> None:
    features, attention = _video()
    rounded = features.half()
    segments = [(0, 3), (4, 11)]
    ours, _ = flash_merge(rounded, attention.half(), (9, 4), segments, selection="attended_event")
    full, _ = flash_merge(rounded.float(), attention.half().float(), (9, 4), segments, selection="attended_event")
    assert ours.features.dtype == torch.float16
    assert torch.isfinite(ours.features).all()
    assert torch.equal(ours.source, full.source)


@pytest.mark.parametrize("options", [{"selection": "v3"}, {"alpha": 1.1}, {"inner_share": 0.0}], ids=str)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(MethodError, match=r"unknown|must be|share from"):
        build("flashvid", options)


def test_bad_inputs() -> None:
    features, attention = _video()
    with pytest.raises(MethodError, match=r"attention \[F, N\]"):
        flash_merge(features, attention[:, 1:], (9, 4), [(0, 11)])
    with pytest.raises(MethodError, match="selection 'other' is unknown"):
        attended_diverse(features, attention, 3, [(0, 11)], "other")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="in front of layer 28"):
        FlashVID(inner_layer=28).check_host(_facts())
