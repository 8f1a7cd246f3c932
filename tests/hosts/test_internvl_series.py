"""Which pictures of an InternVL prompt are frames of one video."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tokensieve.hosts.internvl import InternVL

IMG, START, END, FRAME, COLON, NEWLINE = 99, 90, 91, 50, 51, 52


def _base() -> Any:
    vision = SimpleNamespace(image_size=28, patch_size=14)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, downsample_ratio=1.0, image_token_id=IMG))


def _picture(tiles: int = 1) -> list[int]:
    return [START, *([IMG] * 4 * tiles), END]


def _frame(number: int) -> list[int]:
    return [FRAME, *(int(digit) for digit in str(number)), COLON, *_picture(), NEWLINE]


def _groups(tokens: list[int]) -> list[tuple[str, int]]:
    return InternVL()._groups(torch.tensor(tokens), _base())


def test_frames_are_counted_past_nine() -> None:
    tokens = [1, 2] + [token for number in range(1, 13) for token in _frame(number)] + [3]
    assert _groups(tokens) == [("video", 12)]


def test_two_videos_in_one_prompt() -> None:
    video = [token for number in (1, 2, 3) for token in _frame(number)]
    assert _groups([1, *video, 7, 8, *video, 3]) == [("video", 3), ("video", 3)]


def test_images_with_words_between_stay_apart() -> None:
    tokens = [1, 2, 3, 4, *_picture(), 5, 6, 7, 8, 9, *_picture(), 10]
    assert _groups(tokens) == [("image", 1), ("image", 1)]
    assert _groups([1, *_picture(), NEWLINE, *_picture(), 3]) == [("image", 1), ("image", 1)]


def test_tiles_and_a_video() -> None:
    video = [token for number in (1, 2) for token in _frame(number)]
    assert _groups([1, *_picture(3), NEWLINE, *video]) == [("image", 3), ("video", 2)]
