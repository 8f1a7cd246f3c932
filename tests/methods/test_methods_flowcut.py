"""FlowCut's functions: schedule, adaptive counts, smoothing, and the forms without class token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.core.tower import Block, TowerSample
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods import flowcut
from tokensieve.methods.flowcut import ATTENTION, LENGTH, LIKENESS, FlowCut
from tokensieve.ops import information_flow


def _rows(batch: int = 2, patches: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, patches, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def _run(flow: flowcut.EncoderFlow, layers: int, attention: torch.Tensor, seed: int = 1) -> list[int]:
    """Patches left behind every layer, for a fixed attention row over the original patches."""
    generator = torch.Generator().manual_seed(seed)
    lengths, row = [], attention
    for layer in range(layers):
        batch, count = row.shape
        semantic = torch.rand(batch, count, generator=generator)
        keep = flow.step(layer, row, semantic, torch.randn(batch, count, 8, generator=generator))
        row = row if keep is None else row.gather(1, keep)
        lengths.append(row.shape[1])
    return lengths


def test_scores_equal_the_plain_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, values = torch.rand(2, 12, generator=generator), torch.randn(2, 3, 13, 5, generator=generator)
    semantic = information_flow.semantic_attention(values)
    score = information_flow.flow_scores(attention, semantic, values.mean(dim=1)[:, 1:])
    for b in range(2):
        likeness = torch.zeros(12)
        for head in values[b]:
            weight = [math.exp(float(head[0] @ other)) for other in head]
            likeness += torch.tensor(weight[1:]) / sum(weight) / 3
        for j in range(12):
            length = float(values[b].mean(dim=0)[j + 1].abs().sum())
            expected = (attention[b, j] / attention[b].sum() + likeness[j] / likeness.sum()) * length
            torch.testing.assert_close(score[b, j], expected, rtol=1e-5, atol=1e-6)


def test_uniform_attention_waits_for_the_last_layer() -> None:
    uniform = torch.full((3, 40), 1 / 40)
    assert information_flow.prune_counts(uniform, 10, 8).tolist() == [0, 0, 0]
    lengths = _run(flowcut.EncoderFlow(8, 9), 12, uniform)
    assert lengths == [40] * 9 + [8] * 3


def test_one_hot_attention_drops_most() -> None:
    one_hot = torch.zeros(1, 40)
    one_hot[0, 7] = 1.0
    counts = {rem: int(information_flow.prune_counts(one_hot, rem, 8)) for rem in (0, 4, 16)}
    assert counts == {0: 32, 4: 16, 16: 8}
    assert int(information_flow.prune_counts(one_hot.half(), 4, 8)) == 16


def test_counts_stop_at_the_target() -> None:
    one_hot = torch.zeros(1, 10)
    one_hot[0, 0] = 1.0
    assert information_flow.prune_counts(one_hot, 1, 4).tolist() == [6]
    assert information_flow.prune_counts(one_hot, 3, 10).tolist() == [0]
    assert information_flow.prune_counts(one_hot, 3, 11).tolist() == [0]
    with pytest.raises(MethodError, match="prune to 0 patches"):
        information_flow.prune_counts(one_hot, 3, 0)


@pytest.mark.parametrize(("layers", "last", "first"), [(24, 21, 1), (9, 6, 0)])
def test_every_second_layer_up_to_the_last(layers: int, last: int, first: int) -> None:
    pruning = [layer for layer in range(layers) if flowcut.is_pruning_layer(layer, last)]
    assert pruning == list(range(first, last + 1, 2))


def test_without_a_surplus_nothing_happens() -> None:
    flow = flowcut.EncoderFlow(40, 5)
    assert _run(flow, 8, _rows()) == [40] * 8
    assert flow.score is None
    assert flow.idx is not None
    assert flow.idx.tolist() == [list(range(40))] * 2


def test_a_batch_keeps_equally_many_and_the_most_concentrated_decides() -> None:
    rows = _rows(3)
    rows[1] = torch.softmax(torch.arange(40.0), dim=0)
    flow = flowcut.EncoderFlow(6, 9)
    lengths = _run(flow, 12, rows)
    assert lengths[-1] == 6
    alone = information_flow.prune_counts(rows, 8, 6)
    assert flow.trace[0] == (40, 8, 6, int(alone[1]))
    assert int(alone[1]) > int(alone[0])
    assert flow.idx is not None
    assert bool((flow.idx.diff(dim=1) > 0).all())


def test_smoothing_runs_in_layers_that_do_not_prune() -> None:
    flow = flowcut.EncoderFlow(2, 3)
    semantic, values = torch.full((1, 6), 0.5), torch.ones(1, 6, 1)
    first, second = _rows(1, 6, 3), _rows(1, 6, 4)
    assert flow.step(0, first, semantic, values) is None
    flow.step(2, second, semantic, values)
    expected = (first + second) / 2 + 1 / 6
    torch.testing.assert_close(flow.score, expected, rtol=1e-5, atol=1e-6)
    keep = flow.step(3, second, semantic, values)
    ranked = ((first + second) / 4 + 0.5 * second)[0].argsort(descending=True)[:2]
    assert keep is not None
    assert keep[0].tolist() == sorted(ranked.tolist())


def test_the_form_without_class_token() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 3, 20, 4, generator=generator).unbind()
    row = information_flow.mean_query_attention(q, k)
    expected = torch.stack([(k[0, h] @ q[0, h].mean(0) / 2).softmax(0) for h in range(3)]).mean(0)
    torch.testing.assert_close(row[0], expected)
    flow = flowcut.EncoderFlow(8, 11, normalise=False)
    lengths, current = [], row
    for layer in range(12):
        keep = flow.step(layer, current, None, torch.ones(1, current.shape[1], 4))
        current = current if keep is None else current.gather(1, keep)
        lengths.append(current.shape[1])
    assert lengths[-1] == 8
    assert sorted(lengths, reverse=True) == lengths


def test_the_decoder_prune_with_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(6, 4, generator=generator), *torch.randn(2, 2, 15, 4, generator=generator).unbind()
    v_last = torch.randn(2, 4, generator=generator)
    keep = flowcut.select_in_decoder(q, k, v_last, v, 5)
    wide = [x.repeat_interleave(3, 0) for x in (k, v_last, v)]
    assert torch.equal(keep, flowcut.select_in_decoder(q, wide[0], wide[1], wide[2], 5))
    assert flowcut.select_in_decoder(q, k, v_last, v, 99).tolist() == list(range(15))
    with pytest.raises(MethodError, match="5 query and 2 key heads"):
        flowcut.select_in_decoder(q[:5], k, v_last, v, 5)


def test_bad_shapes() -> None:
    with pytest.raises(MethodError, match=r"\(2, 40\)"):
        information_flow.flow_scores(_rows(), None, torch.ones(2, 39, 4))


def _facts(**options: Any) -> HostFacts:
    return HostFacts("any", 32, 24, 22, True, patch_tokens=True, **options)


def _program(method: FlowCut, facts: HostFacts, pictures: int, tokens: int) -> flowcut.FlowProgram:
    program = method.tower_program(TowerSample(pictures, 576, tokens, False, 23, True, facts))
    assert isinstance(program, flowcut.FlowProgram)
    return program


def test_targets_follow_the_kind_of_image() -> None:
    """One picture keeps the share; tiles keep half of the image's tokens each where the LLM drops the rest."""
    single = _program(FlowCut(1 / 3), _facts(), 1, 576).flow
    assert (single.target, single.last) == (192, 21)
    assert _program(FlowCut(640 / 2880), _facts(tiled_images=True), 5, 2880).flow.target == 320
    assert _program(FlowCut(0.25, decoder_layer=None), _facts(tiled_images=True), 5, 2880).flow.target == 144
    assert FlowCut().decoder_layers(_facts()) == ()
    assert FlowCut().decoder_layers(_facts(tiled_images=True)) == (2,)
    assert FlowCut(0.25).token_count(Layout.regular("image", 1, 24, 24)) is None


