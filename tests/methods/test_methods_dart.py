"""DART: pivots, quotas, adoption against a loop, duplicates, kernels, later turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.registry import build
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.methods.dart import DART, KEYS, NORMED, STATES, adopt, adoption_quotas, key_pivots, python_set_order


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sample(states: torch.Tensor, keys: torch.Tensor, visual: int) -> DecoderSample:
    zeros = torch.zeros(visual, dtype=torch.long)
    facts = HostFacts("family", 28, 24, 22, False)
    return DecoderSample(states[:visual], 2, visual, zeros, zeros, {KEYS: keys, NORMED: states}, facts=facts)


def test_adoption_follows_the_definition() -> None:
    """Each pivot in turn takes the least similar of what is left."""
    states, visual = _random(70, 8), 60
    pivots, quotas = [3, 17, 61, 66], [7, 7, 6, 6]
    left = [i for i in range(visual) if i not in pivots]
    for pivot, quota, group in zip(pivots, quotas, adopt(states, visual, pivots, quotas), strict=True):
        cosine = torch.nn.functional.cosine_similarity(states[pivot][None], states[left], dim=-1).tolist()
        ranked = sorted(range(len(left)), key=lambda i: cosine[i])[:quota]
        expected = sorted(left[i] for i in ranked)
        assert group.tolist() == expected
        left = [i for i in left if i not in expected]


def test_pivots() -> None:
    """Largest sums of magnitudes, by falling norm, text counted behind the picture."""
    keys = torch.zeros(9, 4)
    keys[2, 1], keys[5, 0], keys[7, 3], keys[8] = -5.0, 2.0, 1.0, 1.0
    image, text = key_pivots(keys, 6, 2, 4)
    assert image.tolist() == [2, 5]
    assert text.tolist() == [8, 7, 6]


def test_quotas() -> None:
    """The three rules of the released code and the exact one."""
    assert adoption_quotas(576, 0.222, 4, 8) == [15] * 8
    assert adoption_quotas(576, 0.222, 4, 8, tokens=128) == [16] * 8
    assert adoption_quotas(100, 0.222, 4, 8, tokens=500) == [12] * 8
    assert adoption_quotas(100, 0.25, 4, 8, exact=True) == [3, 3, 3, 3, 3, 2, 2, 2]
    assert adoption_quotas(100, 0.02, 4, 8, exact=True) == [0] * 8
    assert sorted(python_set_order([5, 1], [40, 33], 9)) == [1, 5, 33, 40]


@pytest.mark.parametrize("text_pivots", [0, 4])
@pytest.mark.parametrize("retention", [0.1, 0.222, 0.5, 0.95])
def test_counts(text_pivots: int, retention: float) -> None:
    """Pivots plus what they adopt; with ``exact_total`` the share itself."""
    states, keys, visual = _random(240, 16), _random(240, 8, seed=1), 200
    method = DART(retention=retention, text_pivots=text_pivots)
    keep = method.plan_decoder(_sample(states, keys, visual)).keep
    pivots = 4 + text_pivots
    assert keep.numel() == min(visual, 4 + int(visual * retention / pivots) * pivots)
    assert torch.equal(keep, keep.unique())
    exact = DART(retention=retention, text_pivots=text_pivots, exact_total=True)
    assert exact.plan_decoder(_sample(states, keys, visual)).keep.numel() == round(visual * retention)


def test_duplicates_of_pivots_go() -> None:
    """Tokens equal to a pivot of the picture are dropped while others are left."""
    states, keys, visual = _random(130, 16), _random(130, 8, seed=1), 120
    image, _ = key_pivots(keys, visual)
    copies = [i for i in range(0, visual, 4) if i not in image.tolist()]
    states[copies] = states[image[0]].clone()
    keep = DART(retention=0.3, text_pivots=0).plan_decoder(_sample(states, keys, visual)).keep
    assert not set(keep.tolist()) & set(copies)
    assert set(image.tolist()) <= set(keep.tolist())


def test_few_tokens_pass() -> None:
    """Below twice the number of pivots nothing is dropped; without text behind, the picture's pivots do all."""
    keep = DART(retention=0.1).plan_decoder(_sample(_random(19, 4), _random(19, 4), 15)).keep
    assert keep.numel() == 15
    alone = DART(retention=0.25).plan_decoder(_sample(_random(64, 4), _random(64, 4), 64)).keep
    assert alone.numel() == 4 + 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_pivots": 0}, "0 image and 4 text"), ({"tokens": 0}, "tokens is 0"), ({"budget": "vidcom2"}, "budget")],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    """Impossible settings are named."""
    with pytest.raises(MethodError, match=message):
        build("dart", options)


def test_on_a_model() -> None:
    """Kernels agree, only layers behind the cut hold less, and a later turn goes on."""
    model, processor = tiny.load("llava_onevision")
    model.eval()
    inputs = tiny.example_inputs("llava_onevision", processor)
    kept = []
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        cache = DynamicCache(config=model.config.get_text_config())
        options = {"past_key_values": cache, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        with torch.no_grad(), tokensieve.compress(model, "dart:retention=0.3") as run:
            first = model.generate(**inputs, **options)
            item = run.history[-1].items[0]
            kept.append(item.decoder[2])
            lengths = [layer.get_seq_length() for layer in cache.layers]
            dropped = item.keep.numel() - item.decoder[2].numel()
            assert lengths == [lengths[0]] * 2 + [lengths[0] - dropped] * (len(lengths) - 2)
            conversation = torch.cat((first, inputs["input_ids"]), dim=1)
            model.generate(
                input_ids=conversation,
                attention_mask=torch.ones_like(conversation),
                pixel_values_videos=inputs["pixel_values_videos"],
                **options,
            )
            assert run.history[-1].items[0].decoder[2].numel() == kept[-1].numel()
    assert torch.equal(*kept)


def test_in_front_of_the_llm() -> None:
    """``layer=0``: every layer runs on what input embeddings choose; DeepStack models refuse."""
    model, processor = tiny.load("llava_onevision")
    inputs = tiny.example_inputs("llava_onevision", processor)
    seen: list[torch.Tensor] = []
    text = model.eval().model.language_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    cache = DynamicCache(config=model.config.get_text_config())
    method = DART(retention=0.3, layer=0)
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    handle.remove()
    item = run.history[-1].items[0]
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert lengths == {out.shape[1] - 1 - item.keep.numel() + item.decoder[0].numel()}
    places = (inputs["input_ids"][0] == model.config.video_token_id).nonzero().flatten()
    start, behind = int(places[0]), int(places[-1]) + 1
    states = torch.cat((seen[0][start : start + item.keep.numel()], seen[0][behind:]))
    zeros = torch.zeros(item.keep.numel(), dtype=torch.long)
    sample = DecoderSample(states[: zeros.numel()], 0, zeros.numel(), zeros, zeros, {STATES: states})
    assert torch.equal(method.plan_decoder(sample).keep, item.decoder[0])
    deep, _ = tiny.build_in_memory("qwen3_vl")
    with pytest.raises(MethodError, match="cannot cut in front of layer 0: the first 2 layers"):
        tokensieve.attach(deep, method)


def test_renumbering_in_front_of_the_llm() -> None:
    """Positions counted anew from the first layer on, in the prompt and behind it."""
    model, processor = tiny.load("llava_onevision")
    text = model.eval().model.language_model
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    seen: list[torch.Tensor] = []
    handle = text.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    with torch.no_grad(), tokensieve.compress(model, DART(retention=0.3, layer=0, positions="renumber")):
        together = model.generate(**inputs, **options)[:, -4:]
        for row in range(2):
            seen.clear()
            alone = tiny.example_inputs("llava_onevision", processor, batch=2, row=row)
            assert torch.equal(model.generate(**alone, **options)[0, -4:], together[row])
            length = seen[0].shape[1]
            tables = torch.cat([table[:1] for table in seen], dim=1)
            assert torch.equal(tables, text.rotary_emb(tables, torch.arange(length + 3)[None])[0])
    handle.remove()
