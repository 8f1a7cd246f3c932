"""Recomputed attention statistics against the attention that the models themselves compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokensieve
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.sample import DecoderSample, TokenSample
from tokensieve.hosts import tiny

FAMILIES = list(tiny.FAMILIES)
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3"]


@dataclass
class Spy(Method):
    """Keeps everything and remembers the signals it was given."""

    retention: float = 0.99
    layer: int = 1

    name: ClassVar[str] = "spy"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens: list[Tensor] = []
        self.rows: list[Tensor] = []

    def signals(self, facts: Any) -> tuple[str, ...]:
        return (f"encoder.received_attention@{self.layer}",)

    def decoder_layers(self, facts: Any) -> tuple[int, ...]:
        return (facts.decoder_layers - 1,)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        self.tokens.append(sample.signal(f"encoder.received_attention@{self.layer}"))
        return Plan(torch.arange(sample.layout.patches))

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        self.rows.append(sample.attention)
        return Plan(torch.arange(sample.hidden.shape[0]), positions="original")


@pytest.fixture
def probed() -> Iterator[list[Tensor]]:
    """An attention kernel named ``probe`` that records the weights of every call."""
    weights: list[Tensor] = []

    def probe(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling
        attention = scores.softmax(-1)
        weights.append(attention)
        return (attention @ v).transpose(1, 2).contiguous(), attention

    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    yield weights
    type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop("probe")


def _load(tiny_host: Any, family: str) -> tuple[Any, Any]:
    if family != "video_llama_3":
        return tiny_host(family)
    # A processor of its own: the shared one must go on leaving tokens out.
    model, processor = tiny.load(family)
    processor.video_processor.use_token_compression = False
    return model.eval(), processor


def _towers(model: Any) -> list[Any]:
    """Configurations that choose the attention kernel of the vision tower."""
    base = model.base_model
    tower = next(getattr(base, name) for name in ("visual", "vision_tower", "vision_model") if hasattr(base, name))
    return list({id(module.config): module.config for module in tower.modules() if hasattr(module, "config")}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_that_of_the_tower(tiny_host: Any, probed: list[Tensor], family: str) -> None:
    """Column means of the recorded attention, brought to the tokens by the model's own arithmetic."""
    model, processor = _load(tiny_host, family)
    inputs = tiny.example_inputs(family, processor)
    configs = _towers(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "probe"
    try:
        spy = Spy()
        with torch.no_grad(), tokensieve.compress(model, spy) as run:
            model(**inputs)
    finally:
        for config, kernel in zip(configs, before, strict=True):
            config._attn_implementation = kernel
    expected = _expected(model, inputs, probed, spy.layer, run.facts, family)
    assert torch.allclose(spy.tokens[0].float(), expected, atol=1e-6)


def _expected(model: Any, inputs: Any, weights: list[Tensor], layer: int, facts: Any, family: str) -> Tensor:
    base = model.base_model
    if family not in PACKED:
        received = weights[layer].mean((1, 2))[:, 1 if facts.has_class_token else 0 :]
        if family == "llava_onevision":
            return base.apply_pooling(received[..., None])[..., 0].flatten()
        if family == "internvl":
            side = int(received.shape[1] ** 0.5)
            grid = received.view(-1, side // 2, 2, side // 2, 2)
            return grid.mean((2, 4)).flatten()
        if family in ("llava_next_video", "llava_video"):
            side = int(received.shape[1] ** 0.5)
            return torch.nn.functional.avg_pool2d(received.view(-1, side, side), 2).flatten()
        if family == "llava_next":
            return _packed_tiles(base, received, inputs["image_sizes"])
        return received.flatten()
    per_layer = len(weights) // facts.tower_layers if family != "qwen2_5_vl" else None
    sums = _block_sums(weights, layer, per_layer, facts.tower_layers)
    grid = inputs["video_grid_thw"][0].tolist()
    groups = sums.view(-1, 4)
    if family == "qwen2_5_vl":
        tower = base.visual
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

        order, _ = modeling.get_vision_window_index(
            inputs["video_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
            kwargs={},
        )
        groups = groups[torch.argsort(torch.as_tensor(order))]
    return groups.mean(1) / (grid[1] * grid[2])


def _block_sums(weights: list[Tensor], layer: int, per_layer: int | None, layers: int) -> Tensor:
    """Column sums of one layer's attention blocks in the tower's own order."""
    if per_layer is not None:
        blocks = weights[layer * per_layer : (layer + 1) * per_layer]
        return torch.cat([block.mean(1).sum(1)[0] for block in blocks])
    total = sum(block.shape[-1] for block in weights) // layers
    start = 0
    for index in range(layers):
        blocks, seen = [], 0
        while seen < total:
            blocks.append(weights[start])
            seen += weights[start].shape[-1]
            start += 1
        if index == layer:
            return torch.cat([block.mean(1).sum(1)[0] for block in blocks])
    raise AssertionError("fewer layers than recorded")


def _packed_tiles(base: Any, received: Tensor, sizes: Tensor) -> Tensor:
    """Attention as a feature channel through the model's packing, with the newlines taken out by a mark."""
    marked = torch.stack((received, torch.zeros_like(received)), -1)
    packed, _ = base.pack_image_features(
        [marked], sizes[:1], vision_feature_select_strategy="default", image_newline=torch.tensor([0.0, 1.0])
    )
    return packed[0][packed[0][:, 1] < 0.5, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_last_row_is_that_of_the_decoder(tiny_host: Any, family: str) -> None:
    """The recomputed row equals the eager attention of the layer before the cut."""
    model, processor = _load(tiny_host, family)
    inputs = tiny.example_inputs(family, processor)
    spy = Spy()
    with torch.no_grad(), tokensieve.compress(model, spy) as run:
        model(**inputs)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    row = attentions[run.facts.decoder_layers - 2].mean(1)[0, -1]
    ids = inputs["input_ids"][0]
    tokens = [getattr(model.config, f"{name}_token_id", None) for name in ("image", "video")]
    visual = torch.isin(ids, torch.tensor([token for token in tokens if token is not None])).nonzero().flatten()
    layout = run.history[-1].items[0].layout
    assert torch.allclose(spy.rows[0], row[visual[layout.patch_tokens]], atol=1e-6)
