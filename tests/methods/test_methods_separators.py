"""Newlines of LLaVA-Video's grid behind frames, segments and nothing: the exact sequence that the LLM reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.core.trace import ItemTrace
from tokensieve.hosts import tiny
from tokensieve.methods.todre import ToDRE


def _read(model: Any, inputs: Any, method: str) -> tuple[ItemTrace, torch.Tensor, torch.Tensor]:
    """Trace of the video, and which of the tokens in the place of the video are newlines and which words."""
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tokensieve.compress(model, method) as run:
        handle = model.base_model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    ids = inputs["input_ids"][0]
    visual = ids == model.config.video_token_id
    before, behind = int(visual.long().argmax()), int(visual.flip(0).long().argmax())
    part = seen[0][before : seen[0].shape[0] - behind]
    return run.history[-1].items[0], (part == model.base_model.image_newline).all(1), part


def _runs(newline: torch.Tensor) -> list[int]:
    """Number of tokens in front of every newline, since the one before."""
    ends = newline.nonzero().flatten().tolist()
    return [end - start - 1 for start, end in zip([-1, *ends[:-1]], ends, strict=True)]


def test_flashvid_one_newline_behind_every_frame(tiny_host: Any) -> None:
    model, processor = tiny_host("llava_video")
    inputs = tiny.example_inputs("llava_video", processor, frames=6)
    item, newline, part = _read(model, inputs, "flashvid:retention=0.2,inner=false")
    frames = item.layout.patch_view[item.keep]
    assert _runs(newline) == torch.bincount(frames, minlength=6).tolist()
    assert bool(newline[-1]) and item.separators == 6
    assert part.shape[0] == item.keep.numel() + 6


@pytest.mark.parametrize("method", ["prunevid-merge:retention=0.3"])
def test_prunevid_one_newline_behind_every_segment(tiny_host: Any, method: str) -> None:
    model, processor = tiny_host("llava_video")
    inputs = tiny.example_inputs("llava_video", processor, frames=8)
    item, newline, part = _read(model, inputs, method)
    segments = item.info["segments"].tolist()
    assert len(segments) > 1
    views = item.layout.patch_view[item.keep]
    expected = [int(((views >= first) & (views <= last)).sum()) for first, last in segments]
    assert _runs(newline) == expected
    assert bool(newline[-1]) and part.shape[0] == item.keep.numel() + len(segments)


@pytest.mark.parametrize("family", ["llava_video", "llava_onevision", "llava_next"])
def test_todre_no_newline_at_all(tiny_host: Any, family: str) -> None:
    model, processor = tiny_host(family)
    inputs = tiny.example_inputs(family, processor)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tokensieve.compress(model, ToDRE(retention=0.3)) as run:
        handle = model.base_model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    assert not bool((seen[0] == model.base_model.image_newline).all(1).any())
    item = run.history[-1].items[0]
    text = run.history[-1].before[0] - item.layout.tokens
    assert seen[0].shape[0] == text + item.keep.numel()


@pytest.mark.parametrize("method", ["flashvid:retention=0.3", "prunevid-merge:retention=0.3", "unicomp:retention=0.4"])
def test_frames_dropped_before_the_encoder_take_their_newlines_along(tiny_host: Any, method: str) -> None:
    model, processor = tiny_host("llava_video")
    inputs = tiny.example_inputs("llava_video", processor, frames=8)
    item, newline, _ = _read(model, inputs, f"frame-subsample:retention=0.5+{method}")
    frames = set(item.layout.patch_view[item.keep].tolist())
    assert len(frames) <= 4
    count = int(newline.sum())
    assert count == item.separators
    assert count == 4 if method.startswith("flashvid") else count <= 4
