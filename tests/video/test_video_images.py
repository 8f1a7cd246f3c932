"""Still images are clips of one frame; animations are videos."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from video_media import picture

from tokensieve.errors import VideoError
from tokensieve.video import probe, read_clip


def saved(pixels: NDArray[Any] | Image.Image, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_photograph(images: Path) -> None:
    clip = read_clip(images / "baseball.jpg")
    truth = np.asarray(Image.open(images / "baseball.jpg").convert("RGB"))
    np.testing.assert_array_equal(clip.frames, truth[None])
    assert (clip.timestamps.tolist(), clip.indices.tolist()) == ([0.0], [0])
    assert clip.info.is_image
    assert (clip.info.codec, clip.info.num_frames, clip.info.average_fps) == ("jpeg", 1, None)
    metadata = clip.video_metadata()
    assert (metadata.timestamps, metadata.total_num_frames) == ([0.0], 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    clip = read_clip(saved(picture(9), kind, **options))
    np.testing.assert_array_equal(clip.frames[0], picture(9))
    assert clip.info.is_image


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_parts_are_white(kind: str) -> None:
    alpha = np.full((48, 64, 1), 255, dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 128
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    frame = read_clip(saved(np.concatenate([picture(9), alpha], axis=2), kind, **options)).frames[0]
    assert (frame[:10] == 255).all()
    np.testing.assert_array_equal(frame[20:], picture(9)[20:])
    blend = picture(9)[10:20] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(frame[10:20] - blend).max() <= 1


def test_grey_palette_and_deep_images() -> None:
    grey = picture(9)[..., 0]
    for data in (
        saved(grey, "PNG"),
        saved(Image.fromarray(picture(9)).quantize(64), "PNG"),
        saved((grey.astype(np.uint16) * 257), "PNG"),
        saved(Image.merge("LA", (Image.fromarray(grey), Image.new("L", (64, 48), 255))), "PNG"),
    ):
        frame = read_clip(data).frames[0]
        assert frame.shape == (48, 64, 3)
        assert np.abs(frame.astype(int) - picture(9).astype(int)).max() <= 2
    palette = Image.fromarray(picture(9)).quantize(16)
    hidden = saved(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert read_clip(hidden).frames[0, 0, 0].tolist() == [255, 255, 255]
    bits = read_clip(saved(Image.fromarray(grey > 50), "PNG")).frames[0]
    assert set(np.unique(bits)) == {0, 255}


@pytest.mark.parametrize(("tag", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tag: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = saved(picture(9), "PNG", exif=exif)
    clip = read_clip(data)
    np.testing.assert_array_equal(clip.frames[0], np.rot90(picture(9), turns))
    assert clip.info.rotation == turns * 90
    assert (probe(data).width, probe(data).height) == clip.frames.shape[2:0:-1]


def test_mirrored_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 5
    clip = read_clip(saved(picture(9), "PNG", exif=exif))
    np.testing.assert_array_equal(clip.frames[0], picture(9).transpose(1, 0, 2))
    assert clip.info.mirrored


@pytest.mark.parametrize(
    "wish",
    [
        {"sampling": "fps", "fps": 3},
        {"sampling": "keyframe"},
        {"sampling": "all"},
        {"sampling": "timestamps", "timestamps": [0.0]},
        {"start": 0, "end": 2},
    ],
)
def test_every_sampling_takes_the_one_frame(wish: dict[str, Any]) -> None:
    clip = read_clip(saved(picture(9), "PNG"), **wish)
    assert (clip.indices.tolist(), clip.info.warnings) == ([0], [])
    with pytest.raises(VideoError, match="after the end"):
        read_clip(saved(picture(9), "PNG"), start=1.0)


def test_one_pixel_and_scaling() -> None:
    assert read_clip(saved(picture(9, 1, 1), "PNG")).frames.shape == (1, 1, 1, 3)
    assert read_clip(saved(picture(9), "PNG"), longest_edge=32).frames.shape == (1, 24, 32, 3)
    assert read_clip(saved(picture(9), "PNG"), max_pixels=300).frames[0].size <= 900


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animation(kind: str) -> None:
    pages = [Image.fromarray(picture(place)) for place in (0, 20, 40)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(pages[0], kind, save_all=True, append_images=pages[1:], duration=[100, 300, 200], **options)
    clip = read_clip(data)
    assert not clip.info.is_image
    np.testing.assert_allclose(clip.timestamps, [0.0, 0.1, 0.4])
    assert clip.info.num_frames == 3
    for frame, place in zip(clip.frames, (0, 20, 40), strict=True):
        assert np.abs(frame.astype(int) - picture(place).astype(int)).max() <= 8
    np.testing.assert_allclose(clip.video_metadata().timestamps, clip.timestamps)
    middle = read_clip(data, sampling="timestamps", timestamps=[0.25])
    assert middle.indices.tolist() == [1]


def test_hidden_first_picture_of_an_animated_png() -> None:
    pages = [Image.fromarray(picture(place)) for place in (49, 20, 40)]
    data = saved(pages[0], "PNG", save_all=True, append_images=pages[1:], duration=100, default_image=True)
    clip = read_clip(data)
    assert len(clip) == 2
    np.testing.assert_array_equal(clip.frames[0], picture(20))


def test_static_gif_is_an_image() -> None:
    clip = read_clip(saved(Image.fromarray(picture(9)), "GIF"))
    assert clip.info.is_image
    assert len(clip) == 1


def test_pages_of_a_tiff_are_not_a_video() -> None:
    pages = [Image.fromarray(picture(place)) for place in (0, 20)]
    assert len(read_clip(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]))) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_image(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    data = saved(noise, kind)
    with pytest.raises(VideoError, match=r"\.$"):
        read_clip(data[: len(data) // 2])


def test_truncated_animation_keeps_good_frames() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3)).astype(np.uint8)
    pages = [Image.fromarray(page) for page in noise]
    data = saved(pages[0], "PNG", save_all=True, append_images=pages[1:], duration=100)
    clip = read_clip(data[: int(len(data) * 0.6)])
    assert 2 <= len(clip) < 6
    np.testing.assert_array_equal(clip.frames[0], noise[0])
    assert "damaged" in clip.info.warnings[0]


def test_too_large_and_unreadable() -> None:
    header = saved(picture(1), "PNG")
    huge = header[:16] + (60000).to_bytes(4, "big") * 2 + header[24:]
    with pytest.raises(VideoError, match=r"too large|too many pixels|damaged|cannot be read"):
        read_clip(huge)
    with pytest.raises(VideoError, match="HEIC"):
        read_clip(b"\x00\x00\x00\x18ftypheic" + bytes(100))
    with pytest.raises(VideoError, match="max_memory"):
        read_clip(header, max_memory=100)