def test_program_drops_only_where_the_schedule_says() -> None:
    program = flowcut.FlowProgram(4, 3)
    q, k, v = (torch.randn(2, 3, 11, 5, generator=torch.Generator().manual_seed(s)) for s in range(3))
    assert program.drop(Block(0, q, k, v, True)) is None
    keep = program.drop(Block(3, q, k, v, True))
    assert keep is not None and keep.shape == (2, 4)
    expected = flowcut.EncoderFlow(4, 3)
    row = (q[:, :, :1] @ k.transpose(2, 3) * 5**-0.5).softmax(-1).mean(1)[:, 0, 1:]
    for layer in (0, 3):
        chosen = expected.step(layer, row, information_flow.semantic_attention(v), v.mean(1)[:, 1:])
    assert torch.equal(keep, chosen)
    assert program.drop(Block(4, q, k, v, True)) is None


def test_towers_without_a_block_in_front_are_refused() -> None:
    with pytest.raises(MethodError, match="projects its first block"):
        FlowCut().check_host(HostFacts("any", 32, 1, 0, True))


def test_decoder_signals_equal_full_attention() -> None:
    """Attention, likeness and length from the layer's own projections and its eager attention map."""
    model, processor = tiny.load("llava_next")
    model = model.eval()
    inputs = tiny.example_inputs("llava_next", processor, batch=1)
    model.set_attn_implementation("eager")
    samples: list[DecoderSample] = []

    class Spy(FlowCut):
        def plan_decoder(self, sample: DecoderSample) -> Any:
            samples.append(sample)
            return super().plan_decoder(sample)

    seen: list[torch.Tensor] = []
    attention = model.base_model.language_model.layers[1].self_attn
    hooks = [
        attention.register_forward_hook(lambda module, args, output: seen.append(output[1])),
        attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    with torch.no_grad(), tokensieve.compress(model, Spy(0.2)) as run:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    values, weights = (next(x for x in seen if x.ndim == ndim) for ndim in (3, 4))
    item = run.history[0].items[0]
    assert item.separators == 0 and item.layout.has_row_separators
    start = int((inputs["input_ids"][0] == model.config.image_token_id).long().argmax())
    columns = start + torch.arange(item.keep.numel())
    alone = weights[0, :, -1][:, columns]
    torch.testing.assert_close(samples[0].signal(ATTENTION), (alone / alone.sum(1, keepdim=True)).mean(0))
    heads = values[0].unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
    products = (heads[:, columns] @ heads[:, -1].unsqueeze(2)).squeeze(2) * attention.head_dim**-0.5
    torch.testing.assert_close(samples[0].signal(LIKENESS), products.softmax(1).mean(0))
    torch.testing.assert_close(samples[0].signal(LENGTH), heads[:, columns].mean(0).abs().sum(1))
    expected = information_flow.flow_scores(
        samples[0].signal(ATTENTION)[None], samples[0].signal(LIKENESS)[None], heads[:, columns].mean(0)[None]
    )[0]
    wanted = round(item.layout.patches * 0.2)
    assert item.decoder[2].tolist() == item.keep[expected.topk(wanted).indices.sort().values].tolist()
