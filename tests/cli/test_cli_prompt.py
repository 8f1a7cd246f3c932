"""Prompts from clips: times, images, batches, for every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from cli_media import write_video

from tokensieve.errors import HostError
from tokensieve.hosts import tiny
from tokensieve.load import load_model
from tokensieve.prompt import build_prompt
from tokensieve.video import Clip, read_clip

VARIABLE_RATE = "handheld_rotated180_vfr.mp4"


@pytest.fixture(scope="session")
def processors() -> Any:
    """``processors(family)``: the processor of a tiny checkpoint, loaded once."""
    found: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in found:
            found[family] = tiny.load(family)[1]
        return found[family]

    return get


@pytest.fixture(scope="session")
def clip(video: Path) -> Clip:
    return read_clip(video, frames=5)


def true_times(path: Path) -> np.ndarray:
    """Presentation times of all frames in seconds after the first, from a plain decoding loop."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = sorted(float(frame.pts * stream.time_base) for frame in container.decode(stream))
    return np.array(times) - times[0]


@pytest.mark.parametrize("frames", [2, 5, 6, 1])
def test_qwen3_prompt_states_the_true_times(processors: Any, real_videos: Path, frames: int) -> None:
    path = real_videos / VARIABLE_RATE
    clip = read_clip(path, frames=frames)
    times = true_times(path)[clip.indices]
    # A temporal step covers two frames and is stamped with the mean of their times; an odd last one is doubled.
    times = np.append(times, times[-1:]) if len(times) % 2 else times
    expected = times.reshape(-1, 2).mean(1)
    processor = processors("qwen3_vl")
    prompt = build_prompt(processor, clip, "What happens?")
    text = processor.tokenizer.decode(prompt.inputs["input_ids"][0])
    stated = [float(number) for number in re.findall(r"<([0-9.]+) seconds>", text)]
    assert len(stated) == len(expected)
    # One decimal is printed.
    np.testing.assert_allclose(stated, expected, atol=0.0501)


def test_times_with_very_uneven_intervals(processors: Any, tmp_path: Path) -> None:
    """The real clip's intervals differ by a quarter only; these would be far off under any constant rate."""
    milliseconds = [0, 100, 200, 2000, 2100, 5000, 5100, 9000]
    path = write_video(tmp_path / "uneven.mp4", len(milliseconds), milliseconds=milliseconds)
    clip = read_clip(path, frames=8)
    for family, pattern, expected in (
        ("qwen3_vl", r"<([0-9.]+) seconds>", [0.05, 1.1, 3.55, 7.05]),
        ("video_llama_3", r"Time ([0-9.]+)s:", [time / 1000 for time in milliseconds]),
    ):
        processor = processors(family)
        text = processor.tokenizer.decode(build_prompt(processor, clip, "What?").inputs["input_ids"][0])
        stated = [float(number) for number in re.findall(pattern, text)]
        np.testing.assert_allclose(stated, expected, atol=0.0501)


def test_video_llama_3_prompt_states_the_true_times(processors: Any, real_videos: Path) -> None:
    clip = read_clip(real_videos / VARIABLE_RATE, frames=5)
    processor = processors("video_llama_3")
    text = processor.tokenizer.decode(build_prompt(processor, clip, "What?").inputs["input_ids"][0])
    stated = [float(number) for number in re.findall(r"Time ([0-9.]+)s:", text)]
    np.testing.assert_allclose(stated, true_times(real_videos / VARIABLE_RATE)[clip.indices], atol=0.0501)


@pytest.mark.parametrize("name", [VARIABLE_RATE, "cartoon_pigs.gif", "dog_fetch.mp4"])
def test_qwen2_5_seconds_per_step(processors: Any, real_videos: Path, name: str) -> None:
    path = real_videos / name
    times = true_times(path)
    duration = times[-1] + float(np.median(np.diff(times)))
    prompt = build_prompt(processors("qwen2_5_vl"), read_clip(path, frames=8), "What happens?")
    # Eight frames stand for the whole clip, two for each step.
    assert float(prompt.inputs["second_per_grid_ts"][0]) == pytest.approx(2 * duration / 8, rel=0.01)


