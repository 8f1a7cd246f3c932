"""FrameFusion: the cost, chains of merges, and the whole method against layers run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.cuts import Cut
from tokensieve.core.registry import build
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.measure.from_run import tokens_per_layer
from tokensieve.methods.framefusion import NEVER, FrameFusion, merge_runs, neighbour_similarity, sparsity_left

FACTS = HostFacts("any", 28, 24, 22, False)


def test_published_sparsities() -> None:
    assert sparsity_left([], 0.3, 28) == pytest.approx(0.7)
    assert sparsity_left([0.5], 0.3, 28) == pytest.approx(0.4148, abs=1e-4)
    assert sparsity_left([0.5, 0.05], 0.3, 28) == pytest.approx(0.3988, abs=1e-4)
    assert sparsity_left([0.0], 0.3, 28) == pytest.approx(0.7259, abs=1e-4)
    assert sparsity_left([0.9], 0.3, 28) == 0.0
    assert sparsity_left([0.0] * 9, 0.3, 28) is None
    assert sparsity_left([0.0] * 4, 1.0, 4) == 0.0


def test_runs_collapse_into_their_heads() -> None:
    """Similarity is between neighbours in time; a run of similar tokens joins the token in front of it."""
    states = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 0], [1, 0.2], [0, 1]])
    cells = torch.tensor([0, 1, 0, 1, 0, 1])
    similarity, order = neighbour_similarity(states, cells)
    assert order.tolist() == [0, 2, 4, 1, 3, 5]
    assert similarity[0] == similarity[3] == NEVER
    assert similarity[4].item() == pytest.approx(0.0)
    keep, merged = merge_runs(states, order, similarity > 0.9)
    assert keep.tolist() == [0, 1, 3, 5]
    torch.testing.assert_close(merged[0], states[[0, 2, 4]].mean(0))
    assert torch.equal(merged[1:], states[[1, 3, 5]])


def _call(method: FrameFusion, states: torch.Tensor, cells: torch.Tensor, memory: dict[str, Any], cut: Cut) -> Any:
    zeros = torch.zeros_like(cells)
    attention = torch.rand(cells.numel(), generator=torch.Generator().manual_seed(5))
    signals = {"decoder.last_query_attention": attention}
    sample = DecoderSample(states, cut.layer, 0, zeros, zeros, signals, memory, facts=FACTS, cut=cut, cell=cells)
    return method.plan_decoder(sample)


def test_identical_frames_take_one_call() -> None:
    """Merging is limited to what the cost asks for, and the first frame stays."""
    method = FrameFusion()
    memory: dict[str, Any] = {"sparsity": [], "merged": False, "pruned": False}
    frame = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    plan = _call(method, frame.repeat(10, 1), torch.arange(50).repeat(10), memory, Cut(0))
    assert plan.keep.numel() == 500 - int(0.7 * 500)
    assert set(range(50)) <= set(plan.keep.tolist())
    assert memory["pruned"] and not method.acts(Cut(0, "feed"), memory)


def test_noise_is_pruned_behind_the_first_attention() -> None:
    method, generator = FrameFusion(), torch.Generator().manual_seed(0)
    memory: dict[str, Any] = {"sparsity": [], "merged": False, "pruned": False}
    states, cells = torch.randn(480, 64, generator=generator), torch.arange(48).repeat(10)
    first = _call(method, states, cells, memory, Cut(0))
    assert first.keep.numel() == 480 and memory == {"sparsity": [0.0], "merged": True, "pruned": False}
    second = _call(method, states, cells, memory, Cut(0, "feed"))
    assert second.keep.numel() == round(480 * (28 * 0.3 - 1) / 27)


def test_average_share_is_the_cost() -> None:
    """Some merging, then the cut: tokens per layer average to c."""
    method, generator = FrameFusion(similarity=0.9), torch.Generator().manual_seed(0)
    memory: dict[str, Any] = {"sparsity": [], "merged": False, "pruned": False}
    states, cells = torch.randn(1000, 64, generator=generator), torch.arange(100).repeat(10)
    states[300:500] = states[100:300]
    states[200:300] = states[100:200]
    cuts, shares = [Cut(0), *(Cut(layer, "feed") for layer in range(27))], []
    for cut in cuts:
        if method.acts(cut, memory):
            plan = _call(method, states, cells, memory, cut)
            states, cells = states[plan.keep] if plan.features is None else plan.features, cells[plan.keep]
        shares.append(cells.numel() / 1000)
    assert len(memory["sparsity"]) >= 2 and memory["pruned"]
    assert sum(shares) / 28 == pytest.approx(0.3, abs=0.01)


def test_a_cost_that_is_used_up() -> None:
    cells, states = torch.arange(4).repeat(3), torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    for official in (False, True):
        method = FrameFusion(retention=0.05, official=official)
        memory: dict[str, Any] = {"sparsity": [0.0, 0.0], "merged": True, "pruned": False}
        if official:
            with pytest.raises(MethodError, match=r"cost of 0\.05: the first 2 layers"):
                _call(method, states, cells, memory, Cut(1, "feed"))
        else:
            assert _call(method, states, cells, memory, Cut(1, "feed")).keep.numel() == 1


def _by_hand(model: Any, embeds: torch.Tensor, visual: torch.Tensor, cells: torch.Tensor, method: FrameFusion) -> Any:
    """Prefill of one row, layer by layer on explicit tensors: final states, keys and values of every layer."""
    text = model.model.language_model
    hidden, positions, memory = embeds, torch.arange(embeds.shape[1]), method.read_prompt(None)  # type: ignore[arg-type]
    kept, caches = torch.arange(embeds.shape[1]), []
    facts = HostFacts("any", len(text.layers), 1, 0, False)

    def shorten(hidden: torch.Tensor, cut: Cut, attention: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if not method.acts(cut, memory):
            return hidden
        mine = torch.isin(kept, visual).nonzero().flatten()
        zeros = torch.zeros_like(mine)
        cell = cells[torch.searchsorted(visual, kept[mine])]
        signals = {"decoder.last_query_attention": attention[mine]}
        sample = DecoderSample(hidden[0, mine], cut.layer, 0, zeros, zeros, signals, memory, None, facts, cut=cut)
        sample.cell = cell
        plan = method.plan_decoder(sample)
        hidden = hidden.clone()
        if plan.features is not None:
            hidden[0, mine[plan.keep]] = plan.features
        stay = torch.ones(kept.numel(), dtype=torch.bool)
        stay[mine] = False
        stay[mine[plan.keep]] = True
        kept = kept[stay]
        return hidden[:, stay]

    hidden = shorten(hidden, Cut(0), torch.zeros(embeds.shape[1]))
    for index, layer in enumerate(text.layers):
        cos, sin = text.rotary_emb(hidden, positions[kept][None])
        length = kept.numel()
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        normed = layer.input_layernorm(hidden)
        out, weights = layer.self_attn(normed, position_embeddings=(cos, sin), attention_mask=mask)
        caches.append(kept)
        hidden = hidden + out
        if index < len(text.layers) - 1:
            hidden = shorten(hidden, Cut(index, "feed"), weights[0, :, -1].mean(0))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return text.norm(hidden), caches, kept


@pytest.mark.parametrize(("similarity", "video"), [(0.6, "noise"), (-0.9, "noise")])
def test_against_layers_run_by_hand(similarity: float, video: str) -> None:
    """Final states and what every layer's cache holds, with merging in one or several layers."""
    from transformers import DynamicCache

    model, processor = tiny.load("llava_onevision")
    model.eval().set_attn_implementation("eager")
    inputs = tiny.example_inputs("llava_onevision", processor)
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    method = FrameFusion(retention=0.5, similarity=similarity, least_ratio=0.01)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        with tokensieve.compress(model, method) as run:
            states = model.model(**inputs, past_key_values=cache).last_hidden_state
        handle.remove()
        item = run.history[-1].items[0]
        layout = item.layout
        places = (inputs["input_ids"][0] == model.config.video_token_id).nonzero().flatten()[layout.patch_tokens]
        cells = torch.arange(layout.patches) % (layout.patches // len(layout.views))
        expected, caches, kept = _by_hand(model, seen[0], places, cells, method)
    assert torch.allclose(states, expected, atol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [len(ids) for ids in caches]
    last = max(item.decoder)
    assert places[item.decoder[last]].tolist() == [i for i in kept.tolist() if i in set(places.tolist())]


def test_newlines_are_cells() -> None:
    """Row separators of LLaVA-Video merge over frames like patches; decoding goes on."""
    model, processor = tiny.load("llava_video")
    inputs = tiny.example_inputs("llava_video", processor)
    layout = None
    lengths: list[int] = []
    text = model.eval().model.language_model
    with torch.no_grad(), tokensieve.compress(model, "framefusion:retention=0.4,similarity=0.99999") as run:
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
                with_kwargs=True,
            )
            for layer in text.layers
        ]
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for handle in handles:
            handle.remove()
        layout = run.history[-1].items[0].layout
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    newlines = int((~layout.is_patch & (layout.view >= 0)).sum())
    rows = newlines // len(layout.views)
    # Only the separators, which are equal in all frames, merge in front of the first layer.
    assert lengths[0] == inputs["input_ids"].shape[1] - (newlines - rows)
    counted = tokens_per_layer(run.history[-1], len(text.layers))[0][1]
    assert counted == lengths[: len(counted)]


@pytest.mark.parametrize(
    ("options", "message"), [({"similarity": 2}, "similarity is 2"), ({"layers": 0}, "layers is 0")]
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build("framefusion", options)


def test_other_cuts_are_refused() -> None:
    model, _ = tiny.build_in_memory("llava_onevision")
    with pytest.raises(MethodError, match="both cut in front of layer 2"):
        tokensieve.attach(model, "framefusion+fastv")


def test_views_of_a_picture_are_no_frames() -> None:
    """The base picture and the mosaic of tiles do not merge, however low the bound."""
    model, processor = tiny.load("llava_next")
    inputs = tiny.example_inputs("llava_next", processor)
    with torch.no_grad(), tokensieve.compress(model.eval(), "framefusion:similarity=-1") as run:
        model(**inputs)
    item = run.history[-1].items[0]
    assert len(item.layout.views) > 1
    # The newlines of the mosaic are cells of their own too, so that nothing at all merges in front of the LLM.
    assert item.decoder[0].numel() == item.layout.patches
    assert run.history[-1].inside[0] == run.history[-1].after
