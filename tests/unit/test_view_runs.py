"""Views of real runs: every family, and methods that merge, cut inside the LLM, or drop frames."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from view_items import Page

import tokensieve
from tokensieve.errors import MethodError
from tokensieve.hosts import tiny
from tokensieve.prompt import build_prompt
from tokensieve.video import Clip, ClipInfo
from tokensieve.view import CellState, ViewData, render_html, states, write_png
from tokensieve.view.regions import crop

FRAMES = 5


@cache
def loaded(family: str) -> tuple[Any, Any]:
    return tiny.load(family)


def clip_of(frames: int = FRAMES, size: tuple[int, int] = (112, 168), image: bool = False) -> Clip:
    pictures = tiny.synthetic_clip(frames, size=size)
    info = ClipInfo("clip", size[1], size[0], average_fps=2.0, duration=frames / 2, is_image=image)
    return Clip(pictures, np.arange(frames) / 2, np.arange(frames), info, frames / 2)


def view_of(family: str, method: str, clip: Clip, whole_frames: bool = True, **options: Any) -> ViewData:
    model, processor = loaded(family)
    prompt = build_prompt(processor, clip, "What moves?", whole_frames=whole_frames)
    with tokensieve.compress(model, method, **options) as run, torch.no_grad():
        model(**prompt.on(model))
    times = None if clip.info.is_image else clip.timestamps
    return ViewData.of_run(run, clip.frames, times, processor=processor, label="clip", question="What moves?")


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_shows_its_video(family: str) -> None:
    view = view_of(family, "vidcom2", clip_of())
    (state,) = states(view.item)
    firsts = [region.first for region in view.shown]
    pairs, twice = [0, 2, 4], [frame for frame in range(FRAMES) for _ in range(2)]
    expected = pairs if family.startswith("qwen") else twice if family == "llava_next" else list(range(FRAMES))
    assert firsts == expected and view.shown[-1].last == FRAMES - 1
    assert sum(state.kept) == view.item.keep.numel() == view.report["patches"]["entered"]
    page = Page(render_html(view))
    assert not page.errors and len(page.named("figure")) == len(view.item.layout.views)
    assert "Requested and achieved" in page.words and "VidCom2 (EMNLP 2025)" in page.words
    # LLaVA-1.5 and LLaVA-NeXT see single pictures, which have no uniqueness among each other.
    assert ("Uniqueness of every" in page.words) == (family not in ("llava", "llava_next"))


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_shows_an_image(family: str) -> None:
    clip = clip_of(1, (90, 200), image=True)
    view = view_of(family, "divprune", clip, retention=0.3)
    (state,) = states(view.item)
    assert sum(state.kept) == view.item.keep.numel()
    names = [region.name for region in view.shown]
    expected = {
        "llava_next": ["base picture", "mosaic"],
        "llava_onevision": ["base picture", "mosaic"],
        "llava_next_video": ["base picture", "mosaic"],
        "llava_video": ["base picture", "mosaic"],
        "internvl": ["tile 1 of 2", "tile 2 of 2", "thumbnail"],
    }
    assert names == expected.get(family, [""])
    assert not Page(render_html(view)).errors


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision", "llava_video", "internvl"])
@pytest.mark.parametrize("size", [(112, 168), (200, 90)])
def test_views_show_what_the_model_saw(family: str, size: tuple[int, int]) -> None:
    _, processor = loaded(family)
    clip = clip_of(2, size)
    view = view_of(family, "random", clip)
    inputs = build_prompt(processor, clip, "What moves?").inputs
    pixels = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"]
    seen = pixels.reshape(-1, *pixels.shape[-3:])[1].float()
    pictures = processor.video_processor
    mean, deviation = (torch.tensor(part)[:, None, None] for part in (pictures.image_mean, pictures.image_std))
    seen = (255 * (seen * deviation + mean)).permute(1, 2, 0).numpy()
    box = view.shown[1].box
    # Trim the model's input where the tower's whole patches end.
    side = seen.shape[0]
    model, _ = loaded(family)
    patch = np.max(model.config.vision_config.patch_size)
    rows = view.item.layout.views[0][0]
    covered = min(rows * round(side // patch / rows), side // patch) * patch
    seen = seen[:covered, :covered]

    def distance(picture: np.ndarray) -> float:
        shrunk = Image.fromarray(picture).resize((covered, covered), Image.Resampling.BICUBIC)
        return float(np.abs(np.asarray(shrunk, float) - seen).mean())

    shown = distance(crop(clip.frames, view.shown[1]))
    assert shown < 6
    if box.bottom - box.top < 0.9 or box.right - box.left < 0.9:
        assert distance(clip.frames[1]) > 2 * shown


def test_merged_patches_are_shown_with_their_groups() -> None:
    view = view_of("llava_onevision", "mean-pool", clip_of())
    (state,) = states(view.item)
    assert state.count(CellState.MERGED) > 0 and state.count(CellState.DROPPED) == 0
    assert state.views[0].group.min() >= 0
    words = Page(render_html(view)).words
    assert "merged into a kept patch" in words and "merged into others" not in words


def test_cuts_inside_the_model_are_states(tmp_path: Path) -> None:
    view = view_of("qwen2_5_vl", "vidcom2+fastv", clip_of())
    found = states(view.item)
    assert [state.layer for state in found] == [0, 2]
    assert found[1].count(CellState.LEFT) == sum(found[0].kept) - sum(found[1].kept) > 0
    words = Page(render_html(view)).words
    assert "From layer 2" in words and "entered the LLM and left at a cut" in words
    assert view.method == "VidCom2 + FastV" and view.settings["fastv.retention"] == 0.5
    write_png(view, tmp_path / "cut.png")


def test_a_method_that_only_cuts_inside_lets_everything_enter() -> None:
    view = view_of("llava_onevision", "fastv", clip_of(), retention=0.25)
    entered, cut = states(view.item)
    total = view.item.layout.patches
    words = Page(render_html(view)).words
    assert sum(entered.kept) == total and abs(sum(cut.kept) - total / 4) <= 1
    assert f"{total} \N{RIGHTWARDS ARROW} {sum(cut.kept)} visual tokens from layer 2 on" in words
    assert "All of them enter the LLM." in words


def test_dropped_frames_have_no_token() -> None:
    view = view_of("llava_onevision", "frame-subsample+vidcom2", clip_of(8), retention=0.5)
    (state,) = states(view.item)
    assert 0 in state.kept and sum(state.kept) > 0
    assert not Page(render_html(view)).errors


def test_tokens_left_out_by_the_processor_are_named() -> None:
    clip = clip_of()
    clip.frames = np.repeat(clip.frames[:1], FRAMES, 0)
    view = view_of("video_llama_3", "random", clip, whole_frames=False)
    (state,) = states(view.item)
    assert state.count(CellState.ABSENT) > 0
    assert "left out by the model's own processor" in Page(render_html(view)).words


def test_frames_as_single_images_are_joined() -> None:
    view = view_of("llava", "random", clip_of())
    assert [region.first for region in view.shown] == list(range(FRAMES)) and view.unit == "frame"
    assert view.titles()[2] == "0:01.0"
    both = view_of("llava_next", "random", clip_of())
    assert len(both.shown) == 2 * FRAMES and both.titles()[3] == "0:00.5, mosaic"


def test_a_run_that_saw_nothing_is_named() -> None:
    model, _ = loaded("llava_onevision")
    with tokensieve.compress(model, "random") as run, pytest.raises(MethodError, match="generate first"):
        ViewData.of_run(run, clip_of().frames)
    view = clip_of()
    prompt = build_prompt(loaded("llava_onevision")[1], view, "What moves?")
    with tokensieve.compress(model, "random") as run, torch.no_grad():
        model(**prompt.on(model))
    with pytest.raises(MethodError, match="item 3 of row 0"):
        ViewData.of_run(run, view.frames, index=3)
