"""Analytic FLOPs against published tables and against counted operations of real models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokensieve
from tokensieve.errors import HostError
from tokensieve.hosts import tiny
from tokensieve.measure import DecoderGeometry, Work, convention_flops, decoder_work, encoder_work, layer_tokens
from tokensieve.measure.vision import TowerGeometry, window_sizes

QWEN2_7B = DecoderGeometry(3584, 18944, 28, 28, 4, 128, 152064)


@pytest.mark.parametrize(
    ("retention", "outer", "with_inner"),
    [(1.0, 40.8, None), (0.25, 8.7, 7.1), (0.20, 7.0, 5.8), (0.15, 5.2, 4.3), (0.10, 3.4, 2.8)],
)
def test_convention_gives_the_figures_of_holitom(retention: float, outer: float, with_inner: float | None) -> None:
    """Prefill TFLOPs of LLaVA-OneVision-7B, 32 x 196 visual tokens, rounded up in every frame as the method does."""
    tokens = 32 * math.ceil(196 * retention)
    assert convention_flops(layer_tokens(28, tokens), 3584, 18944) / 1e12 == pytest.approx(outer, abs=0.05)
    if with_inner is not None:
        halved = layer_tokens(28, tokens, {18: round(tokens / 2)})
        assert convention_flops(halved, 3584, 18944) / 1e12 == pytest.approx(with_inner, abs=0.05)


IMAGE_TEXTS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
VIDEO_TEXTS = (28, 63, 21, 38, 196)


@pytest.mark.parametrize(
    ("hidden", "mlp", "layers", "visual", "share", "texts", "full", "pruned", "percent"),
    [
        (4096, 11008, 32, 576, 0.098, IMAGE_TEXTS, 3.228, 0.512, 15.63),
        (5120, 13824, 40, 576, 0.098, IMAGE_TEXTS, 6.281, 1.002, 15.71),
        (4096, 11008, 32, 1152, 0.1, VIDEO_TEXTS, 6.539, 0.937, 14.10),
    ],
    ids=["LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-Video-7B"],
)
def test_convention_gives_the_figures_of_divprune(
    hidden: int,
    mlp: int,
    layers: int,
    visual: int,
    share: float,
    texts: tuple[int, ...],
    full: float,
    pruned: float,
    percent: float,
) -> None:
    """Means over the data sets, with text tokens counted, as its script prints them."""

    def tera(visual_tokens: int, text: int) -> float:
        return convention_flops(layer_tokens(layers, visual_tokens + text), hidden, mlp) / 1e12

    before = [tera(visual, text) for text in texts]
    after = [tera(round(visual * share), text) for text in texts]
    assert sum(before) / len(texts) == pytest.approx(full, abs=0.005)
    assert sum(after) / len(texts) == pytest.approx(pruned, abs=0.005)
    ratios = [100 * b / a for a, b in zip(before, after, strict=True)]
    assert sum(ratios) / len(ratios) == pytest.approx(percent, abs=0.15)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_equal_the_operations_that_torch_counts(family: str, kind: str) -> None:
    """Encoder and decoder of every family, eager attention: not approximately, exactly."""
    if kind == "video" and not tiny.family_of(family).videos:
        kind = "image"
    model, processor = tiny.build_in_memory(family, attn_implementation="eager")
    inputs = tiny.example_inputs(family, processor, videos=int(kind == "video"), images=int(kind == "image"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), tokensieve.compress(model, "none") as run, counter:
        model(**inputs, logits_to_keep=1)
    modules, root = counter.get_flop_counts(), type(model).__name__
    llm, head = (sum(modules[f"{root}.{path}"].values()) for path in ("model.language_model", "lm_head"))
    trace = run.history[-1]
    geometry = DecoderGeometry.of(model.config)
    # One family computes the head for the whole prompt, whatever is asked for.
    logits = trace.before[0] if family == "video_llama_3" else 1
    tokens = layer_tokens(geometry.layers, trace.before[0])
    # Some releases build the rotary tables by a matrix product, which is no work of the layers.
    tables = sum(modules.get(f"{root}.model.language_model.rotary_emb", {}).values())
    assert decoder_work(geometry, tokens, logits=logits).operations == llm + head - tables
    encoder = sum((encoder_work(model.config, item.layout) for item in trace.items), Work())
    assert encoder.operations == counter.get_total_flops() - llm - head


def test_decoding_step_counts_the_cache_and_cuts() -> None:
    """One new token attends to what its layer holds; text and visual tokens weigh the same."""
    cached = layer_tokens(28, 6300, {2: 3164})
    step = decoder_work(QWEN2_7B, [1] * 28, cached)
    inner = QWEN2_7B.heads * QWEN2_7B.head_dim
    assert step.attention == 2 * inner * (2 * 6301 + 26 * 3165)
    assert step.other == 3584 * 152064
    assert step.operations == 2 * step.macs
    alone = decoder_work(QWEN2_7B, [1] * 28, [0] * 28)
    assert (alone.projections, alone.mlp) == (step.projections, step.mlp)


def test_grouped_heads_and_gate_change_the_exact_count_against_the_convention() -> None:
    """Qwen2-7B: 4 of 28 key heads and three matrices, so projections shrink and the feed-forward grows by half."""
    exact = decoder_work(QWEN2_7B, [1000] * 28, logits=0)
    convention = {
        "projections": 28 * 4 * 1000 * 3584**2,
        "attention": 28 * 2 * 1000**2 * 3584,
        "mlp": 28 * 2 * 1000 * 3584 * 18944,
    }
    assert exact.projections / convention["projections"] == pytest.approx((2 + 2 * 4 / 28) / 4)
    assert exact.attention == convention["attention"]
    assert exact.mlp == pytest.approx(1.5 * convention["mlp"])
    assert convention_flops([1000] * 28, 3584, 18944) == sum(convention.values())


def test_layer_tokens_apply_several_cuts() -> None:
    """A cut holds from its layer on, in any order of the mapping."""
    assert layer_tokens(6, 100, {4: 20, 2: 50}) == [100, 100, 50, 50, 20, 20]
    assert layer_tokens(3, 7) == [7, 7, 7]


def test_lists_of_a_wrong_length_are_refused() -> None:
    """A single number of tokens for all layers is an easy mistake."""
    with pytest.raises(ValueError, match="28, but got 1"):
        decoder_work(QWEN2_7B, [100])


def test_unknown_architectures_are_named() -> None:
    """No guess for mixtures of experts or unknown towers."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    with pytest.raises(HostError, match="'qwen3_moe' is a mixture of experts"):
        DecoderGeometry.of(SimpleNamespace(model_type="qwen3_moe", num_experts=8, **sizes))
    with pytest.raises(HostError, match="has no hidden_size"):
        DecoderGeometry.of(SimpleNamespace(model_type="empty"))
    with pytest.raises(HostError, match="tower of type 'swin'"):
        TowerGeometry.of(SimpleNamespace(model_type="swin"))


def test_windows_at_the_rim_are_smaller_and_cover_the_grid() -> None:
    """10 x 7 patches in windows of 4."""
    sizes = window_sizes(10, 7, 4)
    assert sorted(sizes) == sorted([16, 12, 16, 12, 8, 6])
    assert sum(sizes) == 70


def test_cache_bytes_of_a_token() -> None:
    """Keys and values of 4 heads of 128 channels in two bytes."""
    assert QWEN2_7B.cache_bytes(2) == 2048
