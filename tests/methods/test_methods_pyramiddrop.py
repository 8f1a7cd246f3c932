"""PyramidDrop: schedules, options, nested stages, positions that count on, later turns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokensieve
from tokensieve.core.registry import build, parse
from tokensieve.core.sample import HostFacts
from tokensieve.errors import MethodError, RetentionError
from tokensieve.hosts import tiny
from tokensieve.methods.pyramiddrop import PyramidDrop, stage_count, stage_layers
from tokensieve.ops.depth import geometric_factor, layer_average, numbers, spread_layers


def _facts(layers: int = 32, axes: int = 1, deepstack: int = 0) -> HostFacts:
    return HostFacts("family", layers, 24, 22, True, axes, deepstack)


@pytest.fixture(scope="module")
def onevision() -> tuple[Any, Any]:
    model, processor = tiny.load("llava_onevision")
    return model.eval(), processor


def test_defaults_are_the_published_schedule() -> None:
    """Layers 8, 16, 24 of 32 with 0.5, 0.25, 0.125: 46.9 % per layer, and 288, 144, 72 of 576 tokens."""
    method, facts = PyramidDrop(), _facts()
    assert method.decoder_layers(facts) == (8, 16, 24)
    assert method.shares(facts) == (0.5, 0.25, 0.125)
    assert [stage_count(576, share) for share in method.shares(facts)] == [288, 144, 72]
    assert layer_average((8, 16, 24), method.shares(facts), 32) == pytest.approx(0.46875)
    assert PyramidDrop().decoder_layers(_facts(28)) == (7, 14, 21)
    assert PyramidDrop().decoder_layers(_facts(5, 3, 2)) == (2, 3, 4)


def test_count_multiplies_in_double() -> None:
    """In float32 the product would fall below the whole number."""
    assert stage_count(100, 0.7) == 70
    assert stage_count(3, 0.125) == 1


@pytest.mark.parametrize("retention", [0.15, 0.25, 0.4, 0.469, 0.7])
@pytest.mark.parametrize("layers", [28, 32, 40])
def test_average_is_reached(retention: float, layers: int) -> None:
    """With ``average`` the layer average is the retention, with earlier cuts where four equal stages cannot."""
    method, facts = PyramidDrop(retention=retention, average=True), _facts(layers)
    cuts, shares = method.decoder_layers(facts), method.shares(facts)
    assert layer_average(cuts, shares, layers) == pytest.approx(retention)
    assert list(shares) == sorted(shares, reverse=True)
    assert len(cuts) == 3


def test_average_out_of_reach() -> None:
    """The layers in front of the first cut alone are too many."""
    with pytest.raises(RetentionError, match="cannot be reached with 8 of 32"):
        PyramidDrop(retention=0.25, average=True, layers=[8, 16, 24]).check_host(_facts())
    with pytest.raises(RetentionError, match="earlier"):
        geometric_factor(0.1, (8,), 32)


def test_options_as_text() -> None:
    """The notation of the command line carries lists with slashes."""
    (method,) = parse("pyramiddrop:layers=7/14/21,ratios=0.6/0.36/0.216")
    assert isinstance(method, PyramidDrop)
    assert method.decoder_layers(_facts(28)) == (7, 14, 21)
    assert method.shares(_facts(28)) == (0.6, 0.36, 0.216)
    assert method.retention == 0.216
    (one,) = parse("pyramiddrop:layers=16,retention=0.3")
    assert isinstance(one, PyramidDrop)
    assert one.shares(_facts()) == (0.3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": "0.5/0.6"}, "must fall"),
        ({"ratios": [0.5, 0.0]}, "above 0"),
        ({"ratios": "a/b"}, "with slashes"),
        ({"ratios": 0.5, "average": True}, "contradict"),
        ({"layers": "8/8"}, "ascending"),
        ({"layers": [2.5]}, "whole"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    """Impossible schedules are named."""
    with pytest.raises(MethodError, match=message):
        build("pyramiddrop", options)


def test_refused_on_a_host() -> None:
    """Numbers of ratios and layers must match, and layers exist."""
    with pytest.raises(MethodError, match="3 cuts but 2 ratios"):
        PyramidDrop(layers="1/2/3", ratios="0.5/0.2").check_host(_facts())
    with pytest.raises(MethodError, match="layer 40"):
        PyramidDrop(layers=40).check_host(_facts())


def test_spread_layers() -> None:
    """Distinct, from the first allowed one, and fewer where the model is too shallow."""
    assert spread_layers([0.2, 0.4, 2.5], 5) == (1, 2, 3)
    assert spread_layers([1, 2, 3], 3, first=2) == (2,)
    assert spread_layers([7], 2) == (1,)
    assert numbers("8/0.5", "layers") == (8, 0.5)
    assert stage_layers(32, retention=0.25) == (3, 6, 9)


def test_nested_sets_and_contiguous_positions(onevision: tuple[Any, Any]) -> None:
    """Every stage keeps a part of the one before; positions of each stage and of decoding have no gaps."""
    model, processor = onevision
    inputs = tiny.example_inputs("llava_onevision", processor)
    seen: list[torch.Tensor] = []
    last = model.base_model.language_model.layers[-1]

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    cache = DynamicCache(config=model.config.get_text_config())
    with tokensieve.compress(model, "pyramiddrop") as run:
        handle = last.register_forward_pre_hook(spy, with_kwargs=True)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        handle.remove()
        stages = list(run.history[-1].items[0].decoder.values())
    assert [stage.numel() for stage in stages] == sorted((stage.numel() for stage in stages), reverse=True)
    assert all(torch.isin(late, early).all() for early, late in itertools.pairwise(stages))
    used = torch.cat([table[0] for table in seen])
    assert used.shape[0] == cache.layers[-1].get_seq_length()
    rotary = model.base_model.language_model.rotary_emb
    assert torch.equal(used, rotary(used[None], torch.arange(used.shape[0])[None])[0][0])


def test_another_video_on_the_cut_cache(onevision: tuple[Any, Any]) -> None:
    """In a later turn each stage goes on at its own next free position, and earlier keys take part in the ranking."""
    model, processor = onevision
    one = tiny.example_inputs("llava_onevision", processor, seed=1)
    two = tiny.example_inputs("llava_onevision", processor, seed=2)
    seen: list[torch.Tensor] = []
    last = model.base_model.language_model.layers[-1]

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0][0])

    cache = DynamicCache(config=model.config.get_text_config())
    options = {"past_key_values": cache, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), tokensieve.compress(model, "pyramiddrop:retention=0.3"):
        first = model.generate(**one, **options)
        before = cache.layers[-1].get_seq_length()
        handle = last.register_forward_pre_hook(spy, with_kwargs=True)
        conversation = torch.cat((first, two["input_ids"]), dim=1)
        model.generate(
            input_ids=conversation,
            attention_mask=torch.ones_like(conversation),
            pixel_values_videos=two["pixel_values_videos"],
            **options,
        )
        handle.remove()
    used = torch.cat(seen)
    after = cache.layers[-1].get_seq_length()
    assert used.shape[0] == after - before
    rotary = model.base_model.language_model.rotary_emb
    expected = rotary(used[None], torch.arange(before, after)[None])[0][0]
    assert torch.allclose(used, expected, atol=1e-5)


def test_kernels_agree(onevision: tuple[Any, Any]) -> None:
    """Eager and sdpa attention keep the same sets."""
    model, processor = onevision
    inputs = tiny.example_inputs("llava_onevision", processor, batch=2)
    kept = []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        with torch.no_grad(), tokensieve.compress(model, "pyramiddrop:retention=0.2") as run:
            model(**inputs)
        kept.append([item.decoder for item in run.history[-1].items])
    model.set_attn_implementation("sdpa")
    for left, right in zip(*kept, strict=True):
        assert all(torch.equal(left[layer], right[layer]) for layer in left)
