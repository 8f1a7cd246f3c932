"""Every real clip against the measured facts and against a plain PyAV loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from video_media import CLIPS, Reference

from tokensieve.video import Clip, probe, read_clip
from tokensieve.video.convert import SizeLimits
from tokensieve.video.read import _read_video
from tokensieve.video.sample import SampleRequest
from tokensieve.video.source import open_source


def test_facts_of_each_clip(videos: Path, clip_name: str) -> None:
    entry, info = CLIPS[clip_name], probe(videos / clip_name)
    turned = entry["rotation"] % 180 != 0
    stored = (entry["width"], entry["height"])
    assert (info.width, info.height) == (stored[::-1] if turned else stored)
    assert info.rotation == entry["rotation"] % 360
    assert info.num_frames == entry["frames"]
    assert info.duration == pytest.approx(entry["duration"], abs=2e-3)
    assert info.start_time == pytest.approx(entry["first_pts"], abs=1e-3)
    assert info.average_fps == pytest.approx(entry["fps"], abs=1e-3)
    assert info.variable_frame_rate == entry["vfr"]
    assert (info.codec, info.container, info.pix_fmt) == (
        entry["codec"],
        entry["container"],
        entry["pix_fmt"],
    )
    assert len(info.video_streams) == entry["video_streams"]
    assert not info.is_image
    assert info.warnings == []


def test_uniform_frames_and_times_equal_plain_decoding(
    videos: Path, clip_name: str, reference: Callable[[str], Reference]
) -> None:
    clip, truth = read_clip(videos / clip_name, 7), reference(clip_name)
    assert clip.indices.tolist() == truth.places.tolist()
    assert clip.indices_exact
    np.testing.assert_allclose(clip.timestamps, (truth.times - truth.times[0])[truth.places], atol=1e-6)
    assert clip.start_time == pytest.approx(truth.times[0], abs=1e-6)
    assert clip.info.num_frames == len(truth.times)
    for frame, picture in zip(clip.frames, truth.pictures, strict=True):
        np.testing.assert_array_equal(frame, picture)
    assert clip.info.warnings == []
    check_processor_times(clip, CLIPS[clip_name]["frames"])


def check_processor_times(clip: Clip, total: int) -> None:
    """What processors compute from the metadata: exact, but for the rounding of containers with milliseconds."""
    metadata = clip.video_metadata()
    exact = 1e-6 if clip.info.variable_frame_rate or clip.info.time_base.denominator != 1000 else 1e-3
    np.testing.assert_allclose(metadata.timestamps, clip.timestamps, atol=exact)
    assert metadata.sampled_fps == pytest.approx(len(clip) / clip.info.duration, rel=0.01)
    if not clip.info.variable_frame_rate:
        assert metadata.total_num_frames == total
        assert metadata.frames_indices == clip.indices.tolist()


@pytest.mark.parametrize(
    "name",
    [
        "arm_wrestling_cut.mp4",
        "black_6min_av1.mp4",
        "bunny_square_vp9_642.webm",
        "dog_bed_rotated90.mp4",
        "flipping_a_pancake.mkv",
        "motion_photo_hevc_vfr_2tracks.mp4",
        "persons_one_by_one_139s.mp4",
        "portrait_drummer.mp4",
    ],
)
def test_seeking_gives_the_frames_of_one_pass(videos: Path, name: str) -> None:
    request = SampleRequest(frames=5)
    with open_source(videos / name) as opened:
        sought = _read_video(opened, request, SizeLimits(), None, None, seek=True)
        straight = _read_video(opened, request, SizeLimits(), None, None, seek=False)
    np.testing.assert_array_equal(sought.frames, straight.frames)
    np.testing.assert_array_equal(sought.timestamps, straight.timestamps)


def test_first_moving_stream_is_the_default_and_others_can_be_chosen(videos: Path) -> None:
    path = videos / "nasa_two_video_streams.mp4"
    assert (probe(path).stream_index, probe(path).num_frames) == (0, 325)
    other = read_clip(path, 3, stream=3)
    assert other.frames.shape == (3, 270, 480, 3)
    assert (other.info.num_frames, other.info.video_streams) == (390, (0, 3))
    photo = read_clip(videos / "motion_photo_hevc_vfr_2tracks.mp4", 4, stream=1)
    assert photo.frames.shape == (1, 2048, 1536, 3)


def test_rotation_lays_pictures_upright(videos: Path) -> None:
    """In the phone's motion photo the grey sky is above the roof, which has many edges."""
    frame = read_clip(videos / "motion_photo_hevc_vfr_2tracks.mp4", 1).frames[0].astype(float)
    assert frame.shape == (1024, 768, 3)
    detail = np.abs(np.diff(frame.mean(axis=2), axis=1)).mean(axis=1)
    assert detail[-300:].mean() > 3 * detail[:300].mean()


def test_keyframes_of_a_long_clip(videos: Path) -> None:
    clip = read_clip(videos / "persons_one_by_one_139s.mp4", 14, "keyframe", longest_edge=96)
    assert len(clip) == 14
    assert set(np.diff(clip.indices)) <= {100, 110}
    assert clip.frames.shape[1:] == (54, 96, 3)


def test_frames_per_second_of_an_ntsc_clip(videos: Path) -> None:
    clip = read_clip(videos / "dog_fetch.mp4", sampling="fps", fps=2, longest_edge=64)
    wanted = np.arange(20) / 2
    assert len(clip) == 20
    assert np.all(clip.timestamps <= wanted + 1e-4)
    assert np.all(clip.timestamps > wanted - 1001 / 30000 - 1e-4)
    assert clip.video_metadata().sampled_fps == pytest.approx(2, rel=0.01)


def test_progress_and_silence(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING, logger="tokensieve"):
        read_clip(videos / "arm_wrestling_cut.mp4", 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not caplog.records
