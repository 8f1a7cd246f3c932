"""ToDRE: the greedy choice, its pivots, and the rule of the second stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods.todre import (
    CLASS_ATTENTION,
    SHARES,
    ToDRE,
    all_visual_dropped,
    attention_share,
    central_token,
    check_layers,
    select_dissimilar,
)

FACTS = HostFacts("any", 2, 3, 1, True)


def _features(patches: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(patches, dim, generator=torch.Generator().manual_seed(seed))


def test_one_token_of_each_cluster() -> None:
    features = torch.eye(3)[torch.tensor([0] * 10 + [1] * 5 + [2])]
    keep, order = select_dissimilar(features, 3, 4)
    assert order.tolist() == [4, 10, 15]
    assert keep.tolist() == [4, 10, 15]


def test_all_and_one() -> None:
    features = _features(12)
    assert select_dissimilar(features, 12, 3)[0].tolist() == list(range(12))
    assert select_dissimilar(features, 1, 3)[0].tolist() == [3]
    with pytest.raises(MethodError, match="cannot keep 13 of 12"):
        select_dissimilar(features, 13, 3)


def test_pivots() -> None:
    features = _features(32)
    cosine = torch.nn.functional.cosine_similarity(features, features.mean(dim=0, keepdim=True))
    assert central_token(features) == int(cosine.argmin())
    assert central_token(features, farthest=False) == int(cosine.argmax())
    sample = TokenSample(features, Layout.regular("video", 2, 4, 4), facts=FACTS)
    sample.signals = {CLASS_ATTENTION: torch.arange(32.0).roll(5)}
    assert ToDRE().first_token(sample) == 4
    assert ToDRE(pivot="farthest").first_token(sample) == central_token(features)
    drawn = {ToDRE(pivot="random", seed=seed).first_token(sample) for seed in range(20)}
    assert len(drawn) > 5
    assert drawn == {ToDRE(pivot="random", seed=seed).first_token(sample) for seed in range(20)}
    assert ToDRE().signals(FACTS) == (CLASS_ATTENTION,)
    assert ToDRE(pivot="center").signals(FACTS) == ()
    assert ToDRE().signals(HostFacts("any", 2, 3, 2, False)) == ()


def test_images_in_tiles_start_in_the_base_picture() -> None:
    cells = torch.cat([torch.cartesian_prod(torch.tensor([v]), torch.arange(4), torch.arange(4)) for v in (0, 1)])
    layout = Layout.from_cells("image", [(4, 4), (4, 4)], cells)
    scores = torch.zeros(32)
    scores[torch.tensor([6, 20])] = torch.tensor([1.0, 2.0])
    sample = TokenSample(_features(32), layout, {CLASS_ATTENTION: scores}, FACTS)
    assert ToDRE().first_token(sample) == 6
    plan = ToDRE(retention=0.25).plan_tokens(sample)
    assert plan.info["pivot"] == 6 and 6 in plan.keep
    assert plan.keep.numel() == 8


def test_frame_budgets() -> None:
    layout = Layout.regular("video", 3, 4, 4)
    sample = TokenSample(_features(48), layout, budget=torch.tensor([1, 9, 2]))
    plan = ToDRE(budget="vidcom2").plan_tokens(sample)
    assert torch.bincount(plan.keep // 16).tolist() == [1, 9, 2]


def test_pivot_of_a_model_with_class_token() -> None:
    model, processor = tiny.load("llava")
    inputs: Any = tiny.example_inputs("llava", processor)
    with torch.no_grad(), tokensieve.compress(model.eval(), "todre", retention=0.1) as run:
        model(**inputs)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    expected = int(attention[0, :, 0, 1:].mean(dim=0).argmax())
    assert run.history[-1].items[0].info["pivot"] == expected


def test_check_layers() -> None:
    assert check_layers(32) == (28,)
    assert check_layers(28) == (24,)
    assert check_layers(32, (0.75, 0.5)) == (16, 24)
    with pytest.raises(MethodError, match="depths"):
        check_layers(32, (1.0,))


def test_relevance_rule() -> None:
    system, visual, text = 3, 6, 4
    total = system + visual + text
    logits = torch.randn(2, total, total, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(total, total).tril().bool()
    attention = logits.masked_fill(~causal, float("-inf")).softmax(dim=-1)
    is_visual = (torch.arange(total) >= system) & (torch.arange(total) < system + visual)
    is_text = torch.arange(total) >= system + visual
    tv = attention_share(attention[:, is_text], is_visual)
    vt = attention_share(attention[:, is_visual], is_text)
    mean = attention.mean(dim=0)
    assert tv == pytest.approx(float(mean[9:, 3:9].sum()) / text, abs=1e-6)
    assert vt == 0.0
    assert not all_visual_dropped(tv, vt, 0.0)
    assert all_visual_dropped(tv, vt, 1.01)
    assert all_visual_dropped(0.09, 0.09) and not all_visual_dropped(0.09, 0.1) and not all_visual_dropped(0.1, 0.0)
    assert attention_share(attention[:, :0], is_visual) == 0.0
    with pytest.raises(MethodError, match="columns"):
        attention_share(attention, is_visual[:5])


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="not 'first'"):
        ToDRE(pivot="first")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="threshold is -1"):
        ToDRE(threshold=-1)
    with pytest.raises(MethodError, match="depths"):
        ToDRE(depth=1.0)


def test_all_or_nothing_inside_the_llm() -> None:
    """Cache lengths of both outcomes; dropping equals hiding the visual keys from the later layers."""
    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("llava_onevision", processor)
    text = model.model.language_model
    with torch.no_grad():
        for threshold, gone in ((0.0, False), (1e-9, False), (1.01, True)):
            method = ToDRE(retention=0.5, threshold=threshold)
            cache = DynamicCache(config=model.config.get_text_config())
            with tokensieve.compress(model, method) as run:
                states = model.model(**inputs, past_key_values=cache).last_hidden_state
                item = run.history[-1].items[0]
                lengths = [layer.get_seq_length() for layer in cache.layers]
            # The patches that entered, and the newline embedding behind the video.
            visual = item.keep.numel() + item.separators
            assert lengths == [lengths[0]] * 4 + [lengths[0] - gone * visual]
            assert bool(item.decoder) == (threshold > 0)
            if threshold == 0:
                whole, start = lengths[0], int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
        hidden = slice(start, start + visual)

        def hide(module: Any, args: Any, kwargs: Any) -> Any:
            mask = torch.full((whole, whole), -1e9).triu(1)
            mask[:, hidden] = -1e9
            return args, {**kwargs, "attention_mask": mask[None, None]}

        handle = text.layers[4].register_forward_pre_hook(hide, with_kwargs=True)
        with tokensieve.compress(model, ToDRE(retention=0.5, threshold=0)):
            masked = model.model(**inputs).last_hidden_state
        handle.remove()
    rest = torch.ones(whole, dtype=torch.bool)
    rest[hidden] = False
    assert torch.allclose(states, masked[:, rest], atol=1e-5)


def test_shares_of_a_model() -> None:
    """What decides equals the eager attention of the layer, with text between visual items."""
    model, processor = tiny.load("qwen2_5_vl")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("qwen2_5_vl", processor, videos=2)
    found: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    class Spy(ToDRE):
        def plan_decoder(self, sample: DecoderSample) -> Plan:
            found.append(sample.signal(SHARES))
            return super().plan_decoder(sample)

        def plan_tokens(self, sample: TokenSample) -> Plan:
            return keep_all(sample.layout.patches)

    handle = model.model.language_model.layers[3].self_attn.register_forward_hook(
        lambda module, args, output: weights.append(output[1])
    )
    with torch.no_grad(), tokensieve.compress(model, Spy()):
        model(**inputs)
    handle.remove()
    mean, placeholder = weights[0][0].mean(0), inputs["input_ids"][0] == model.config.video_token_id
    visual = placeholder.nonzero().flatten()
    text = (~placeholder & (torch.arange(placeholder.numel()) > visual[0])).nonzero().flatten()
    assert float(found[0][0]) == pytest.approx(float(mean[text][:, visual].sum() / text.numel()), abs=1e-5)
    assert float(found[0][1]) == pytest.approx(float(mean[visual][:, text].sum() / visual.numel()), abs=1e-5)
    assert float(found[0][1]) > 0
