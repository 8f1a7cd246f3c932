"""DyCoke: counts, windows, order, pictures, and the choice of visible keys while decoding."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan, reading_order
from tokensieve.core.registry import build
from tokensieve.core.sample import HostFacts, StepSample, TokenSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods.dycoke import (
    DyCoke,
    DynamicPruning,
    counts_for_budget,
    frame_counts,
    pruned_frames,
    temporal_pruning,
)


def _video(frames: int = 8, tokens: int = 16, dim: int = 12) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, tokens, dim) + 0.5 * torch.randn(frames, tokens, dim)


def _plan(features: torch.Tensor, layout: Layout | None = None, axes: int = 1, **options: Any) -> Plan:
    frames, tokens, dim = features.shape
    layout = layout or Layout.regular("video", frames, 1, tokens)
    facts = HostFacts("family", 28, 27, 25, False, axes)
    method = build("dycoke-ttm", options)
    plan = method.plan_tokens(TokenSample(features.reshape(-1, dim), layout, facts=facts))
    plan.checked(layout.patches, "dycoke-ttm")
    assert plan.keep.numel() == method.token_count(layout)
    return plan


@pytest.mark.parametrize(
    ("removed", "official", "corrected"), [(0.7, 3098, 2960), (0.9, 2201, 2024), (1.0, 1764, 1568)]
)
def test_published_totals(removed: float, official: int, corrected: int) -> None:
    """32 frames of 196 tokens: 49.4 %, 35.1 % and 28.1 % in the released code."""
    assert int(frame_counts(32, 196, removed, official=True).sum()) == official
    assert int(frame_counts(32, 196, removed).sum()) == corrected


def test_windows() -> None:
    assert pruned_frames(9).tolist() == [False, True, True, True, False, True, True, True, False]
    assert pruned_frames(8, official=True).tolist() == [False, True, True, True, False, True, False, True]
    assert frame_counts(7, 10, 0.7, official=True).tolist() == [10, 3, 3, 3, 10, 3, 0]
    assert frame_counts(7, 10, 0.7).tolist() == [10, 3, 3, 3, 10, 3, 3]
    assert frame_counts(1, 10, 0.7).tolist() == [10]


def test_every_frame_is_compared_with_the_right_one() -> None:
    """Against a loop over frames and patches."""
    features = _video(10)
    counts = frame_counts(10, 16, 0.7)
    for order in ("raster", "similarity"):
        kept = temporal_pruning(features, counts, order).tolist()
        expected: list[int] = []
        for t in range(10):
            other = {0: None, 1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
            patches = list(range(16))
            if other is not None:
                cosine = torch.cosine_similarity(features[t], features[other], dim=-1).tolist()
                patches = sorted(patches, key=lambda n: cosine[n])[: int(counts[t])]
            expected += [t * 16 + n for n in (sorted(patches) if order == "raster" else patches)]
        assert kept == expected


def test_a_changed_patch_is_kept() -> None:
    features = _video(1).repeat(8, 1, 1)
    features[5, 11] += 3
    kept = temporal_pruning(features, frame_counts(8, 16, 0.9))
    assert 5 * 16 + 11 in kept.tolist()
    assert torch.bincount(kept // 16).tolist() == [16, 1, 1, 1, 16, 1, 1, 1]


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 31, 32])
@pytest.mark.parametrize("retention", [0.05, 0.25, 0.3, 0.475, 0.9, 0.999])
def test_totals_meet_the_retention(frames: int, retention: float) -> None:
    total = max(1, round(frames * 49 * retention))
    chosen, counts = counts_for_budget(frames, 49, total)
    assert int(counts.sum()) == max(total, 49)
    assert (counts <= 49).all()
    assert chosen.numel() == counts.numel() <= frames
    assert (chosen.diff() > 0).all()
    assert (counts[::4] == 49).all()
    if total >= -(-frames // 4) * 49:
        assert chosen.tolist() == list(range(frames))
        pruned = counts[pruned_frames(frames)]
        assert pruned.numel() == 0 or int(pruned.max() - pruned.min()) <= 1


def test_below_a_quarter_frames_are_left_out() -> None:
    plan = _plan(_video(16), retention=0.15)
    frames = (plan.keep // 16).unique().tolist()
    assert plan.keep.numel() == round(16 * 16 * 0.15)
    assert len(frames) <= 8
    assert plan.views is not None
    assert plan.views.tolist() == frames


def test_published_share_takes_the_place_of_the_retention() -> None:
    assert _plan(_video(8), removed=0.7, retention=0.9).keep.numel() == int(frame_counts(8, 16, 0.7).sum())


def test_official_bounds_from_a_retention() -> None:
    plan = _plan(_video(8), official=True, retention=0.475)
    assert plan.keep.numel() == int(frame_counts(8, 16, 0.7, official=True).sum())


@pytest.mark.parametrize(("axes", "ascending"), [(1, False), (3, True)])
def test_order_of_tokens(axes: int, ascending: bool) -> None:
    """The released order where positions are renumbered, raster order where they stay."""
    plan = _plan(_video(8), axes=axes, removed=0.5)
    assert bool((plan.keep.diff() > 0).all()) == ascending
    assert (torch.div(plan.keep, 16, rounding_mode="floor").diff() >= 0).all()
    raster = _plan(_video(8), axes=axes, removed=0.5, order="raster")
    assert torch.equal(raster.keep, plan.keep.sort().values)


def test_newlines_stand_behind_the_patches_of_their_frame() -> None:
    layout = Layout.regular("video", 8, 4, 4, "row")
    plan = _plan(_video(8), layout, removed=0.9)
    tokens, slots = reading_order(layout, plan)
    assert int((slots < 0).sum()) == 8 * 4
    for frame in range(8):
        inside = (slots[layout.view[tokens] == frame] < 0).tolist()
        assert inside == sorted(inside)


def test_pictures_stay_whole() -> None:
    layout = Layout.regular("image", 2, 4, 4)
    assert _plan(_video(2), layout, retention=0.3).keep.tolist() == list(range(32))


def test_bfloat16_selects_alike() -> None:
    features = _video(8).bfloat16()
    counts = frame_counts(8, 16, 0.7)
    assert torch.equal(temporal_pruning(features, counts), temporal_pruning(features.float(), counts))


def test_visible_keys() -> None:
    """The best share of the visual block, and everything around it."""
    torch.manual_seed(0)
    pruning = DynamicPruning(3, 10, 0.7)
    row = torch.rand(10)
    visible = pruning.step(row, 16)
    assert pruning.similarity == 0.0
    assert visible.shape == (16,)
    assert visible[:3].all()
    assert visible[13:].all()
    best = row.argsort(descending=True)[:3]
    assert visible[3:13].nonzero()[:, 0].tolist() == sorted(best.tolist())


@pytest.mark.parametrize("reuse", [True, False])
def test_steady_attention(reuse: bool) -> None:
    """The choice stays (paper) or is given up for the step (released code)."""
    pruning = DynamicPruning(2, 8, 0.5, reuse=reuse)
    row = torch.linspace(1, 2, 8)
    first = pruning.step(row, 12)
    second = pruning.step(row.flip(0) * 0.1 + row, 13)
    assert pruning.similarity > 0.9
    assert bool(second.all()) is not reuse
    if reuse:
        assert torch.equal(second[:12], first)
        assert second[12]
    third = pruning.step(torch.tensor([9.0, 9, 9, 9, 0, 0, 0, 0]), 14)
    assert pruning.similarity < 0.9
    assert third[2:10].tolist() == [True] * 4 + [False] * 4


def test_nothing_hidden_shows_everything() -> None:
    pruning = DynamicPruning(2, 8, 0.0)
    for keys in range(11, 15):
        assert pruning.step(torch.rand(8), keys).all()


def test_a_new_answer_starts_afresh() -> None:
    """Attention like that of the last step of the answer before does not count as steady."""
    row = torch.linspace(1, 2, 8)
    used = DynamicPruning(0, 8, reuse=False)
    first = used.step(row, 9)
    assert used.step(row, 9).all()
    fresh = DynamicPruning(0, 8, reuse=False)
    assert torch.equal(fresh.step(row, 9), first)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"order": "random"}, MethodError),
        ({"official": True, "retention": 0.2}, RetentionError),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"unknown|released loops"):
        build("dycoke-ttm", options)


def test_bad_inputs() -> None:
    with pytest.raises(MethodError, match=r"removed share is 1\.2"):
        frame_counts(8, 16, 1.2)
    with pytest.raises(MethodError, match="more than 4 frames"):
        frame_counts(4, 16, 0.7, official=True)
    with pytest.raises(MethodError, match="order 'up' is unknown"):
        temporal_pruning(_video(), frame_counts(8, 16, 0.7), "up")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="hidden_share is 1"):
        DynamicPruning(0, 8, 1.0)


def _step_by_hand(
    text: Any, embed: torch.Tensor, position: int, caches: list[list[torch.Tensor]], rule: Any, block: slice, layer: int
) -> torch.Tensor:
    """One token through all layers on explicit keys and values, with an explicit mask from ``layer`` on."""
    rotate = importlib.import_module(type(text).__module__).apply_rotary_pos_emb
    hidden, visible = embed[None, None], None
    cos, sin = text.rotary_emb(hidden, torch.tensor([[position]]))
    for index, module in enumerate(text.layers):
        attention, normed = module.self_attn, module.input_layernorm(hidden)
        q, k, v = (
            getattr(attention, f"{part}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        q, k = rotate(q, k, cos, sin)
        caches[index] = [torch.cat((old, new), 2) for old, new in zip(caches[index], (k, v), strict=True)]
        keys, values = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in caches[index])
        logits = q @ keys.transpose(2, 3) * attention.scaling
        if index >= layer and visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        weights = logits.softmax(-1)
        if index == layer - 1:
            visible = rule.step(weights[0, :, 0, block].mean(0), weights.shape[-1])
        hidden = hidden + attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
        hidden = hidden + module.mlp(module.post_attention_layernorm(hidden))
    return text.norm(hidden)[0, 0]


@pytest.mark.parametrize("reuse", [True, False])
def test_decoding_against_explicit_masks(reuse: bool) -> None:
    """States of every step equal layers run by hand on the same cache, with renewed and with kept choices."""
    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("sdpa")
    inputs = tiny.example_inputs("llava_onevision", processor)
    method = DyCoke(removed=0.5, layer=2, update=0.65, reuse=reuse)
    cache = DynamicCache(config=model.config.get_text_config())
    text, similarities = model.model.language_model, []
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        first = model.model(**inputs, past_key_values=cache).last_hidden_state
        kept = run.history[-1].items[0].keep.numel()
        start = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
        length = inputs["input_ids"].shape[1]
        caches = [[layer.keys.clone(), layer.values.clone()] for layer in cache.layers]
        rule = DynamicPruning(start, kept, 0.7, reuse, 0.65)
        for step, token in enumerate([5, 5, 5, 40, 5, 5]):
            mask = torch.ones(1, length + step + 1, dtype=torch.long)
            ids = torch.tensor([[token]])
            got = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state[0, 0]
            embed = text.embed_tokens(ids)[0, 0]
            expected = _step_by_hand(text, embed, first.shape[1] + step, caches, rule, slice(start, start + kept), 2)
            assert torch.allclose(got, expected, atol=1e-5)
            similarities.append(rule.similarity)
    assert min(similarities[1:]) < 0.65 <= max(similarities), similarities
    assert [layer.get_seq_length() for layer in cache.layers] == [first.shape[1] + 6] * len(cache.layers)


def test_answers_do_not_hang_together() -> None:
    """A second generation equals a fresh one, and without hiding the text is that of stage 1 alone."""
    model, processor = tiny.load("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        with tokensieve.compress(model.eval(), "dycoke:retention=0.4"):
            texts = [model.generate(**inputs, **options) for _ in range(2)]
        with tokensieve.compress(model, "dycoke:retention=0.4,hidden_share=0"):
            everything = model.generate(**inputs, **options)
        with tokensieve.compress(model, "dycoke-ttm:retention=0.4"):
            alone = model.generate(**inputs, **options)
    assert torch.equal(*texts)
    assert torch.equal(everything, alone)


def test_layers_that_do_not_exist() -> None:
    model, _ = tiny.build_in_memory("llava_onevision")
    with pytest.raises(MethodError, match=r"from layer 9 on, but this model has layers 0\.\.4"):
        tokensieve.attach(model, "dycoke:layer=9")
    with pytest.raises(MethodError, match="cosine from -1 to 1"):
        DyCoke(update=2.0)


def test_choice_reaches_layers_that_hold_less() -> None:
    """Behind a cut the later caches hold fewer entries; what is hidden there are the same tokens."""
    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("llava_onevision", processor)
    start = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    weights: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []

    class Spy(DyCoke):
        def plan_step(self, sample: StepSample) -> torch.Tensor | None:
            visible = super().plan_step(sample)
            assert visible is not None
            shown.append(visible)
            return visible

    cutter = build("fastv", {"layer": 3, "retention": 0.5})
    with torch.no_grad(), tokensieve.compress(model, [Spy(removed=0.5, layer=2), cutter]) as run:
        cache = DynamicCache(config=model.config.get_text_config())
        model.model(**inputs, past_key_values=cache)
        item = run.history[-1].items[0]
        handles = [
            layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1][0, :, 0]))
            for layer in model.model.language_model.layers
        ]
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        model.model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)
        for handle in handles:
            handle.remove()
    places = {patch: i for i, patch in enumerate(item.keep.tolist())}
    for layer, present in ((1, item.keep), (2, item.keep), (3, item.decoder[3]), (4, item.decoder[3])):
        rows = weights[layer][:, start : start + present.numel()]
        visible = shown[0][[places[patch] for patch in present.tolist()]]
        if layer == 1:
            assert bool((rows > 0).all())
        else:
            assert bool((rows[:, visible] > 0).all()) and float(rows[:, ~visible].abs().max()) == 0.0
            assert 0 < int(visible.sum()) < present.numel()
