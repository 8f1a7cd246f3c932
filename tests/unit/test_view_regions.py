"""Which part of which frame a view shows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig

from tokensieve.core.layout import Layout
from tokensieve.view.regions import WHOLE, Box, Region, crop, image_regions, seen_box, video_regions


def spans(views: int, frames: int) -> list[tuple[int, int]]:
    return [(region.first, region.last) for region in video_regions(views, frames)]


def test_one_view_per_frame_and_one_per_pair() -> None:
    assert spans(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert spans(3, 6) == [(0, 1), (2, 3), (4, 5)]
    # The odd frame at the end was repeated by the processor.
    assert spans(3, 5) == [(0, 1), (2, 3), (4, 4)]
    assert spans(1, 1) == [(0, 0)]


@pytest.mark.parametrize(("views", "frames"), [(5, 7), (2, 1), (4, 9), (7, 100)])
def test_other_numbers_stay_inside_the_clip(views: int, frames: int) -> None:
    found = spans(views, frames)
    assert len(found) == views
    assert all(0 <= first <= last < frames for first, last in found)
    assert [first for first, _ in found] == sorted(first for first, _ in found)


def test_a_centre_crop_leaves_the_middle() -> None:
    processor = SimpleNamespace(
        size={"shortest_edge": 100}, crop_size={"height": 100, "width": 100}, do_center_crop=True
    )
    assert seen_box(100, 200, processor) == Box(0.0, 0.25, 1.0, 0.75)
    assert seen_box(300, 100, processor) == pytest.approx(Box(1 / 3, 0.0, 2 / 3, 1.0))
    processor.do_center_crop = False
    assert seen_box(100, 200, processor) == WHOLE
    assert seen_box(100, 200) == WHOLE


def test_padding_to_a_square_reaches_outside() -> None:
    processor = SimpleNamespace(pad_to_square=None, do_pad=True, do_center_crop=False, crop_size=None)
    assert seen_box(100, 200, processor) == Box(-0.5, 0.0, 1.5, 1.0)
    assert seen_box(200, 100, processor) == Box(0.0, -0.5, 1.0, 1.5)
    processor.do_pad = False
    assert seen_box(100, 200, processor) == WHOLE


def test_towers_of_whole_patches_leave_out_a_rim() -> None:
    config = SimpleNamespace(vision_config=CLIPVisionConfig(image_size=384, patch_size=14))
    # 27 patches a side: 14 x 14 after interpolation, 13 x 13 after pooling that rounds down.
    assert seen_box(10, 10, None, config, (14, 14)) == Box(0, 0, 27 * 14 / 384, 27 * 14 / 384)
    assert seen_box(10, 10, None, config, (13, 13)) == Box(0, 0, 26 * 14 / 384, 26 * 14 / 384)
    assert seen_box(10, 10, None, SimpleNamespace(), (13, 13)) == WHOLE


def test_images_of_one_view_two_views_and_tiles() -> None:
    single = Layout.regular("image", 1, 4, 4)
    assert image_regions(single, 2, 10, 20) == [Region(2, 2)]
    cells = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 1]])
    pair = Layout.from_cells("image", [(1, 1), (1, 2)], cells)
    assert [region.name for region in image_regions(pair, 0, 10, 20)] == ["base picture", "mosaic"]
    tiles = image_regions(Layout.regular("image", 7, 4, 4), 0, 200, 300)
    assert tiles[0].box == Box(0, 0, 1 / 2, 1 / 3) and tiles[0].name == "tile 1 of 6"
    assert tiles[5].box == Box(1 / 2, 2 / 3, 1, 1)
    assert tiles[6] == Region(0, 0, WHOLE, "thumbnail")
    assert image_regions(Layout.regular("image", 7, 4, 4), 0, 300, 200)[1].box == Box(0, 1 / 2, 1 / 3, 1)


def test_crop_cuts_and_pads() -> None:
    frame = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(1, 4, 6, 3)
    assert np.array_equal(crop(frame, Region(0, 0)), frame[0])
    assert np.array_equal(crop(frame, Region(0, 0, Box(0.5, 0.5, 1, 1))), frame[0, 2:, 3:])
    padded = crop(frame, Region(0, 0, Box(-0.25, 0, 1.25, 1)))
    assert padded.shape == (6, 6, 3)
    assert np.array_equal(padded[1:5], frame[0]) and (padded[[0, 5]] == 127).all()
    assert crop(frame, Region(0, 0, Box(0.5, 0.5, 0.5, 0.5))).shape == (1, 1, 3)
