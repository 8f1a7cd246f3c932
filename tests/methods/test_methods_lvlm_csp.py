"""LVLM_CSP: sets of representatives, quotas of objects, counts per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.registry import build
from tokensieve.core.sample import HostFacts
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.measure.from_run import tokens_per_layer
from tokensieve.methods import lvlm_csp
from tokensieve.methods.lvlm_csp import LVLMCSP, LayerSplit


def test_uniform_set() -> None:
    assert lvlm_csp.uniform_set(576, 144).tolist() == list(range(0, 576, 4))
    assert lvlm_csp.uniform_set(10, 4).tolist() == [0, 2, 4, 6]
    assert lvlm_csp.uniform_set(7, 7).tolist() == list(range(7))
    for count in (0, 8):
        with pytest.raises(MethodError, match=f"cannot choose {count} representatives of 7"):
            lvlm_csp.uniform_set(7, count)


def test_random_set() -> None:
    first = lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(0))
    assert first.unique().numel() == 12 and bool((first.diff() > 0).all())
    assert torch.equal(first, lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, lvlm_csp.random_set(50, 12, torch.Generator().manual_seed(1)))


def test_class_and_attended_sets() -> None:
    attention = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2])
    assert lvlm_csp.class_set(attention, 2).tolist() == [1, 3]
    assert lvlm_csp.class_set(attention, 1).tolist() == [1]
    heads = torch.tensor([[0.9, 0.1, 0.0, 0.4], [0.0, 0.1, 0.8, 0.4]])
    assert lvlm_csp.attended_set(heads, 2).tolist() == [0, 2]
    with pytest.raises(MethodError, match="cannot choose 5"):
        lvlm_csp.attended_set(heads, 5)


def test_quotas() -> None:
    assert lvlm_csp.object_quotas(torch.tensor([100, 50, 1]), 16).tolist() == [10, 5, 1]
    assert lvlm_csp.object_quotas(torch.tensor([97, 1, 1, 1]), 2).tolist() == [1, 1, 1, 1]
    with pytest.raises(MethodError, match=r"\[3, 0\]"):
        lvlm_csp.object_quotas(torch.tensor([3, 0]), 2)


def _masks(sizes: list[int], tokens: int) -> torch.Tensor:
    masks, start = torch.zeros(len(sizes), tokens, dtype=torch.bool), 0
    for mask, size in zip(masks, sizes, strict=True):
        mask[start : start + size] = True
        start += size
    return masks


def test_object_set_follows_the_quotas() -> None:
    chosen = lvlm_csp.object_set(_masks([100, 50, 1], 200), 16)
    assert chosen.tolist() == [*range(0, 100, 10), *range(100, 150, 10), 150]


@pytest.mark.parametrize("count", [1, 2, 5, 17, 40])
def test_object_set_has_exactly_as_many(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    overlapping = torch.rand(6, 40, generator=generator) > 0.7
    for masks in (overlapping, _masks([35, 1, 1, 1, 1], 40), torch.zeros(2, 40), torch.zeros(0, 40)):
        chosen = lvlm_csp.object_set(masks, count)
        assert chosen.numel() == count
        assert bool((chosen.diff() > 0).all())
    with pytest.raises(MethodError, match=r"\[O, N\]"):
        lvlm_csp.object_set(torch.zeros(40), count)


def test_small_objects_are_taken_back_first_among_equals() -> None:
    masks = _masks([5, 2, 4], 12)
    assert lvlm_csp.object_set(masks, 2).tolist() == [0, 7]


def test_counts_and_presets() -> None:
    split = lvlm_csp.preset(32, 576)
    assert split == LayerSplit(8, 8, 16, 144, 36)
    assert lvlm_csp.tokens_per_layer(split, 576) == [144] * 8 + [576] * 8 + [36] * 16
    assert lvlm_csp.average_share(split, 576) == pytest.approx(0.34375)
    assert lvlm_csp.preset(32, 576, 70)[:3] == (9, 6, 17)
    assert lvlm_csp.average_share(lvlm_csp.preset(32, 576, 70), 576) == pytest.approx(0.291, abs=1e-3)
    assert lvlm_csp.average_share(LayerSplit(3, 2, 1, 16, 16), 16) == 1.0
    for layers in (3, 4, 28, 40):
        for reduction in (65, 70):
            parts = lvlm_csp.preset(layers, 5, reduction)
            assert sum(parts[:3]) == layers and min(parts) >= 1
    with pytest.raises(MethodError, match="50 %"):
        lvlm_csp.preset(32, 576, 50)


def test_nearest_representatives() -> None:
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    chosen = torch.tensor([0, 3, 6])
    assert lvlm_csp.nearest_representative(group, chosen).tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_stages_on_hosts() -> None:
    def facts(layers: int, deepstack: int = 0) -> HostFacts:
        return HostFacts("any", layers, 24, 22, True, 1, deepstack)

    assert LVLMCSP().decoder_layers(facts(32)) == (0, 8, 16)
    assert LVLMCSP(reduction=70).decoder_layers(facts(32)) == (0, 9, 15)
    assert LVLMCSP().decoder_layers(facts(5, 2)) == (2, 3, 4)
    assert LVLMCSP(layers="2/5").decoder_layers(facts(32)) == (0, 2, 5)
    assert [cut.restore for cut in LVLMCSP().decoder_cuts(facts(32))] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clustering": "grid"}, "clustering must be one of"),
        ({"scatter": "none"}, "scatter must be one of"),
        ({"layers": "8/4"}, "two whole, rising numbers"),
        ({"reduction": 50}, "no preset has 50 %"),
        ({"representatives": 0.0}, "Retention must lie"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build("lvlm-csp", options)


def test_everything_in_all_stages_is_the_model() -> None:
    model, processor = tiny.load("llava_onevision")
    model.eval()
    inputs: Any = tiny.example_inputs("llava_onevision", processor, batch=2)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        with tokensieve.compress(model, LVLMCSP(retention=0.9999, representatives=1.0)):
            got = model(**inputs).logits[:, -1]
    assert torch.allclose(got, expected, atol=1e-5)


def _by_hand(text: Any, embeds: torch.Tensor, visual: slice, frame: int, method: LVLMCSP) -> tuple[Any, list[int], Any]:
    """States, cache lengths and last set of one prompt, layer by layer on explicit index lists."""
    length, total = embeds.shape[1], visual.stop - visual.start
    first = torch.cat([lvlm_csp.uniform_set(frame, round(frame * 0.25)) + i for i in range(0, total, frame)])
    chosen = first + visual.start
    words = torch.tensor([i for i in range(length) if not visual.start <= i < visual.stop])
    states, lengths, weights = embeds.clone(), [], torch.empty(0)
    kept = torch.empty(0, dtype=torch.long)
    for index, layer in enumerate(text.layers):
        if index == 0:
            rows = torch.cat((words, chosen)).sort().values
        elif index == 1:
            rows = torch.arange(length)
            if method.scatter == "delta":
                for i in range(visual.start, visual.stop):
                    same = [c for c in chosen.tolist() if (c - visual.start) // frame == (i - visual.start) // frame]
                    near = min(same, key=lambda c: abs(c - i))
                    if i not in same:
                        states[0, i] = embeds[0, i] + states[0, near] - embeds[0, near]
        elif index == 2:
            kept = lvlm_csp.attended_set(weights[0, :, -1, visual], round(total * method.retention))
            rows = torch.cat((words, kept + visual.start)).sort().values
        mask = torch.full((rows.numel(), rows.numel()), float("-inf")).triu(1)[None, None]
        tables = text.rotary_emb(embeds, rows[None])
        inside = states[:, rows]
        out, weights = layer.self_attn(layer.input_layernorm(inside), position_embeddings=tables, attention_mask=mask)
        inside = inside + out
        states[:, rows] = inside + layer.mlp(layer.post_attention_layernorm(inside))
        lengths.append(rows.numel())
    return text.norm(states[:, rows]), lengths, kept


@pytest.mark.parametrize("scatter", ["raw", "delta"])
def test_against_layers_run_by_hand(scatter: Any) -> None:
    """Final states, the last set, and caches of three lengths; the average is that of the formula."""
    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("llava_onevision", processor)
    method = LVLMCSP(retention=0.1, scatter=scatter)
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        states = model.model(**inputs, past_key_values=cache).last_hidden_state
        handle.remove()
        layout = run.history[-1].items[0].layout
        start = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
        visual = slice(start, start + layout.patches)
        frame = layout.patches // len(layout.views)
        expected, lengths, kept = _by_hand(model.model.language_model, seen[0], visual, frame, method)
    assert torch.allclose(states, expected, atol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    assert tokens_per_layer(run.history[-1], len(lengths))[0][1] == lengths
    stages = run.history[-1].items[0].decoder
    assert torch.equal(stages[2], kept) and stages[1].numel() == layout.patches
    split = LayerSplit(1, 1, 3, stages[0].numel(), kept.numel())
    words = seen[0].shape[1] - layout.patches
    average = sum(length - words for length in lengths) / len(lengths) / layout.patches
    assert lvlm_csp.average_share(split, layout.patches) == pytest.approx(average)


def test_class_token_chooses() -> None:
    """Representatives by the tower's class token."""
    model, processor = tiny.load("llava")
    inputs: Any = tiny.example_inputs("llava", processor)
    with torch.no_grad(), tokensieve.compress(model.eval(), "lvlm-csp:clustering=cls") as run:
        model(**inputs)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(inputs["pixel_values"], output_attentions=True).attentions[-1][0, :, 0, 1:].mean(0)
    count = run.history[-1].items[0].decoder[0].numel()
    assert count == round(attention.numel() * 0.25)
    assert run.history[-1].items[0].decoder[0].tolist() == lvlm_csp.class_set(attention, count).tolist()


def test_a_cut_before_tokens_come_back_is_refused() -> None:
    model, _ = tiny.build_in_memory("llava_onevision")
    with pytest.raises(MethodError, match="brings tokens back in front of layer 3, but fastv cuts before"):
        tokensieve.attach(model, "lvlm-csp:layers=3/4+fastv:layer=2")
