"""TransPrune: transitions, schedules, the part of the attention alone, composition, models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.registry import build
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods.transprune import NEXT_TEXT, TRANSITION, TransPrune
from tokensieve.ops.depth import layer_average
from tokensieve.ops.token_transition import token_transition, transition_score


def _facts(layers: int = 32, deepstack: int = 0) -> HostFacts:
    return HostFacts("family", layers, 24, 22, True, 1, deepstack)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_transition_follows_the_definition() -> None:
    """Ratio of norms times the softmax of one minus the cosine, over the whole sequence."""
    before, after = _random(12, 5), _random(12, 5, seed=1)
    powers, ratios = [], []
    for x, y in zip(before.tolist(), after.tolist(), strict=True):
        old, new = math.hypot(*x), math.hypot(*y)
        cosine = sum(a * b for a, b in zip(x, y, strict=True)) / old / new
        powers.append(math.exp(1 - cosine))
        ratios.append(new / old)
    expected = [ratio * power / sum(powers) for ratio, power in zip(ratios, powers, strict=True)]
    assert token_transition(before, after).tolist() == pytest.approx(expected, rel=1e-5)


def test_scaling_changes_the_magnitude_only() -> None:
    """Constants in front of input and output leave the direction part as it is."""
    before, after = _random(12, 5), _random(12, 5, seed=1)
    assert torch.allclose(token_transition(3 * before, 6 * after), 2 * token_transition(before, after), rtol=1e-5)
    assert torch.isfinite(token_transition(torch.zeros(3, 4), torch.zeros(3, 4))).all()


def test_published_settings() -> None:
    """Cuts in front of layers 7, 9, 12 of 32 with 41 % of the tokens per layer, or 31 % with the low setting."""
    high, low = TransPrune(), TransPrune(retention=0.0625)
    assert high.decoder_layers(_facts()) == (7, 9, 12)
    assert high.transition_layers(_facts()) == (6, 7, 8, 9, 10, 11)
    assert high.shares(_facts()) == (0.875, 0.625, 0.125)
    assert low.shares(_facts()) == (0.5, 0.25, 0.0625)
    assert layer_average((7, 9, 12), high.shares(_facts()), 32) == pytest.approx(0.41, abs=0.005)
    assert layer_average((7, 9, 12), low.shares(_facts()), 32) == pytest.approx(0.313, abs=0.001)
    assert TransPrune().decoder_layers(_facts(5, 2)) == (2, 3, 4)


@pytest.mark.parametrize("average", [0.3, 0.41, 0.7])
def test_average_is_reached(average: float) -> None:
    """With ``average`` the layer average is the retention."""
    method = TransPrune(retention=average, average=True)
    shares = method.shares(_facts(28))
    assert layer_average(method.decoder_layers(_facts(28)), shares, 28) == pytest.approx(average)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": "0.5/0.6"}, "must fall"),
        ({"ratios": "0.5", "average": True}, "contradict"),
        ({"accumulate": "3/2"}, "ascending"),
        ({"alpha": 2}, "alpha is 2"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    """Impossible settings are named."""
    with pytest.raises(MethodError, match=message):
        build("transprune", options)
    with pytest.raises(MethodError, match="3 cuts but 2 ratios"):
        TransPrune(layers="7/9/12", ratios="0.5/0.2").check_host(_facts())


def _sample(tokens: int, layer: int, memory: dict[str, Any], **signals: torch.Tensor) -> DecoderSample:
    zeros = torch.zeros(tokens, dtype=torch.long)
    attention = _random(4, tokens, seed=tokens).softmax(-1)
    return DecoderSample(
        torch.zeros(tokens, 2), layer, 40, zeros, zeros, {NEXT_TEXT: attention, **signals}, memory, facts=_facts()
    )


def test_without_transitions_the_attention_decides() -> None:
    """No layer has been added up in front of the first cut."""
    sample = _sample(40, 7, {})
    method = TransPrune(layers="7/9", ratios="0.5/0.25", accumulate="8")
    expected = sample.signal(NEXT_TEXT).mean(0).topk(20).indices.sort().values
    assert torch.equal(method.plan_decoder(sample).keep, expected)


def test_sums_are_carried_on() -> None:
    """The survivors bring their transitions to the next cut."""
    method, memory = TransPrune(layers="7/9", ratios="0.5/0.25", accumulate="6/8", alpha=1.0), {}
    early, late = torch.rand(40), torch.rand(20)
    keep = method.plan_decoder(_sample(40, 7, memory, **{f"{TRANSITION}@6": early})).keep
    assert torch.equal(keep, early.topk(20).indices.sort().values)
    again = method.plan_decoder(_sample(20, 9, memory, **{f"{TRANSITION}@8": late})).keep
    assert torch.equal(again, (early[keep] + late).topk(10).indices.sort().values)
    both = transition_score(early, torch.rand(3, 40))
    assert float(both.sum()) == pytest.approx(1.0, abs=1e-5)


def test_on_a_model() -> None:
    """Kernels agree, stages are nested, decoding and a later turn work, a foreign cut in between is refused."""
    model, processor = tiny.load("llava_onevision")
    model.eval()
    inputs = tiny.example_inputs("llava_onevision", processor)
    kept = []
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        cache = DynamicCache(config=model.config.get_text_config())
        options = {"past_key_values": cache, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        with torch.no_grad(), tokensieve.compress(model, "transprune") as run:
            first = model.generate(**inputs, **options)
            kept.append(run.history[-1].items[0].decoder)
            conversation = torch.cat((first, inputs["input_ids"]), dim=1)
            mask = torch.ones_like(conversation)
            pixels = inputs["pixel_values_videos"]
            model.generate(input_ids=conversation, attention_mask=mask, pixel_values_videos=pixels, **options)
            assert len(run.history) == 2
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in kept[0])
    assert torch.isin(kept[0][3], kept[0][2]).all()
    between = "transprune:layers=1/4,ratios=0.5/0.25+fastv:layer=2"
    with pytest.raises(MethodError, match="another method cuts in between"), tokensieve.compress(model, between):
        model(**inputs)
