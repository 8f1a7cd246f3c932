"""CATP: counts of both stages, coverage with agreement, scores inside the LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.layout import Layout
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods import catp
from tokensieve.methods.catp import CATP, EARLIER_LAST, LAST, TEXT_STATES


def test_counts() -> None:
    counts = catp.stage_counts([576] * 5, 0.778)
    assert counts == catp.StageCounts([351] * 5, 511, 127)
    assert catp.stage_counts([10, 10], 0.9) == catp.StageCounts([5, 5], 1, 1)
    assert catp.stage_counts([576], 0.5) == catp.StageCounts([432], 0, 288)
    assert catp.stage_counts([7, 3], 0.0) == catp.StageCounts([7, 3], 7, 3)
    for sizes, ratio in (([], 0.5), ([4, 0], 0.5), ([4], 1.0)):
        with pytest.raises(MethodError, match="cannot prune"):
            catp.stage_counts(sizes, ratio)


def test_one_token_of_each_cluster_first() -> None:
    features = torch.eye(4)[torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3])]
    keep, order = catp.select_covering(features, 4)
    assert order.tolist() == [0, 6, 9, 11]
    assert keep.tolist() == [0, 6, 9, 11]
    alone, _ = catp.select_covering(features, 4, features[11:], weight=0.0)
    assert torch.equal(alone, keep)


def test_agreement_with_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(30, 8, generator=generator), torch.randn(5, 8, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(features, text.mean(dim=0, keepdim=True))
    keep, _ = catp.select_covering(features, 6, text, weight=1e4)
    assert keep.tolist() == sorted(cosine.topk(6).indices.tolist())
    scaled, _ = catp.select_covering(features, 12, 40 * text)
    assert torch.equal(scaled, catp.select_covering(features, 12, text)[0])
    assert not torch.equal(scaled, catp.select_covering(features, 12)[0])
    similarity = catp.rescaled_cosine(features, features)
    assert float(similarity.min()) >= 0
    torch.testing.assert_close(similarity.diagonal(), torch.ones(30))


def test_scores_of_examples() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, mean = torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)
    now, before = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
    scores = catp.example_scores(now, before, hidden, mean)
    for j in range(6):
        cosine = float(hidden[j] @ mean / hidden[j].norm() / mean.norm())
        assert float(scores[j]) == pytest.approx(max(0.0, float(now[j] - before[j])) + 0.6 * cosine, abs=1e-5)
    torch.testing.assert_close(catp.query_scores(hidden, mean), catp.example_scores(now, now, hidden, mean, weight=1.0))
    falling = catp.example_scores(before.minimum(now), before.maximum(now), hidden, mean, weight=0.0)
    assert falling.tolist() == [0.0] * 6
    assert catp.select_best(falling, 2).tolist() == [0, 1]


def test_examples_are_ranked_together() -> None:
    scores = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7, 0.3])
    assert catp.select_best(scores, 3).tolist() == [2, 3, 4]


def test_cost_of_the_full_model() -> None:
    assert 32 * catp.layer_flops(5 * 576, 4096, 11008) / 1e12 == pytest.approx(20.83, abs=0.01)


def test_bad_shapes() -> None:
    features = torch.randn(5, 4)
    for count in (0, 6):
        with pytest.raises(MethodError, match=f"cannot keep {count} tokens"):
            catp.select_covering(features, count)
    for text in (torch.randn(3, 5), torch.zeros(0, 4), torch.randn(4)):
        with pytest.raises(MethodError, match="text must be embeddings"):
            catp.select_covering(features, 2, text)
    with pytest.raises(MethodError, match="two attention rows"):
        catp.example_scores(torch.rand(5), torch.rand(4), features, torch.rand(4))


def test_layers() -> None:
    def cuts(layers: int, deepstack: int = 0, **options: Any) -> tuple[int, ...]:
        return CATP(**options).decoder_layers(HostFacts("any", layers, 24, 22, True, 1, deepstack))

    assert cuts(32) == cuts(28) == cuts(36, 3) == (7, 8)
    assert cuts(40) == (11, 12)
    assert cuts(5) == cuts(5, 2) == (2, 3)
    assert cuts(32, layer=3) == (4, 5)
    with pytest.raises(MethodError, match="layer is 0"):
        CATP(layer=0)
    with pytest.raises(MethodError, match="pairing must be one of behind, before"):
        CATP(pairing="inside")  # type: ignore[arg-type]


def test_paired_text_in_front_of_the_llm() -> None:
    """The text of the pair decides, on the side that the prompt has it."""
    generator = torch.Generator().manual_seed(3)
    features, behind, before = (torch.randn(n, 8, generator=generator) for n in (40, 5, 6))
    layout = Layout.regular("image", 1, 5, 8)
    sample = TokenSample(features, layout, text=behind, text_before=before)
    for pairing, text in (("behind", behind), ("before", before)):
        method = CATP(retention=0.4, pairing=pairing)  # type: ignore[arg-type]
        keep = method.plan_tokens(sample).keep
        assert torch.equal(keep, catp.select_covering(features, 28, text)[0])
        assert keep.numel() == method.token_count(layout) == 28
    sample.text = torch.zeros(0, 8)
    assert torch.equal(CATP(retention=0.4).plan_tokens(sample).keep, catp.select_covering(features, 28)[0])


def test_a_query_without_examples() -> None:
    """Nothing leaves at the first cut; at the second the text behind the picture ranks."""
    generator = torch.Generator().manual_seed(4)
    hidden, words = torch.randn(8, 4, generator=generator), torch.randn(5, 4, generator=generator)
    zeros = torch.zeros(8, dtype=torch.long)
    facts = HostFacts("any", 32, 24, 22, True)
    sample = DecoderSample(hidden, 7, 8, zeros, zeros, facts=facts, uncompressed=torch.tensor([10]))
    sample.signals = {LAST: torch.rand(8), EARLIER_LAST: torch.rand(8), TEXT_STATES: words}
    sample.text_item = torch.tensor([-1, -1, 0, 0, 0])
    method = CATP(retention=0.3)
    assert method.plan_decoder(sample).keep.tolist() == list(range(8))
    sample.layer = 8
    cosine = torch.nn.functional.cosine_similarity(hidden, words[2:].mean(0, keepdim=True))
    assert method.plan_decoder(sample).keep.tolist() == sorted(cosine.topk(3).indices.tolist())


@pytest.mark.parametrize("pairing", ["behind", "before"])
def test_against_the_attention_of_a_model(pairing: Any) -> None:
    """Both cuts from eager attention and states of the layers, with two examples and a query."""
    model, processor = tiny.load("qwen2_5_vl")
    model.eval().set_attn_implementation("eager")
    inputs: Any = tiny.example_inputs("qwen2_5_vl", processor, videos=0, images=3)
    text = model.model.language_model
    weights: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1][0].mean(0)[-1]))
        for layer in text.layers[:2]
    ]
    handles += [
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]), prepend=True)
        for layer in text.layers[1:3]
    ]
    with torch.no_grad(), tokensieve.compress(model, CATP(retention=0.4, pairing=pairing)) as run:
        model(**inputs)
    for handle in handles:
        handle.remove()
    items = run.history[-1].items
    counts = catp.stage_counts([item.layout.patches for item in items], 0.6)
    assert [item.keep.numel() for item in items] == counts.pictures
    # Where everything stands in front of the first cut.
    ids, owner, place, at = inputs["input_ids"][0].tolist(), [], [], -1
    placeholder = model.config.image_token_id
    seen = 0
    for index, token in enumerate(ids):
        if token != placeholder:
            owner.append(("text", at))
            continue
        if ids[index - 1] != placeholder:
            at, seen = at + 1, 0
        if seen in set(items[at].keep.tolist()):
            owner.append(("picture", at))
            place.append((at, seen))
        seen += 1
    belongs = [min(2, i + (pairing == "before")) if kind == "text" else i for kind, i in owner]
    picture = torch.tensor([kind == "picture" for kind, _ in owner])
    pair = torch.tensor(belongs)
    mean = states[0][pair == 2].mean(0)
    cosine = torch.nn.functional.cosine_similarity(states[0], mean[None])
    score = (weights[1] - weights[0]).clamp_min(0) + 0.6 * cosine
    examples = (picture & (pair < 2)).nonzero().flatten()
    kept = examples[score[examples].topk(counts.examples).indices]
    spots = picture.nonzero().flatten().tolist()
    found = [place[spots.index(i)] for i in sorted(kept.tolist())]
    (first, second) = run.methods[0].decoder_layers(run.facts)
    assert found == [(i, patch) for i in (0, 1) for patch in sorted(items[i].decoder[first].tolist())]
    # The shorter sequence behind the second cut.
    left = ~picture | (pair == 2)
    left[kept] = True
    picture, pair = picture[left], pair[left]
    context = states[1][(pair >= 0) & (pair < 2)].mean(0)
    mine = (picture & (pair == 2)).nonzero().flatten()
    cosine = torch.nn.functional.cosine_similarity(states[1][mine], context[None])
    order = sorted(cosine.topk(counts.query).indices.tolist())
    assert items[2].keep[order].tolist() == items[2].decoder[second].tolist()
    assert [items[i].decoder[second].numel() for i in (0, 1)] == [items[i].decoder[first].numel() for i in (0, 1)]


def test_another_cut_between_the_compared_layers() -> None:
    model, processor = tiny.load("qwen2_5_vl")
    inputs: Any = tiny.example_inputs("qwen2_5_vl", processor, videos=0, images=2)
    both = "catp:layer=2+fastv:layer=2"
    with (
        torch.no_grad(),
        pytest.raises(MethodError, match="attention of layers 1 and 2, but another method cuts in between"),
        tokensieve.compress(model.eval(), both),
    ):
        model(**inputs)
