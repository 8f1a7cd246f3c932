"""Dropping patches inside a tower that takes all pictures as one sequence, against the same steps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.utils import logging

import tokensieve
from tokensieve.core.tower import Block, TowerProgram, TowerSample
from tokensieve.errors import MethodError, SignalError
from tokensieve.hosts import tiny
from tokensieve.methods.flowcut import FlowCut


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    """The tiny Qwen2-VL and its processor."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, processor = tiny.load("qwen2_vl")
    return model.eval(), processor


def _by_hand(tower: Any, pixels: torch.Tensor, grid: torch.Tensor, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged tokens of one picture and the patches that are left, as the specification's section C says."""
    recorded: list[dict[str, Any]] = []
    spy = tower.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: recorded.append({**kwargs, "x": args[0] if args else kwargs["hidden_states"]}),
        with_kwargs=True,
    )
    tower(pixels, grid_thw=grid)
    spy.remove()
    hidden, (cos, sin) = recorded[0]["x"], recorded[0]["position_embeddings"]
    left, score, layers = torch.arange(hidden.shape[0]), None, len(tower.blocks)
    for index, block in enumerate(tower.blocks):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, heads, -1)).unbind(1)

        def rotate(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            half = x.shape[-1] // 2
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
            return x * cos[:, None] + turned * sin[:, None]

        mean = rotate(q).mean(0)
        shares = torch.stack([(rotate(k)[:, h] @ mean[h] * k.shape[-1] ** -0.5).softmax(0) for h in range(heads)])
        attention = shares.mean(0)
        bounds = torch.tensor([0, hidden.shape[0]], dtype=torch.int32)
        hidden = block(hidden, cu_seqlens=bounds, max_seqlen=hidden.shape[0], position_embeddings=(cos, sin))
        count = hidden.shape[0]
        if count <= target:
            continue
        fresh = attention * v.mean(1).abs().sum(-1)
        score = fresh if score is None else 0.5 * score + 0.5 * fresh
        remaining = layers - 1 - index
        if remaining % 2:
            continue
        entropy = -(attention * (attention + 1e-7).log()).sum() / torch.tensor(float(count)).log()
        drop = count - target if remaining == 0 else round((count - target) / remaining**0.5 * float(1 - entropy**2))
        keep = score.topk(max(count - drop, target)).indices.sort().values
        hidden, left, score, cos, sin = hidden[keep], left[keep], score[keep], cos[keep], sin[keep]
    return tower.merger(hidden), left


def test_a_picture_equals_the_steps_by_hand(host: tuple[Any, Any]) -> None:
    """Tokens of four survivors each stand at the place of the first; the LLM then keeps the better half."""
    model, processor = host
    inputs = tiny.example_inputs("qwen2_vl", processor, videos=0, images=1)
    tower = model.base_model.visual
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    tokens = pixels.shape[0] // 4
    wanted = round(tokens * 0.2)
    with torch.no_grad():
        expected, left = _by_hand(tower, pixels, grid, 8 * wanted)
        with tokensieve.compress(model, "flowcut:retention=0.2") as run:
            features = model.base_model.get_image_features(pixels, grid).pooler_output
            model(**inputs)
    item = run.history[0].items[0]
    assert item.keep.tolist() == (left[::4] // 4).tolist()
    assert item.decoder[2].numel() == wanted
    found = torch.cat(list(features))
    torch.testing.assert_close(found[item.keep], expected, rtol=1e-4, atol=1e-5)
    others = torch.ones(tokens, dtype=torch.bool)
    others[item.keep] = False
    assert bool((found[others] == 0).all())
    assert item.info["tower_tokens"][:, 0].tolist()[0] == pixels.shape[0]
    assert run.report.encoder is not None and run.report.encoder.after < run.report.encoder.before


def test_steps_of_a_video_keep_equally_many(host: tuple[Any, Any]) -> None:
    model, processor = host
    inputs = tiny.example_inputs("qwen2_vl", processor, batch=2)
    with torch.no_grad(), tokensieve.compress(model, "flowcut:retention=0.2") as run:
        model(**inputs)
    for item in run.history[0].items:
        per_step = 2 * round(item.layout.patches * 0.2) // len(item.layout.views)
        assert item.per_frame().tolist() == [per_step] * len(item.layout.views)
        assert sum(value.numel() for value in item.decoder.values()) == round(item.layout.patches * 0.2)
    alone = "flowcut:retention=0.25,decoder_layer=null"
    with torch.no_grad(), tokensieve.compress(model, alone) as run:
        model(**inputs)
    assert all(item.keep.numel() == round(item.layout.patches * 0.25) for item in run.history[0].items)


def test_nothing_to_drop_changes_nothing(host: tuple[Any, Any]) -> None:
    """Where twice the share is everything the tower runs as it is, bit by bit."""
    model, processor = host
    inputs = tiny.example_inputs("qwen2_vl", processor, videos=0, images=1)
    with torch.no_grad():
        plain = model.base_model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        with tokensieve.compress(model, "flowcut:retention=0.6"):
            whole = model.base_model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert torch.equal(torch.cat(list(plain)), torch.cat(list(whole)))


def test_frames_left_out_are_not_encoded(host: tuple[Any, Any]) -> None:
    model, processor = host
    inputs = tiny.example_inputs("qwen2_vl", processor, batch=2)
    with torch.no_grad(), tokensieve.compress(model, "frame-subsample:retention=0.5+flowcut:retention=0.2") as run:
        model(**inputs)
    item = run.history[0].items[0]
    steps = len(item.layout.views)
    assert int((item.per_frame() > 0).sum()) == round(steps * 0.5) and item.keep.numel() > 0


def test_what_does_not_divide_is_said(host: tuple[Any, Any]) -> None:
    model, processor = host

    class Odd(FlowCut):
        def tower_program(self, sample: TowerSample) -> TowerProgram:
            class Drop(TowerProgram):
                def drop(self, block: Block) -> torch.Tensor | None:
                    count = block.patches
                    return torch.arange(count - 1).expand(block.k.shape[0], -1) if block.layer == 3 else None

            return Drop()

    inputs = tiny.example_inputs("qwen2_vl", processor, videos=0, images=1)
    with torch.no_grad(), tokensieve.compress(model, Odd(0.5)), pytest.raises(MethodError, match="do not divide"):
        model(**inputs)
    assert "forward" not in vars(model.base_model.visual)


def test_other_packed_towers_are_refused() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl", "video_llama_3"):
        model, _ = tiny.build_in_memory(family)
        with pytest.raises(SignalError, match="has no class token"):
            tokensieve.compress(model, "flowcut")
