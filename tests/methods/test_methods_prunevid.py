"""PruneVid: scenes, merging, budgets, selection for a question."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan
from tokensieve.core.registry import build
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods.prunevid import TEXT, PruneVid, question_scores, select_for_question
from tokensieve.methods.prunevid_merge import (
    Scenes,
    find_scenes,
    group_clusters,
    merge_scenes,
    ratio_for_budget,
    refine_labels,
)


def _video(cuts: tuple[int, ...] = (7,), frames: int = 16, tokens: int = 49, noise: float = 0.1) -> torch.Tensor:
    torch.manual_seed(0)
    scene = torch.zeros(frames, dtype=torch.long)
    for cut in cuts:
        scene[cut:] += 1
    return torch.randn(len(cuts) + 1, tokens, 24)[scene] + noise * torch.randn(frames, tokens, 24)


def _plan(features: torch.Tensor, **options: object) -> tuple[object, int]:
    frames, tokens, dim = features.shape
    layout = Layout.regular("video", frames, 1, tokens)
    plan = build("prunevid-merge", options).plan_tokens(TokenSample(features.reshape(-1, dim), layout))
    return plan.checked(layout.patches, "prunevid-merge"), plan.keep.numel()


def test_a_scene_cut_is_a_border() -> None:
    for cut in (3, 7, 8, 12):
        found = find_scenes(_video((cut,)), scenes=2 / 16)
        assert found.segments == [(0, cut - 1), (cut, 15)]


@pytest.mark.parametrize(
    ("labels", "refined"),
    [
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
        ([0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]),
        ([0, 0, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]),
        ([0, 0, 1, 2, 2], [0, 0, 0, 2, 2]),
        ([1, 2, 3], [0, 0, 0]),
        ([3, 1, 1], [1, 1, 1]),
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),
        ([0, 0, 2, 1, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]),
        ([5], [0]),
    ],
    ids=str,
)
def test_refinement(labels: list[int], refined: list[int]) -> None:
    assert refine_labels(labels) == refined


def test_refinement_leaves_no_single_frame_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    for frames in (2, 5, 16, 33):
        for _ in range(50):
            labels = torch.randint(0, 4, (frames,), generator=generator).tolist()
            refined = refine_labels(labels)
            assert all(len(list(run)) > 1 for _, run in itertools.groupby(refined)), labels
            assert set(refined) <= {*labels, 0}
            if all(len(list(run)) > 1 for _, run in itertools.groupby(labels)) and len(set(labels)) == len(
                list(itertools.groupby(labels))
            ):
                assert refined == labels


def test_identical_frames_stand_still() -> None:
    torch.manual_seed(1)
    features = torch.randn(1, 49, 24).repeat(12, 1, 1)
    found = find_scenes(features)
    assert found.static.all()
    merged, static, dynamic = merge_scenes(features, found)
    assert static == [24] * len(found.segments)
    assert dynamic == [0] * len(found.segments)
    assert (merged.source < 49 * 12).all()


def test_a_segment_of_one_frame_moves() -> None:
    found = find_scenes(_video(frames=1))
    assert found.segments == [(0, 0)]
    assert not found.static.any()


def test_static_similarity_is_the_mean_over_pairs() -> None:
    features = _video((), frames=6, tokens=20, noise=0.6)
    units = torch.nn.functional.normalize(features, dim=-1)
    pairs = torch.stack([(units[a] * units[b]).sum(-1) for a in range(6) for b in range(6) if a != b]).mean(dim=0)
    threshold = float(pairs.sort().values[9:11].mean())
    found = find_scenes(features, threshold=threshold, scenes=0.1)
    assert found.segments == [(0, 5)]
    assert torch.equal(found.static[0], pairs > threshold)


def test_small_groups_stay_and_large_ones_halve() -> None:
    assert [group_clusters(n, 0.5) for n in (1, 14, 15, 49)] == [1, 14, 7, 24]
    assert [group_clusters(n, 0.01) for n in (14, 15)] == [14, 1]
    assert [group_clusters(n, 0.5, 0) for n in (1, 2, 14)] == [1, 1, 7]


def test_merged_tokens_are_means_of_their_members() -> None:
    features = _video((6,), frames=10, noise=0.5)
    found = find_scenes(features)
    merged, static, dynamic = merge_scenes(features, found)
    flat, total = features.flatten(0, 1), merged.source.numel()
    assert total == sum(static) + sum(dynamic)
    weights = torch.zeros(total).index_add_(0, merged.merge_map.target, merged.merge_map.weight)
    assert torch.allclose(weights, torch.ones(total), atol=1e-5)
    assert merged.merge_map.source.sort().values.tolist() == list(range(490)), "every token is merged exactly once"
    for row in range(total):
        members = merged.merge_map.source[merged.merge_map.target == row]
        assert torch.allclose(merged.features[row], flat[members].mean(dim=0), atol=1e-5)
        assert merged.source[row] in members
    start = 0
    for (first, last), size, moving in zip(found.segments, static, dynamic, strict=True):
        assert (merged.source[start : start + size] // 49 == first).all()
        frames = (merged.source[start + size : start + size + moving] // 49).view(last - first + 1, -1)
        assert (frames == torch.arange(first, last + 1)[:, None]).all()
        start += size + moving


def test_the_budget_is_the_largest_total_within_reach() -> None:
    found = find_scenes(_video((6,), frames=10, noise=0.6))

    def total(ratio: float, small: int) -> int:
        return sum(times * group_clusters(size, ratio, small) for size, times in found.groups() if size)

    for target in range(40, 490, 45):
        ratio, small = ratio_for_budget(found, target)
        assert total(ratio, small) <= target
        denser = [total(step / 2000, small) for step in range(1, 2001)]
        assert total(ratio, small) == max(count for count in denser if count <= target)
        assert small == (14 if total(0.0, 14) <= target else 0)


def test_a_target_below_one_token_per_group_keeps_one() -> None:
    found = Scenes([(0, 3), (4, 7)], torch.zeros(2, 16, dtype=torch.bool))
    ratio, small = ratio_for_budget(found, 3)
    merged, _, dynamic = merge_scenes(_video(frames=8, tokens=16), found, ratio, small=small)
    assert dynamic == [4, 4]
    assert merged.source.numel() == 8


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.5])
def test_retention_bounds_the_total(retention: float) -> None:
    features = _video((5, 11), noise=0.6)
    _, count = _plan(features, retention=retention)
    assert count <= round(16 * 49 * retention)
    assert count > 0.8 * 16 * 49 * retention


def test_published_ratio_ignores_the_retention() -> None:
    features = _video((5, 11), noise=0.6)
    merged, *_ = merge_scenes(features, find_scenes(features))
    assert _plan(features, cluster_ratio=0.5, retention=0.1)[1] == merged.source.numel()


@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (2, 4), (3, 16), (6, 15)])
def test_small_videos_and_pictures(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    _, count = _plan(torch.randn(*shape, 8), retention=0.3)
    assert 1 <= count <= shape[0] * shape[1]


def test_bfloat16_keeps_the_dtype() -> None:
    features = _video().bfloat16()
    merged, *_ = merge_scenes(features, find_scenes(features))
    full, *_ = merge_scenes(features.float(), find_scenes(features.float()))
    assert merged.features.dtype == torch.bfloat16
    assert torch.equal(merged.source, full.source)


def test_selection_takes_the_best_of_every_part() -> None:
    torch.manual_seed(3)
    attention = torch.rand(4, 5, 10 + 3 * 6 + 2 * 4)
    scores = question_scores(attention)
    assert torch.equal(scores, attention.flatten(0, 1).max(dim=0).values)
    kept = select_for_question(scores, [10, 0], [18, 8], [3, 2])
    blocks = [(0, 10), (10, 6), (16, 6), (22, 6), (28, 4), (32, 4)]
    expected = []
    for start, size in blocks:
        best = scores[start : start + size].argsort(descending=True)[: int(size * 0.4)]
        expected += sorted((best + start).tolist())
    assert kept.tolist() == expected
    assert torch.equal(select_for_question(scores, [10, 0], [18, 8], [3, 2], alpha=1.0), torch.arange(36))
    with pytest.raises(MethodError, match="10 static and 18 dynamic"):
        select_for_question(scores, [10], [18], [3])


@pytest.mark.parametrize("options", [{"cluster_ratio": 0.0}, {"scenes": 1.5}, {"neighbours": 0}], ids=str)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(MethodError, match="must be"):
        build("prunevid-merge", options)


def _select_by_hand(model: Any, embeds: torch.Tensor, method: PruneVid, run: Any, start: int) -> tuple[Any, list[int]]:
    """The selection from the eager attention of the whole merged prompt, and states of the layers behind it."""
    text, item = model.model.language_model, run.history[-1].items[0]
    (cut,) = method.decoder_layers(run.facts)
    length = embeds.shape[1]
    hidden, mask = embeds, torch.full((length, length), float("-inf")).triu(1)[None, None]
    tables = text.rotary_emb(hidden, torch.arange(length)[None])
    for layer in text.layers[:cut]:
        normed = layer.input_layernorm(hidden)
        out, weights = layer.self_attn(normed, position_embeddings=tables, attention_mask=mask)
        hidden = hidden + out
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    visual = item.keep.numel()
    # Behind the video stand its newline embeddings, which are no text.
    scores = question_scores(weights[0, :, start + visual + item.separators :, start : start + visual])
    scenes, tokens = item.info["segments"].tolist(), item.info["static"].shape[1]
    static, dynamic = [], []
    for number, (first, last) in enumerate(scenes):
        inside = (item.keep // tokens >= first) & (item.keep // tokens <= last)
        still = item.info["static"][number][item.keep % tokens]
        static.append(int((inside & still).sum()))
        dynamic.append(int((inside & ~still).sum()))
    frames = [last - first + 1 for first, last in scenes]
    kept = select_for_question(scores, static, dynamic, frames, method.alpha)
    rest = [*range(start), *(start + kept).tolist(), *range(start + visual, length)]
    hidden, tables = hidden[:, rest], tuple(table[:, rest] for table in tables)
    for layer in text.layers[cut:]:
        hidden = layer(hidden, position_embeddings=tables, attention_mask=mask[..., : len(rest), : len(rest)])
    return text.norm(hidden), item.keep[kept].tolist()


def test_selection_for_the_question() -> None:
    """Selection and states equal layers run by hand; all caches hold the same; what follows counts on from before."""
    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("llava_onevision", processor, batch=1)
    seen: list[dict[str, Any]] = []
    text = model.model.language_model
    method = PruneVid(retention=0.9, scenes=0.5, threshold=0.05)
    cache = DynamicCache(config=model.config.get_text_config())
    start = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        spy = text.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append({"hidden": args[0], **kwargs}), with_kwargs=True
        )
        states = model.model(**inputs, past_key_values=cache).last_hidden_state
        expected, kept = _select_by_hand(model, seen[0]["hidden"], method, run, start)
        (cut,) = method.decoder_layers(run.facts)
        assert sorted(run.history[-1].items[0].decoder[cut].tolist()) == sorted(kept)
        assert 0 < len(kept) < run.history[-1].items[0].keep.numel()
        assert torch.allclose(states, expected, atol=1e-5)
        assert [layer.get_seq_length() for layer in cache.layers] == [states.shape[1]] * len(cache.layers)
        ids = torch.cat((inputs["input_ids"], torch.tensor([[5]])), dim=1)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        model.model(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), past_key_values=cache)
        spy.remove()
    merged = seen[0]["hidden"].shape[1]
    assert torch.equal(seen[-1]["position_embeddings"][0], text.rotary_emb(states, torch.tensor([[merged]]))[0])
    assert [layer.get_seq_length() for layer in cache.layers] == [states.shape[1] + 1] * len(cache.layers)


def test_eviction_needs_no_growing_cache() -> None:
    """Entries of a preallocated cache are masked instead; a later cut of another kind leaves its own lengths."""
    model, processor = tiny.load("llava_onevision")
    model.eval()
    inputs: Any = tiny.example_inputs("llava_onevision", processor, batch=2)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), tokensieve.compress(model, "prunevid:retention=0.6,layer=1+fastv:layer=3,retention=0.5"):
        cache = DynamicCache(config=model.config.get_text_config())
        expected = model.generate(**inputs, past_key_values=cache, **options)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        assert lengths[0] == lengths[1] == lengths[2] > lengths[3] == lengths[4]
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=expected.shape[1])
        assert torch.equal(model.generate(**inputs, past_key_values=static, **options), expected)


def test_groups_of_a_few_tokens() -> None:
    """Where no group keeps a token by its share, the best token stays."""
    attention = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    sample = DecoderSample(
        torch.zeros(6, 4),
        11,
        6,
        torch.arange(6) // 2,
        torch.zeros(6, dtype=torch.long),
        {TEXT: attention},
        patch=torch.arange(6),
        infos=[{"segments": torch.tensor([[0, 2]]), "static": torch.zeros(1, 2, dtype=torch.bool)}],
    )
    plan = PruneVid().plan_decoder(sample)
    assert plan.keep.tolist() == [int(attention.amax((0, 1)).argmax())]
    assert plan.fate == "evicted"
    assert PruneVid(alpha=0.5).plan_decoder(sample).keep.numel() == 3
    with pytest.raises(MethodError, match="alpha is 0"):
        PruneVid(alpha=0.0)


def test_layers_of_the_selection() -> None:
    def cut(layers: int, deepstack: int = 0, **options: Any) -> int:
        return PruneVid(**options).decoder_layers(HostFacts("any", layers, 24, 22, False, 1, deepstack))[0]

    assert (cut(32), cut(28), cut(36, 3), cut(5), cut(5, 2)) == (11, 11, 11, 2, 2)
    assert cut(32, layer=4) == 5


def test_selection_behind_dropped_frames() -> None:
    """With a frames-stage method in front, tokens find their segments among the frames that are left."""
    model, processor = tiny.load("llava_onevision")
    inputs: Any = tiny.example_inputs("llava_onevision", processor, batch=2)
    seen: list[DecoderSample] = []

    class Spy(PruneVid):
        def plan_decoder(self, sample: DecoderSample) -> Plan:
            seen.append(sample)
            return super().plan_decoder(sample)

    method = Spy(retention=0.6, scenes=1.0, neighbours=2, threshold=0.0)
    frames = build("frame-subsample", {"retention": 0.5})
    with torch.no_grad(), tokensieve.compress(model.eval(), [frames, method]) as run:
        model(**inputs)
    for sample, item in zip(seen, run.history[-1].items, strict=True):
        assert sample.patch is not None
        mine = torch.arange(sample.patch.numel())
        groups = PruneVid._groups(sample, mine, sample.infos[0])
        used = item.layout.patch_view[item.keep].unique()
        assert used.numel() < len(item.layout.views)
        cells = sample.patch % sample.infos[0]["static"].shape[1]
        for number, group in enumerate(groups.tolist()):
            frame = int(torch.searchsorted(sample.infos[0]["views"], sample.view[number]))
            segment = [first <= frame <= last for first, last in sample.infos[0]["segments"].tolist()].index(True)
            static = bool(sample.infos[0]["static"][segment, cells[number]])
            assert group == (-1 - segment if static else frame)