def test_qwen2_5_seconds_per_step_of_a_part(processors: Any, video: Path) -> None:
    part = read_clip(video, frames=4, start=1.0, end=3.0)
    prompt = build_prompt(processors("qwen2_5_vl"), part, "What happens?")
    assert float(prompt.inputs["second_per_grid_ts"][0]) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_batch_of_questions_on_one_clip(processors: Any, clip: Clip, family: str) -> None:
    processor = processors(family)
    questions = ["What moves?", "Where does the round shape go, left or right?"]
    both = build_prompt(processor, clip, questions)
    assert both.inputs["input_ids"].shape[0] == 2 and both.tokens == both.inputs["input_ids"].shape[1]
    for row, question in enumerate(questions):
        alone = build_prompt(processor, clip, question).inputs["input_ids"][0]
        real = both.inputs["attention_mask"][row].bool()
        assert torch.equal(both.inputs["input_ids"][row][real], alone)
        assert question in processor.tokenizer.decode(alone)
    # Shorter rows are padded in front, where generation wants it.
    assert both.inputs["attention_mask"][0, 0] == 0 and both.inputs["attention_mask"][0, -1] == 1
    assert both.as_video == tiny.FAMILIES[family].videos


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_families_without_video_see_images(processors: Any, clip: Clip, family: str) -> None:
    prompt = build_prompt(processors(family), clip, "What moves?")
    assert prompt.inputs["pixel_values"].shape[0] == 5 and not prompt.as_video
    assert prompt.notes == ["This model takes no video; the 5 frames go in as single images."]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_one_frame_and_a_still_image(processors: Any, video: Path, tmp_path: Path, family: str) -> None:
    from PIL import Image

    processor = processors(family)
    one = build_prompt(processor, read_clip(video, frames=1), "What is it?")
    Image.new("RGB", (96, 64), (10, 200, 30)).save(tmp_path / "green.png")
    still = build_prompt(processor, read_clip(tmp_path / "green.png"), "What is it?")
    assert one.as_video == tiny.FAMILIES[family].videos
    assert not still.as_video and still.notes == []
    assert "pixel_values" in still.inputs


def test_two_clips_and_an_image(processors: Any, clip: Clip, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 64), (10, 200, 30)).save(tmp_path / "green.png")
    shown = [clip, read_clip(tmp_path / "green.png"), clip]
    prompt = build_prompt(processors("qwen2_vl"), shown, "Which differs?")
    assert prompt.inputs["video_grid_thw"].shape[0] == 2 and prompt.inputs["image_grid_thw"].shape[0] == 1


def test_whole_frames(processors: Any, video: Path) -> None:
    processor, still = processors("video_llama_3"), read_clip(video, frames=4)
    still.frames = np.repeat(still.frames[:1], 4, axis=0)
    fewer = build_prompt(processor, still, "What?")
    whole = build_prompt(processor, still, "What?", whole_frames=True)
    assert not fewer.inputs["video_compression_mask"].all() and whole.tokens > fewer.tokens


def test_only_pixels_take_the_dtype_of_the_model(clip: Clip) -> None:
    model, processor = load_model(tiny.cached("qwen2_5_vl"), dtype="bf16", device="cpu")
    inputs = build_prompt(processor, clip, "What?").on(model)
    assert model.dtype == inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    assert inputs["input_ids"].dtype == torch.int64


def test_nothing_to_ask(processors: Any, clip: Clip) -> None:
    for clips, questions in (([], "What?"), (clip, [])):
        with pytest.raises(HostError, match="needs a clip and a question"):
            build_prompt(processors("llava"), clips, questions)


def test_clips_that_the_processor_cannot_stack(processors: Any, video: Path) -> None:
    shown = [read_clip(video, frames=2), read_clip(video, frames=4)]
    with pytest.raises(HostError, match="LlavaNextVideoProcessor cannot take this input"):
        build_prompt(processors("llava_next_video"), shown, "What?")
