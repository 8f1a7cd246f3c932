"""FastVID: budgets, segments, what is merged into what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan, reading_order
from tokensieve.core.registry import build
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError, RetentionError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods.fastvid import Flavour, density_pruning, frame_budgets, valid_frames
from tokensieve.pairing import load_pair

FLAVOURS: tuple[Flavour, ...] = ("onevision", "llava_video", "qwen")


def _video(frames: int = 12, tokens: int = 49, dim: int = 16, scenes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    looks = torch.randn(scenes, tokens, dim).repeat_interleave(-(-frames // scenes), dim=0)[:frames]
    return looks + 0.3 * torch.randn(frames, tokens, dim), torch.rand(frames, tokens)


def _sample(features: torch.Tensor, saliency: torch.Tensor, family: str = "llava_onevision") -> TokenSample:
    frames, tokens, _ = features.shape
    layout = Layout.regular("video", frames, 1, tokens)
    facts = HostFacts(family, 28, 27, 25, False)
    signals = {"encoder.received_attention@feature": saliency.flatten()}
    return TokenSample(features.flatten(0, 1), layout, signals, facts)


@pytest.mark.parametrize("length", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("retention", [0.1, 0.25])
def test_onevision_totals(retention: float, length: int) -> None:
    """F n_s salient tokens, and per segment A anchors frames of floor(n_c L / A)."""
    salient, anchors = frame_budgets(length, 196, retention)
    rate = math.floor(196 * retention)
    context = math.floor(rate * 0.4)
    holders = math.ceil(length / 4)
    assert salient == [rate - context] * length
    assert [count > 0 for count in anchors] == [(length - 1 - i) % 4 == 0 for i in range(length)]
    assert set(anchors) - {0} == {context * length // holders}
    if length <= 4:
        assert sum(salient) + sum(anchors) == rate * length


def test_published_example() -> None:
    """R = 0.1 of 196 tokens: 12 salient and 7 context tokens a frame, 9.7 %."""
    salient, anchors = frame_budgets(1, 196, 0.1)
    assert (salient, anchors) == ([12], [7])


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("flavour", ["llava_video", "qwen"])
def test_straightforward_budgets_lose_nothing(flavour: Flavour, length: int) -> None:
    salient, anchors = frame_budgets(length, 169, 0.13, flavour=flavour)
    assert sum(salient) + sum(anchors) == math.floor(169 * 0.13) * length
    assert sum(anchors) == math.floor(math.floor(169 * 0.13) * length * 0.4)
    assert max(salient) - min(salient) <= 1
    assert salient == sorted(salient, reverse=True)
    dealt = [count for i, count in enumerate(anchors) if (length - 1 - i) % 4 == 0]
    assert dealt == sorted(dealt), "the last anchor frame is served first"


def test_few_valid_frames_hit_their_caps() -> None:
    """Ten near-duplicate frames may leave one that cannot hold the budget of all."""
    salient, anchors = frame_budgets(10, 20, 0.27, flavour="qwen", valid=1)
    assert (salient, anchors) == ([10], [10])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("retention", [0.01, 0.3, 0.99])
def test_budgets_fit_their_frames(flavour: Flavour, tokens: int, retention: float) -> None:
    for length in (1, 4, 7):
        salient, anchors = frame_budgets(length, tokens, retention, flavour=flavour)
        assert all(s >= 0 and a >= 0 and s + a <= tokens for s, a in zip(salient, anchors, strict=True))
        assert sum(salient) + sum(anchors) >= 1


def test_frames_like_the_next_one_are_passed_over() -> None:
    similarity = torch.tensor([0.99, 0.90, 0.96, 0.99, 0.2, 0.99])
    assert valid_frames(similarity, (0, 4)) == [1, 4]
    assert valid_frames(similarity, (5, 6)) == [6]
    assert valid_frames(similarity, (2, 2)) == [2]


def test_identical_frames_hold_anchors_in_every_fourth_one() -> None:
    torch.manual_seed(1)
    features = torch.randn(1, 49, 16).repeat(10, 1, 1)
    merged, segments = density_pruning(features, torch.rand(10, 49), features.mean(dim=1), 0.2, segments=1)
    assert segments == [(0, 9)]
    weights = torch.bincount(merged.merge_map.target)
    frames = (merged.source // 49)[weights > 1].unique()
    assert frames.tolist() == [1, 5, 9]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_salient_tokens_are_untouched_and_anchors_lie_on_the_way_to_their_mean(flavour: Flavour) -> None:
    features, saliency = _video()
    scenes = torch.eye(3).repeat_interleave(4, dim=0) + torch.arange(12)[:, None] % 4
    merged, segments = density_pruning(
        features, saliency, scenes, 0.25, flavour=flavour, segments=3, threshold=-1.0, ignore=2.0
    )
    assert [last - first + 1 for first, last in segments] == [4, 4, 4]
    flat, frame = features.flatten(0, 1), merged.source // 49
    assert (merged.source.diff() > 0).all()
    entries = torch.bincount(merged.merge_map.target)
    alone = entries == 1
    assert torch.equal(merged.features[alone], flat[merged.source[alone]])
    ranked = saliency.argsort(dim=1, descending=True)
    for t in range(12):
        chosen = (merged.source % 49)[alone & (frame == t)]
        assert set(ranked[t, :7].tolist()) <= set(chosen.tolist())
    totals = torch.zeros(merged.source.numel()).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
    assert torch.allclose(totals, torch.ones_like(totals), atol=1e-5)
    grown = (~alone).nonzero()[:, 0].tolist()
    assert grown
    for row in grown:
        part = merged.merge_map.target == row
        sources, weights = merged.merge_map.source[part], merged.merge_map.weight[part]
        own = sources == merged.source[row]
        others = weights[~own]
        assert torch.allclose(others, others[:1].expand_as(others)), "the members of an anchor weigh the same"
        if flavour == "onevision":
            # The anchor is a member as well, on top of its 0.6.
            assert weights[own].item() == pytest.approx(0.6 + others[0].item(), abs=1e-5)
        else:
            assert weights[own].item() == pytest.approx(0.6, abs=1e-5)
        segment = next(s for s in segments if s[0] <= int(frame[row]) <= s[1])
        assert ((sources // 49 >= segment[0]) & (sources // 49 <= segment[1])).all()


def test_every_token_joins_its_nearest_anchor() -> None:
    """Against a loop over tokens and anchors."""
    features, saliency = _video(frames=5, tokens=20, scenes=1)
    merged, _ = density_pruning(features, saliency, torch.ones(5, 2), 0.3, segments=1, flavour="onevision")
    flat, entries = features.flatten(0, 1), torch.bincount(merged.merge_map.target)
    salient, _ = frame_budgets(5, 20, 0.3)
    top = saliency.argsort(dim=1, descending=True)[:, : salient[0]]
    kept = {int(t) * 20 + int(n) for t in range(5) for n in top[t]}
    anchors = [row for row, source in enumerate(merged.source.tolist()) if source not in kept]
    for holder in {int(merged.source[row]) // 20 for row in anchors}:
        mine = [row for row in anchors if int(merged.source[row]) // 20 == holder]
        members: dict[int, list[int]] = {row: [] for row in mine}
        for token in set(range(100)) - kept:
            cosines = [float(torch.cosine_similarity(flat[token], flat[merged.source[row]], dim=0)) for row in mine]
            members[mine[cosines.index(max(cosines))]].append(token)
        for row, inside in members.items():
            expected = 0.6 * flat[merged.source[row]] + 0.4 * flat[inside].mean(dim=0)
            assert torch.allclose(merged.features[row], expected, atol=1e-5)
            assert int(entries[row]) == len(inside)


def test_newlines_of_occupied_rows_stay() -> None:
    features, saliency = _video(frames=6, tokens=16, scenes=2)
    layout = Layout.regular("video", 6, 4, 4, "row")
    merged, _ = density_pruning(features, saliency, features.mean(dim=1), 0.2, flavour="llava_video", segments=2)
    tokens, slots = reading_order(layout, Plan(merged.source, separators="occupied"))
    rows = {(int(s) // 16, int(s) % 16 // 4) for s in merged.source}
    assert int((slots < 0).sum()) == len(rows)
    assert {(int(layout.view[t]), int(layout.row[t])) for t in tokens[slots < 0]} == rows


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "qwen2_5_vl"])
@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (2, 16), (9, 4)])
def test_small_videos_and_pictures(family: str, shape: tuple[int, int]) -> None:
    features, saliency = _video(*shape, scenes=2)
    plan = build("fastvid-proxy", {"retention": 0.3}).plan_tokens(_sample(features, saliency, family))
    plan.checked(shape[0] * shape[1], "fastvid-proxy")
    assert plan.features is not None
    assert torch.isfinite(plan.features).all()


def test_flavour_follows_the_host() -> None:
    features, saliency = _video()
    counts = {}
    for family in ("internvl", "llava_video", "qwen3_vl"):
        plan = build("fastvid-proxy", {"retention": 0.25}).plan_tokens(_sample(features, saliency, family))
        counts[family] = plan.keep.numel()
    by_hand = {
        family: density_pruning(features, saliency, features.mean(dim=1), 0.25, flavour=flavour, threshold=threshold)[
            0
        ].source.numel()
        for family, flavour, threshold in (
            ("internvl", FLAVOURS[0], 0.9),
            ("llava_video", FLAVOURS[1], 0.9),
            ("qwen3_vl", FLAVOURS[2], 0.84),
        )
    }
    assert counts == by_hand


def test_bfloat16_keeps_the_selection() -> None:
    features, saliency = _video()
    rounded = features.bfloat16()
    ours, _ = density_pruning(rounded, saliency, rounded.float().mean(dim=1), 0.25)
    full, _ = density_pruning(rounded.float(), saliency, rounded.float().mean(dim=1), 0.25)
    assert torch.equal(ours.source, full.source)
    assert ours.features.dtype == torch.bfloat16


def test_they_are_named_for_what_they_are(tiny_host: Any) -> None:
    """Nothing called plain fastvid runs on signals that the paper does not use."""
    assert tokensieve.list_methods("fastvid*") == ["fastvid", "fastvid-proxy"]
    assert "pooling head" in tokensieve.method_class("fastvid-proxy").fidelity_note
    model, _ = tiny_host("llava_onevision")
    with pytest.raises(SignalError, match=r"encoder\.head_attention.*methods that work here.*fastvid-proxy"):
        tokensieve.compress(model, "fastvid")
    model, _ = tiny_host("llava_next_video")
    with pytest.raises(SignalError, match="no SigLIP tower"):
        tokensieve.compress(model, "fastvid", text_tower=load_pair(*tiny.pair_of(model)))


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_pooling_head_of_the_pair_decides(tiny_host: Any, family: str) -> None:
    """The plan of a compressed model equals the functions on what the head makes of the host's own states."""
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor, frames=6)
    pair = load_pair(*tiny.pair_of(model))
    with torch.no_grad(), tokensieve.compress(model, "fastvid", retention=0.4, segments=2, text_tower=pair) as run:
        model(**inputs)
    (item,) = run.history[-1].items
    base = model.base_model
    with torch.no_grad():
        pixels = inputs["pixel_values_videos"][0]
        states = base.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        vectors, attention = pair.summarise(states)
        projected = base.multi_modal_projector(states)
        if family == "llava_onevision":
            features, saliency = base.apply_pooling(projected), base.apply_pooling(attention[..., None])[..., 0]
        else:
            grid = torch.nn.functional.avg_pool2d(projected.transpose(1, 2).unflatten(2, (9, 9)), 2)
            features = grid.flatten(2).transpose(1, 2)
            saliency = torch.nn.functional.avg_pool2d(attention.view(-1, 1, 9, 9), 2).flatten(1)
    flavour = FLAVOURS[family == "llava_video"]
    merged, segments = density_pruning(features, saliency, vectors, 0.4, flavour=flavour, segments=2)
    assert torch.equal(item.keep, merged.source)
    assert item.info["segments"].tolist() == [list(part) for part in segments]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_mean_query_decides_on_qwen(tiny_host: Any, family: str) -> None:
    """Saliency is another than the proxy's."""
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor, frames=8)
    keeps = {}
    for method in ("fastvid", "fastvid-proxy"):
        with torch.no_grad(), tokensieve.compress(model, method, retention=0.4, segments=2) as run:
            model(**inputs)
        keeps[method] = run.history[-1].items[0].keep
    assert not torch.equal(keeps["fastvid"], keeps["fastvid-proxy"])


@pytest.mark.parametrize("options", [{"flavour": "video"}, {"stride": 0}, {"context": 1.0}, {"context": -0.1}], ids=str)
def test_bad_options(options: dict[str, object]) -> None:
    for name in ("fastvid", "fastvid-proxy"):
        with pytest.raises(MethodError, match=r"must|unknown"):
            build(name, options)


def test_bad_inputs() -> None:
    features, saliency = _video()
    with pytest.raises(RetentionError, match="retention is 0"):
        density_pruning(features, saliency, features.mean(dim=1), 0.0)
    with pytest.raises(MethodError, match=r"saliency \[F, N\]"):
        density_pruning(features, saliency[:, 1:], features.mean(dim=1), 0.2)
    with pytest.raises(MethodError, match="flavour 'other' is unknown"):
        density_pruning(features, saliency, features.mean(dim=1), 0.2, flavour="other")  # type: ignore[arg-type]


def test_positions_are_the_original_ones() -> None:
    method: Method = build("fastvid-proxy")
    assert method.position_policy == "original"
