"""Decoding plans, and the same frames whichever way they are reached."""

from __future__ import annotations

import os
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_media import encode, place_of, sequence

from tokensieve.errors import VideoError
from tokensieve.video import decode, read_clip
from tokensieve.video.convert import SizeLimits
from tokensieve.video.decode import Run, plan_runs
from tokensieve.video.packets import PacketIndex
from tokensieve.video.read import _read_video
from tokensieve.video.sample import SampleRequest
from tokensieve.video.source import open_source
from tokensieve.video.timeline import Timeline

FINE = {"crf": "4", "preset": "ultrafast"}


def stored(pts: list[int], keys: list[int]) -> PacketIndex:
    """A stream whose packets are stored in the order of ``pts``."""
    stamps = np.array(pts)
    flags = np.isin(np.arange(len(pts)), keys)
    shown = np.argsort(stamps)
    line = Timeline(stamps[shown], flags[shown], Fraction(1, 10))
    return PacketIndex(stamps, stamps, flags, shown, line, True, True)


def test_one_pass_where_seeking_saves_nothing() -> None:
    packets = stored(list(range(40)), [0, 10, 20, 30])
    assert plan_runs(packets, np.array([5, 15, 25]), seek_cost=12) == [Run(0, 25, False)]


def test_seeks_where_groups_are_far_apart() -> None:
    packets = stored(list(range(400)), [0, 100, 200, 300])
    assert plan_runs(packets, np.array([3, 350]), seek_cost=12) == [Run(0, 3, False), Run(300, 350, True)]
    assert plan_runs(packets, np.array([350]), seek_cost=12) == [Run(300, 350, True)]
    assert plan_runs(packets, np.array([3, 350]), seek_cost=float("inf")) == [Run(0, 350, False)]


def test_frames_shown_before_their_keyframe_need_the_one_before() -> None:
    """Open group: pictures 8 and 9 are stored after keyframe 10 but shown before it."""
    packets = stored([0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11], [0, 8])
    assert plan_runs(packets, np.array([9]), seek_cost=0) == [Run(0, 10, False)]
    assert plan_runs(packets, np.array([11]), seek_cost=0) == [Run(8, 11, True)]


@given(st.data())
def test_plans_cover_every_frame_from_a_usable_keyframe(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 120))
    keys = sorted({0, *data.draw(st.lists(st.integers(0, count - 1), max_size=10))})
    wanted = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    packets = stored(list(range(count)), keys)
    runs = plan_runs(packets, wanted, data.draw(st.integers(0, 40)))
    for index in wanted:
        (run,) = [run for run in runs if run.first <= index <= run.last]
        assert any(run.first <= key <= index for key in keys)
    assert all(run.first in keys for run in runs)
    assert all(before.last < after.first for before, after in pairwise(runs))
    assert [run.seek for run in runs[1:]] == [True] * (len(runs) - 1)


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "10", "bf": "3", "b_strategy": "0"}),
        ("mp4", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}),
        ("matroska", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1"}),
        ("mpegts", "libx264", {"g": "10", "bf": "2"}),
        ("mp4", "libx265", {"x265-params": "log-level=none:keyint=10:min-keyint=5:open-gop=1:bframes=4"}),
        ("matroska", "libx265", {"x265-params": "log-level=none:keyint=10:min-keyint=5:bframes=4"}),
        ("webm", "libvpx-vp9", {"g": "10", "lag-in-frames": "16", "cpu-used": "8"}),
        ("webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "8"}),
        ("matroska", "ffv1", {}),
    ],
)
def test_seeking_equals_one_pass(
    container: str, codec: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single frame, reached by seeking, equals the frame of a pass over the whole file."""
    data = encode(sequence(48), container=container, codec=codec, options=options)
    monkeypatch.setattr(decode, "SEEK_COST", 0)
    monkeypatch.setattr(decode.plan_runs, "__defaults__", (0,))
    everything = read_clip(data, 48)
    assert everything.info.warnings == []
    with open_source(data) as opened:
        for index in range(0, 48, 5):
            request = SampleRequest("timestamps", timestamps=[everything.timestamps[index]])
            single = _read_video(opened, request, SizeLimits(), None, None)
            assert single.indices.tolist() == [index]
            np.testing.assert_array_equal(single.frames[0], everything.frames[index])


def test_few_packets_are_decoded_for_a_late_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(sequence(50) * 8, options={"g": "25", **FINE})
    fed: list[Any] = []
    real = decode.Decoder.feed

    def counted(self: Any, packet: Any) -> list[Any]:
        fed.append(packet)
        return real(self, packet)

    monkeypatch.setattr(decode.Decoder, "feed", counted)
    clip = read_clip(data, sampling="timestamps", timestamps=[38.0])
    assert place_of(clip.frames[0]) == 380 % 50
    assert len(fed) <= 10


def test_container_that_cannot_seek_is_read_through(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(sequence(50), options={"g": "5", **FINE})
    monkeypatch.setattr(decode, "_packets_from", lambda *_: None)
    clip = read_clip(data, 3)
    assert [place_of(frame) for frame in clip.frames] == [0, 24, 49]
    assert clip.info.warnings == []


def test_decoder_with_wrong_stamps_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that leave the decoder with stamps going back are counted instead."""
    data = encode(sequence(20), options=FINE)
    real = decode._decode_until

    def confused(*arguments: Any) -> Any:
        frames = list(real(*arguments))
        for frame in frames:
            frame.pts = -frame.pts
        return iter(frames)

    monkeypatch.setattr(decode, "_decode_until", confused)
    clip = read_clip(data, 3)
    assert [place_of(frame) for frame in clip.frames] == [0, 9, 19]


def test_change_of_size_within_the_stream() -> None:
    """Two recordings of different size joined in one transport stream: frames take the first size."""
    small = encode(sequence(10, 64, 48), container="mpegts", options=FINE)
    large = encode(sequence(10, 128, 96), container="mpegts", options=FINE)
    clip = read_clip(small + large, 64)
    assert clip.frames.shape[1:] == (48, 64, 3)
    assert len(clip) == 20
    assert np.all(np.diff(clip.timestamps) > 0)
    assert any("size changes" in warning for warning in clip.info.warnings)


@pytest.mark.slow
def test_memory_stays_bounded_on_a_long_clip(videos: Path) -> None:
    """21766 frames of 172 kB would be 3.8 GB; reading 16 of them must not grow the process by 150 MB."""
    process = psutil.Process(os.getpid())
    path = videos / "black_6min_av1.mp4"
    read_clip(path, 1)
    before, peak = process.memory_info().rss, 0

    def watch(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    with open_source(path) as opened:
        clip = _read_video(opened, SampleRequest(frames=16), SizeLimits(), None, watch, seek=False)
    assert len(clip) == 16
    assert peak - before < 150 << 20


@pytest.mark.slow
def test_seeking_is_faster_on_a_long_clip(videos: Path) -> None:
    spent = []
    with open_source(videos / "black_6min_av1.mp4") as opened:
        for seek in (True, False):
            started = time.perf_counter()
            _read_video(opened, SampleRequest(frames=4), SizeLimits(), None, None, seek=seek)
            spent.append(time.perf_counter() - started)
    assert spent[0] < spent[1]


def test_no_message_from_ffmpeg_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    data = encode(sequence(30), options=FINE)
    with pytest.raises(VideoError, match="cannot be read"):
        read_clip(data[: len(data) // 2])
    damaged = bytearray(data)
    damaged[2000:2400] = bytes(400)
    read_clip(bytes(damaged))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
