"""Damaged files give what is left in them, with a warning; files that are no video give one clear sentence."""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path

import av
import numpy as np
import pytest
from video_media import encode, place_of, sequence, sound_only

from tokensieve.errors import VideoError
from tokensieve.video import probe, read_clip

FINE = {"crf": "4", "preset": "ultrafast"}


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """Fifty frames, ten to a group, index in front."""
    return encode(sequence(50), options={"g": "10", **FINE}, container_options={"movflags": "faststart"})


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm", "avi", "gif"])
def test_truncated(container: str, mp4: bytes, caplog: pytest.LogCaptureFixture) -> None:
    codec, options = ("libx264", {"g": "10", **FINE})
    if container == "webm":
        codec, options = ("libvpx", {"g": "10"})
    pix_fmt = "gray" if container == "gif" else "yuv420p"
    if container == "gif":
        codec, options = ("gif", {})
    data = mp4
    if container != "mp4":
        data = encode(sequence(50), container=container, codec=codec, pix_fmt=pix_fmt, options=options)
    with caplog.at_level(logging.WARNING, logger="tokensieve"):
        clip = read_clip(cut(data, 0.6), 8)
    assert len(clip) == 8
    assert 10 < clip.info.num_frames < 48
    assert clip.info.warnings
    assert len(caplog.records) == len(clip.info.warnings)
    good = [index for index, frame in zip(clip.indices, clip.frames, strict=True) if place_of(frame) == index]
    assert len(good) >= 7


def test_truncated_in_a_packet_uses_only_frames_that_decode(mp4: bytes) -> None:
    """The header promises more; sampling must reach to the end of what exists, not beyond."""
    clip = read_clip(cut(mp4, 0.7), 1000)
    count = len(clip)
    assert 25 < count < 45
    assert clip.indices.tolist() == [place_of(frame) for frame in clip.frames] == list(range(count))
    few = read_clip(cut(mp4, 0.7), 3)
    assert few.indices.tolist() == [0, (count - 1) // 2, count - 1]


def test_lost_group_is_skipped(mp4: bytes) -> None:
    """Zero one group's data: sampling spreads over the frames that are left."""
    with av.open(io.BytesIO(mp4)) as container:
        spots = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    hole = bytearray(mp4)
    for position, size in spots[20:30]:
        hole[position : position + size] = bytes(size)
    clip = read_clip(bytes(hole), 40)
    assert [place_of(frame) for frame in clip.frames] == [*range(20), *range(30, 50)]
    assert clip.indices.tolist() == list(range(40))
    np.testing.assert_allclose(clip.timestamps[19:21], [1.9, 3.0])
    assert clip.info.num_frames == 40
    assert any("40 can be decoded" in warning for warning in clip.info.warnings)
    assert any("could not be decoded: 10" in warning for warning in clip.info.warnings)
    with pytest.raises(VideoError, match="max_frames=39"):
        read_clip(bytes(hole), 40, max_frames=39)


def test_damage_outside_of_the_range_is_not_met(mp4: bytes) -> None:
    with av.open(io.BytesIO(mp4)) as container:
        spots = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    hole = bytearray(mp4)
    for position, size in spots[20:30]:
        hole[position : position + size] = bytes(size)
    clip = read_clip(bytes(hole), 5, start=4.0)
    assert [place_of(frame) for frame in clip.frames] == [40, 42, 44, 46, 49]
    assert clip.info.warnings == []


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_never_break_out(container: str, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(encode(sequence(30), container=container, options={"g": "10", "preset": "ultrafast"}))
    for _ in range(chance.choice((2, 10, 60))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    try:
        clip = read_clip(bytes(data), 8)
    except VideoError as error:
        assert str(error).endswith(".")
        return
    assert 1 <= len(clip) <= 8
    assert np.all(np.diff(clip.timestamps) > 0)
    assert np.all(np.diff(clip.indices) > 0)


ENCRYPTED = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"It was a dark and stormy night.\n" * 40, "looks like text"),
        (b"#EXTM3U\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n", "cannot be read"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be read"),
        (random.Random(3).randbytes(4000), "cannot be read"),
        (b"\x00\x00\x00\x18ftypmp42", "cannot be read"),
        (sound_only(), "no video stream, only audio"),
        (encode(sequence(5), container_options=ENCRYPTED), "encrypted"),
        (cut(encode(sequence(30)), 0.5), "cannot be read"),
    ],
)
def test_no_video(data: bytes, message: str) -> None:
    for reader in (read_clip, probe):
        with pytest.raises(VideoError, match=message) as caught:
            reader(data)
        assert str(caught.value).count("\n") == 0
        assert str(caught.value).endswith(".")


def test_wrong_paths(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("not a film\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for path, message in (
        (tmp_path / "missing.mp4", "does not exist"),
        (tmp_path, "is a folder"),
        (empty, "is empty"),
        (text, "looks like text"),
        ("bad\0name.mp4", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        ("", "path of the video is empty"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(VideoError, match=message):
            read_clip(path)


def test_stream_that_is_no_video() -> None:
    data = encode(sequence(3), audio=True)
    with pytest.raises(VideoError, match=r"stream 1 of .* is no video stream; its video streams are 0"):
        read_clip(data, stream=1)
    with pytest.raises(VideoError, match="stream 9"):
        probe(data, stream=9)


def test_limits_on_size() -> None:
    data = encode(sequence(10))
    with pytest.raises(VideoError, match="max_memory"):
        read_clip(data, max_memory=10_000)
    for name in ("max_pixels", "longest_edge", "max_memory"):
        with pytest.raises(VideoError, match=f"{name} must be 1 or more, not 0"):
            read_clip(data, **{name: 0})


def test_first_stream_without_frames_is_passed_over() -> None:
    """The first of two video streams is overwritten; the second is read and the warning says so."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        streams = []
        for _ in range(2):
            stream = output.add_stream("libx264", rate=10, options=FINE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            streams.append(stream)
        for pixels in sequence(10):
            for stream in streams:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            output.mux(stream.encode(None))
    data = bytearray(buffer.getvalue())
    with av.open(io.BytesIO(bytes(data))) as container:
        spots = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in spots:
        data[position : position + size] = bytes(size)
    clip = read_clip(bytes(data), 10)
    assert clip.info.stream_index == 1
    assert [place_of(frame) for frame in clip.frames] == list(range(10))
    assert "video stream 0 gives no frame; stream 1 was read instead" in clip.info.warnings


@pytest.mark.parametrize("reads", [0, 2, 4])
def test_failing_file_object_is_reported(mp4: bytes, reads: int) -> None:
    class Failing(io.BytesIO):
        left = reads

        def read(self, size: int | None = -1) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            return super().read(size)

    with pytest.raises(VideoError, match=r"<Failing> .*\.$"):
        read_clip(Failing(mp4))


def test_interrupt_passes_and_closes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(sequence(20), options=FINE))
    opened = []
    real = av.open

    def watched(*arguments: object, **options: object) -> object:
        container = real(*arguments, **options)
        opened.append(container)
        return container

    monkeypatch.setattr(av, "open", watched)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_clip(path, progress=stop)
    for container in opened:
        with pytest.raises((AssertionError, ValueError)):
            next(container.demux())
