"""Files with one peculiarity each, which are all valid and must be read without complaint."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_media import decode_all, encode, picture, place_of, sequence, with_display_matrix

from tokensieve.errors import VideoError
from tokensieve.video import Clip, probe, read_clip

MILLISECOND = Fraction(1, 1000)
FINE = {"crf": "4", "preset": "ultrafast"}


def read(data: bytes, frames: int = 64, **wish: Any) -> Clip:
    clip = read_clip(data, frames, **wish)
    assert clip.info.warnings == []
    assert clip.indices_exact
    return clip


def places(clip: Clip) -> list[int]:
    return [place_of(frame) for frame in clip.frames]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "nut", "flv"])
def test_late_start(container: str) -> None:
    late = [1000 + 100 * place for place in range(10)]
    clip = read(encode(sequence(10), container=container, ticks=late, time_base=MILLISECOND, options=FINE))
    np.testing.assert_allclose(clip.timestamps, np.arange(10) / 10, atol=1e-3)
    assert clip.start_time >= 0.999
    assert places(clip) == list(range(10))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_gap(container: str) -> None:
    ticks = [100 * place + 5000 * (place > 4) for place in range(10)]
    clip = read(encode(sequence(10), container=container, ticks=ticks, time_base=MILLISECOND, options=FINE))
    np.testing.assert_allclose(clip.timestamps, np.array(ticks) / 1000, atol=1e-6)
    assert clip.info.variable_frame_rate
    np.testing.assert_allclose(clip.video_metadata().timestamps, clip.timestamps, atol=1e-6)
    held = read_clip(encode(sequence(10), ticks=ticks, time_base=MILLISECOND, options=FINE), sampling="fps", fps=2)
    assert held.indices.tolist() == [0, 4, 5]


def test_negative_start() -> None:
    ticks = [100 * place - 300 for place in range(10)]
    clip = read(encode(sequence(10), container="nut", ticks=ticks, time_base=MILLISECOND, options=FINE))
    assert places(clip) == list(range(10))
    np.testing.assert_allclose(clip.timestamps, np.arange(10) / 10, atol=1e-6)


def test_frames_before_an_edit_list_are_not_shown() -> None:
    ticks = [100 * place - 300 for place in range(10)]
    clip = read(encode(sequence(10), ticks=ticks, time_base=MILLISECOND, options=FINE))
    assert places(clip) == list(range(3, 10))
    assert clip.info.num_frames == 7


def test_one_frame() -> None:
    clip = read(encode(sequence(1)))
    assert (len(clip), clip.info.is_image, clip.info.num_frames) == (1, False, 1)
    assert clip.info.duration == pytest.approx(0.1)
    assert clip.video_metadata().timestamps == [0.0]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 2), (33, 17), (17, 33)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "gray", "bgr0"])
def test_sizes(width: int, height: int, pix_fmt: str) -> None:
    data = encode(sequence(5, width, height), container="matroska", codec="ffv1", pix_fmt=pix_fmt)
    clip = read(data)
    assert clip.frames.shape == (5, height, width, 3)
    np.testing.assert_array_equal(clip.frames, np.stack(decode_all(data)[1]))


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("ffv1", "gray16le"), ("ffv1", "yuv444p12le"), ("libx264", "yuv420p10le"), ("libx264", "yuv444p")],
)
def test_pixel_formats(codec: str, pix_fmt: str) -> None:
    options = FINE if codec == "libx264" else {}
    data = encode(sequence(5), container="matroska", codec=codec, pix_fmt=pix_fmt, options=options)
    clip = read(data)
    assert clip.info.pix_fmt == pix_fmt
    assert places(clip) == list(range(5))


@pytest.mark.parametrize(("container", "codec", "pix_fmt"), [("mov", "png", "rgba"), ("matroska", "ffv1", "yuva420p")])
def test_transparent_parts_are_white(container: str, codec: str, pix_fmt: str) -> None:
    alpha = np.full((48, 64, 1), 255, dtype=np.uint8)
    alpha[:10] = 0
    pixels = np.concatenate([picture(3), alpha], axis=2)
    frame = read(encode([pixels], container=container, codec=codec, pix_fmt=pix_fmt)).frames[0]
    assert (frame[:10] == 255).all()
    assert np.abs(frame[10:].astype(int) - picture(3)[10:].astype(int)).max() < 6


@pytest.mark.parametrize(
    ("container", "codec", "options", "rate"),
    [
        ("matroska", "libx264", {"bf": "3", "g": "6", **FINE}, 10),
        ("mpegts", "libx264", {"bf": "2", "g": "8", **FINE}, 10),
        ("avi", "libx264", {"bf": "2", "g": "8", **FINE}, 10),
        ("avi", "mpeg4", {"bf": "2", "g": "8"}, 10),
        ("mpeg", "mpeg2video", {"bf": "2", "g": "8"}, 25),
        ("mp4", "libx265", {"x265-params": "log-level=none:keyint=8:min-keyint=4", "preset": "ultrafast"}, 10),
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, 10),
        ("webm", "libvpx-vp9", {"lag-in-frames": "16", "cpu-used": "8"}, 10),
        ("asf", "wmv2", {}, 10),
        ("ogg", "libvpx", {}, 10),
        ("gif", "gif", {}, 10),
    ],
)
def test_containers_and_codecs(container: str, codec: str, options: dict[str, str], rate: int) -> None:
    pix_fmt = "gray" if codec == "gif" else "yuv420p"
    data = encode(sequence(30), container=container, codec=codec, pix_fmt=pix_fmt, options=options, rate=rate)
    clip = read(data)
    assert clip.indices.tolist() == list(range(30))
    np.testing.assert_allclose(clip.timestamps, np.arange(30) / rate, atol=1e-3)
    np.testing.assert_array_equal(clip.frames, np.stack(decode_all(data)[1]))
    few = read(data, 4)
    np.testing.assert_array_equal(few.frames, clip.frames[[0, 9, 19, 29]])


def test_fragmented_mp4() -> None:
    data = encode(
        sequence(30),
        options={"g": "5", **FINE},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )
    assert places(read(data)) == list(range(30))


def test_raw_stream_without_time_stamps_says_so() -> None:
    clip = read_clip(encode(sequence(20), container="h264", options={"bf": "2", **FINE}), 64)
    assert places(clip) == list(range(20))
    assert "no time stamps" in clip.info.warnings[0]
    np.testing.assert_allclose(np.diff(clip.timestamps), 0.04)


def test_sound_does_not_matter() -> None:
    clip = read(encode(sequence(10), audio=True, options=FINE))
    assert places(clip) == list(range(10))
    assert clip.info.stream_index == 0


@pytest.mark.parametrize(
    ("matrix", "rotation", "mirrored", "turn"),
    [
        ((1, 0, 0, 1), 0, False, lambda pixels: pixels),
        ((0, -1, 1, 0), 90, False, lambda pixels: np.rot90(pixels, 1)),
        ((-1, 0, 0, -1), 180, False, lambda pixels: np.rot90(pixels, 2)),
        ((0, 1, -1, 0), 270, False, lambda pixels: np.rot90(pixels, 3)),
        ((-1, 0, 0, 1), 0, True, lambda pixels: pixels[:, ::-1]),
        ((1, 0, 0, -1), 180, True, lambda pixels: pixels[::-1]),
    ],
)
def test_display_matrix(matrix: tuple[int, int, int, int], rotation: int, mirrored: bool, turn: Any) -> None:
    data = encode(sequence(2), options=FINE)
    stored = read(data).frames
    turned = with_display_matrix(data, matrix)
    info = probe(turned)
    assert (info.rotation, info.mirrored) == (rotation, mirrored)
    assert (info.width, info.height) == ((48, 64) if rotation % 180 else (64, 48))
    np.testing.assert_array_equal(read(turned).frames, np.stack([turn(pixels) for pixels in stored]))


def test_scaling_keeps_proportions_and_bounds() -> None:
    data = encode(sequence(2, 64, 48), options=FINE)
    assert read(data, longest_edge=32).frames.shape == (2, 24, 32, 3)
    assert read(data, max_pixels=1000).frames.shape[1] * read(data, max_pixels=1000).frames.shape[2] <= 1000
    assert read(data, longest_edge=640, max_pixels=10**6).frames.shape == (2, 48, 64, 3)
    info = read(data, longest_edge=32).info
    assert (info.width, info.height) == (64, 48)
    turned = with_display_matrix(data, (0, -1, 1, 0))
    assert read(turned, longest_edge=32).frames.shape == (2, 32, 24, 3)


def test_repeated_timestamps_repeat_the_frame() -> None:
    clip = read(encode(sequence(10), options=FINE), sampling="timestamps", timestamps=[0.2, 0.2, 0.55])
    assert clip.indices.tolist() == [2, 2, 5]
    assert places(clip) == [2, 2, 5]


def test_stream_that_appears_midway() -> None:
    """A broadcast recording to which sound is added later."""
    silent = encode(sequence(20), container="mpegts", options=FINE)
    both = encode(sequence(20), container="mpegts", options=FINE, audio=True)
    clip = read_clip(silent + both, 64)
    assert len(clip) == 40
    assert np.all(np.diff(clip.timestamps) > 0)


def test_cover_of_a_song_is_read_only_as_a_last_resort() -> None:
    """An MP3 file whose ID3 tag holds a PNG picture."""
    image = io.BytesIO()
    Image.fromarray(picture(9)).save(image, "PNG")
    frame = b"\x00image/png\x00\x03\x00" + image.getvalue()
    frame = b"APIC" + len(frame).to_bytes(4, "big") + b"\x00\x00" + frame
    size = len(frame)
    synchsafe = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    silence = (b"\xff\xfb\x90\xc4" + bytes(413)) * 20
    clip = read_clip(b"ID3\x03\x00\x00" + synchsafe + frame + silence)
    assert len(clip) == 1
    np.testing.assert_array_equal(clip.frames[0], picture(9))
    with pytest.raises(VideoError, match="no video stream, only audio"):
        read_clip(silence)
