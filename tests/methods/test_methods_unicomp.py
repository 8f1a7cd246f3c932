"""UniComp against a plain loop and the properties its specification lists."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.plan import reading_order
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods import unicomp
from tokensieve.ops import unique_cover
from tokensieve.ops.merge import apply_merge
from tokensieve.pairing import load_pair

FACTS = HostFacts("llava_onevision", 28, 26, 25, False)


def _clip(frames: int = 8, tokens: int = 36, dim: int = 16, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Scenes of four frames made of a few materials."""
    generator = torch.Generator().manual_seed(seed)
    material = torch.randn(6, dim, generator=generator)
    scenes = torch.randint(0, 6, ((frames + 3) // 4, tokens), generator=generator)
    features = material[scenes].repeat_interleave(4, dim=0)[:frames]
    return features + noise * torch.randn(frames, tokens, dim, generator=generator)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def _plain_allocation(vectors: torch.Tensor, budget: int, tokens: int) -> list[int]:
    g = vectors.shape[0]
    typical = [sum(_cosine(v, w) for w in vectors) / g for v in vectors]
    q = [math.exp((sum(typical) / g - s) * math.sqrt(g)) for s in typical]
    cap = min(tokens, max(1, budget // g * 2))
    if g <= budget // cap:
        return [cap] * g
    counts = [math.floor(x / sum(q) * budget) for x in q]
    over = [k > cap for k in counts]
    counts = [min(k, cap) for k in counts]
    while any(over) and not all(over):
        part = max(0, budget - sum(counts)) // over.count(False)
        if part == 0:
            break
        counts = [k if o else k + part for k, o in zip(counts, over, strict=True)]
        over = [k > cap for k in counts]
        counts = [min(k, cap) for k in counts]
    return counts


def _plain(features: torch.Tensor, keys: torch.Tensor, retention: float, frame_radius: float) -> dict[str, list]:
    """The published steps in float64, one token at a time."""
    frames, tokens, _ = features.shape
    features, keys = features.double(), keys.double()
    means = [frame.mean(0) for frame in features]
    starts, sizes = [0], [1]
    for t in range(1, frames):
        if 1 - _cosine(means[t], means[starts[-1]]) <= frame_radius and sizes[-1] <= math.floor(1 / retention):
            sizes[-1] += 1
        else:
            starts.append(t)
            sizes.append(1)
    fused = [features[s : s + n].mean(0) for s, n in zip(starts, sizes, strict=True)]
    budget = math.floor(retention * frames * tokens)
    if len(starts) * tokens <= budget:
        kept = [s * tokens + n for s in starts for n in range(tokens)]
        return {"starts": starts, "kept": kept, "values": [row for frame in fused for row in frame]}
    limits = _plain_allocation(torch.stack([frame.mean(0) for frame in fused]), budget, tokens)
    chosen, nears = [], []
    for s in starts:
        near = [[1 - _cosine(keys[s, i], keys[s, j]) < 0.2 for j in range(tokens)] for i in range(tokens)]
        typical = [sum(_cosine(keys[s, i], keys[s, j]) for j in range(tokens)) / tokens for i in range(tokens)]
        visited, picked = set(), []
        for i in sorted(range(tokens), key=lambda i: (typical[i], i)):
            if i not in visited:
                picked.append(i)
                visited |= {j for j in range(tokens) if near[i][j]}
        chosen.append(picked)
        nears.append(near)
    if sum(map(len, chosen)) > sum(limits):
        full = [len(c) >= b for c, b in zip(chosen, limits, strict=True)]
        slack = sum(b - len(c) for c, b in zip(chosen, limits, strict=True) if len(c) < b)
        limits = [b + slack // sum(full) if f else b for b, f in zip(limits, full, strict=True)]
    kept, values = [], []
    for s, picked, near, limit, frame in zip(starts, chosen, nears, limits, fused, strict=True):
        for i in sorted(picked[:limit]):
            members = [frame[j] for j in range(tokens) if near[i][j]]
            kept.append(s * tokens + i)
            values.append((sum(members) / len(members) + frame[i]) / 2)
    return {"starts": starts, "kept": kept, "values": values}


@pytest.mark.parametrize(("retention", "noise"), [(0.1, 0.05), (0.15, 0.4), (0.3, 0.3), (0.6, 0.02)])
@pytest.mark.parametrize("own_keys", [True, False])
def test_equals_the_plain_steps(retention: float, noise: float, own_keys: bool) -> None:
    features = _clip(noise=noise, seed=int(100 * noise))
    keys = _clip(noise=0.4, dim=9, seed=7) if own_keys else features
    expected = _plain(features, keys, retention, 0.01)
    result = unicomp.compress(features, retention, keys=keys if own_keys else None, frame_radius=0.01)
    assert result.starts.tolist() == expected["starts"]
    assert result.merged.source.tolist() == expected["kept"]
    torch.testing.assert_close(result.merged.features, torch.stack(expected["values"]).float(), rtol=0, atol=1e-5)
    assert int(result.kept.sum()) <= retention * features.shape[0] * features.shape[1]
    remade = apply_merge(features.flatten(0, 1), result.merged.merge_map, result.merged.source.numel())
    torch.testing.assert_close(remade, result.merged.features, rtol=0, atol=1e-5)
    weights = torch.zeros(result.merged.source.numel()).index_add_(
        0, result.merged.merge_map.target, result.merged.merge_map.weight
    )
    torch.testing.assert_close(weights, torch.ones_like(weights))


@pytest.mark.parametrize("seed", range(4))
def test_allocation_equals_the_plain_steps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(30, 12, generator=generator)
    # Many alike and a few apart, so that the cap bites.
    vectors[5 * seed + 2 :] = vectors[0] + 0.05 * vectors[5 * seed + 2 :]
    for budget, tokens in ((120, 9), (300, 49), (900, 49), (95, 49), (1400, 49)):
        counts = unicomp.allocate_tokens(vectors, budget, tokens)
        assert counts.tolist() == _plain_allocation(vectors.double(), budget, tokens)
        assert int(counts.sum()) <= budget


def test_a_tiny_budget_goes_to_the_most_unique_frames() -> None:
    vectors = torch.ones(6, 3)
    vectors[4] = torch.tensor([1.0, -1.0, 0.0])
    assert unicomp.allocate_tokens(vectors, 1, 10).tolist() == [0, 0, 0, 0, 1, 0]
    result = unicomp.compress(_clip(8, 4), 0.04, frame_radius=-1)
    assert result.merged.source.numel() == 1


def test_identical_frames_form_groups_of_limited_size() -> None:
    features = _clip(1).repeat(16, 1, 1)
    assert unicomp.group_frames(features, 0.1).tolist() == [0, 11]
    assert unicomp.group_frames(features, 0.1, automatic=True).tolist() == [0]
    assert unicomp.group_frames(features, 0.1, radius=-1.0).tolist() == list(range(16))


@pytest.mark.parametrize("dim", [16, 129])
def test_equal_tokens_leave_one_per_frame(dim: int) -> None:
    features = _clip(4, 1, dim).expand(-1, 25, -1).contiguous()
    result = unicomp.compress(features, 0.25, frame_radius=-1)
    assert result.merged.source.tolist() == [0, 25, 50, 75]
    torch.testing.assert_close(result.merged.features, features[:, 0])


def test_a_radius_of_zero_absorbs_nothing() -> None:
    features = _clip(2, 20)
    features[0, 3] = features[0, 2]
    near, _, chosen = unique_cover.cover_tokens(features, 0.0)
    assert not bool(near.any())
    assert bool(chosen.all())
    result = unicomp.compress(features, 0.5, token_radius=0.0, frame_radius=-1)
    torch.testing.assert_close(result.merged.features, features.flatten(0, 1)[result.merged.source])


def test_fusing_may_be_enough() -> None:
    features = _clip(1).repeat(8, 1, 1)
    result = unicomp.compress(features, 0.25)
    assert result.early
    assert result.starts.tolist() == [0, 5]
    assert result.merged.source.numel() == 72
    assert not unicomp.compress(features, 0.25, automatic=True).early


def test_equal_budgets_in_automatic_mode() -> None:
    result = unicomp.compress(_clip(), 0.2, automatic=True, frame_radius=-1)
    assert result.budgets.tolist() == [math.floor(0.2 * 8 * 36) // 8] * 8


def test_official_averages_over_channels() -> None:
    features = _clip(noise=0.4)
    features[4:] *= torch.linspace(0.2, 3.0, 36).unsqueeze(1)
    plain = unicomp.compress(features, 0.15, frame_radius=-1).budgets
    official = unicomp.compress(features, 0.15, frame_radius=-1, official=True).budgets
    by_hand = unicomp.compress(features, 0.15, frame_radius=-1, frame_vectors=features.mean(2)).budgets
    assert official.tolist() == by_hand.tolist() != plain.tolist()


def test_method_keys_features_and_separators() -> None:
    features = _clip(noise=0.4)
    layout = Layout.regular("video", 8, 6, 6, "row")
    keys = _clip(noise=0.4, dim=9, seed=7)
    sample = TokenSample(features.flatten(0, 1), layout, {unicomp.KEYS: keys.flatten(0, 1)})
    method = unicomp.UniComp(retention=0.15)
    assert method.signals(FACTS) == (unicomp.KEYS, unicomp.NEWLINE)
    assert method.signals(replace(FACTS, video_separators="row")) == (unicomp.KEYS,)
    assert unicomp.UniComp(metric="features", separators="none").signals(FACTS) == ()
    known = replace(FACTS, tower_pair="siglip", text_tower="its pair")
    assert unicomp.VECTORS in method.signals(known)
    assert unicomp.VECTORS not in unicomp.UniComp(frame_vectors="mean").signals(known)
    assert unicomp.VECTORS in unicomp.UniComp(text_tower="a pair").signals(FACTS)
    plan = method.run_tokens(sample).checked(288, "unicomp")
    expected = unicomp.compress(features, 0.15, keys=keys)
    assert plan.keep.tolist() == expected.merged.source.tolist()
    _, slots = reading_order(layout, plan)
    assert int((slots < 0).sum()) == expected.starts.numel()
    with pytest.raises(MethodError, match="mean_key@feature"):
        method.run_tokens(TokenSample(features.flatten(0, 1), layout))
    still = TokenSample(features[:1].repeat(8, 1, 1).flatten(0, 1), layout)
    plan = unicomp.UniComp(retention=0.25, metric="features").run_tokens(still).checked(288, "unicomp")
    assert plan.keep.numel() == 72
    assert int((reading_order(layout, plan)[1] < 0).sum()) == 0


def test_pictures_on_small_grids() -> None:
    for side in (1, 2, 4):
        picture = TokenSample(_clip(1, side * side)[0], Layout.regular("image", 1, side, side))
        plan = unicomp.UniComp(retention=0.05, metric="features").run_tokens(picture)
        assert plan.keep.numel() == 1
        assert plan.separators == "in-place"


def test_half_precision_keeps_its_dtype() -> None:
    result = unicomp.compress(_clip().bfloat16(), 0.2)
    assert result.merged.features.dtype == torch.bfloat16


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="'value' is unknown"):
        unicomp.UniComp(metric="value")
    with pytest.raises(MethodError, match="'both' is unknown"):
        unicomp.UniComp(frame_vectors="both")
    with pytest.raises(MethodError, match="'row' is unknown"):
        unicomp.UniComp(separators="row")
    with pytest.raises(MethodError, match="token_radius is -0"):
        unicomp.UniComp(token_radius=-0.1)
    with pytest.raises(MethodError, match=r"\[F, N, D\]"):
        unicomp.compress(torch.zeros(3, 4), 0.5)
    with pytest.raises(RetentionError):
        unicomp.compress(_clip(), 0.0)


def _sequence(model: Any, inputs: Any, **options: Any) -> tuple[Any, torch.Tensor]:
    """Trace of the item and the embeddings that the LLM reads."""
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tokensieve.compress(model, "unicomp", **options) as run:
        handle = model.base_model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    return run.history[-1].items[0], seen[0][0]


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "internvl", "qwen3_vl", "video_llama_3"])
def test_sequence_of_every_layout(tiny_host: Any, family: str) -> None:
    """Tokens of a fused frame, one separator, the next fused frame; text between frames stays in front of them."""
    model, processor = tiny.load(family)
    if family == "video_llama_3":
        processor.video_processor.use_token_compression = False
    inputs = tiny.example_inputs(family, processor, frames=8)
    item, found = _sequence(model, inputs, retention=0.4)
    counts = item.info["group_count"].tolist()
    starts = item.info["group_start"].tolist()
    assert len(counts) > 1
    base = model.base_model
    words = base.get_input_embeddings().weight
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    mark = base.image_newline if family == "llava_video" else words[newline]
    place = (found == mark).all(1)
    video = {"internvl": "image_token_id"}.get(family, "video_token_id")
    ids = inputs["input_ids"][0]
    visual = ids == getattr(model.config, video)
    text = words[ids[~visual]]
    is_text = (found[:, None] == text[None]).all(-1).any(1) & ~place
    if family == "llava_onevision":
        is_text |= (found == base.image_newline).all(1)
        assert bool((found == base.image_newline).all(1).any()), "the newline behind the video stays"
    # Between the texts there are the tokens of the groups, each closed by its mark.
    inside = found[~is_text]
    ends = (inside == mark).all(1).nonzero().flatten().tolist()
    own_newlines = int((ids[~visual] == newline).sum()) if family != "llava_video" else 0
    lengths = [end - start for start, end in zip([-1, *ends[:-1]], ends, strict=True)]
    lengths = [length - 1 for length in lengths if length > 1]
    assert sorted(lengths) == sorted(counts)
    assert len(ends) == len(counts) + own_newlines
    assert item.separators == len(counts) + (family == "llava_onevision")
    views = item.layout.patch_view[item.keep]
    assert [int(n) for n in torch.bincount(views)[starts]] == counts


def test_separators_can_be_left_out(tiny_host: Any) -> None:
    model, processor = tiny_host("qwen2_5_vl")
    inputs = tiny.example_inputs("qwen2_5_vl", processor, frames=8)
    with_marks, long = _sequence(model, inputs, retention=0.4)
    without, short = _sequence(model, inputs, retention=0.4, separators="none")
    assert torch.equal(with_marks.keep, without.keep)
    assert with_marks.separators == len(with_marks.info["group_count"]) and without.separators == 0
    assert long.shape[0] == short.shape[0] + with_marks.separators


def test_pooling_head_gives_frame_vectors(tiny_host: Any) -> None:
    """The published source of frame uniqueness, once the pair is there."""
    model, processor = tiny_host("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor, frames=8)
    pair = load_pair(*tiny.pair_of(model))
    item, _ = _sequence(model, inputs, retention=0.4, text_tower=pair, metric="features", frame_radius=-1.0)
    base = model.base_model
    with torch.no_grad():
        states = base.vision_tower(inputs["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-1]
        features = base.apply_pooling(base.multi_modal_projector(states))
    vectors = pair.summarise(states).vector
    expected = unicomp.compress(features, 0.4, frame_vectors=vectors, frame_radius=-1.0)
    assert item.info["group_budget"].tolist() == expected.budgets.tolist()
    assert torch.equal(item.keep, expected.merged.source)


def test_vocabulary_without_a_line_break() -> None:
    """There is nothing to put in, and the groups follow each other."""
    features = _clip(noise=0.4)
    layout = Layout.regular("video", 8, 6, 6)
    sample = TokenSample(features.flatten(0, 1), layout, {unicomp.NEWLINE: torch.empty(0)})
    plan = unicomp.UniComp(retention=0.15, metric="features").run_tokens(sample).checked(288, "unicomp")
    assert reading_order(layout, plan)[1].tolist() == list(range(plan.keep.numel()))
    sample.signals = {unicomp.NEWLINE: torch.zeros(features.shape[-1])}
    plan = unicomp.UniComp(retention=0.15, metric="features").run_tokens(sample).checked(288, "unicomp")
    slots = reading_order(layout, plan)[1]
    assert int((slots == -2).sum()) == plan.info["group_start"].numel()
