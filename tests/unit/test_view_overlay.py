"""Pixels of the overlay."""

from __future__ import annotations

import numpy as np
import pytest

from tokensieve.view.cells import Cells, CellState
from tokensieve.view.overlay import VEIL, VEIL_LEFT, fit, group_colours, overlay

KEPT, MERGED, LEFT, DROPPED, ABSENT = CellState


def cells(states: list[list[int]], groups: list[list[int]] | None = None) -> Cells:
    state = np.array(states, np.int8)
    return Cells(state, np.full(state.shape, -1) if groups is None else np.array(groups))


def plain(height: int, width: int, colour: tuple[int, int, int] = (200, 80, 20)) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


def test_a_frame_that_is_kept_whole_stays_as_it_is() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(overlay(frame, cells([[KEPT] * 5] * 4)), frame)


@pytest.mark.parametrize(("state", "veil", "share"), [(DROPPED, VEIL, 0.72), (LEFT, VEIL_LEFT, 0.58)])
def test_what_does_not_go_on_loses_its_colour(state: int, veil: tuple[int, int, int], share: float) -> None:
    frame = plain(20, 40)
    grey = 0.299 * 200 + 0.587 * 80 + 0.114 * 20
    expected = np.rint((1 - share) * grey + share * np.array(veil))
    painted = overlay(frame, cells([[KEPT, state]]))
    assert (painted[:, 20:] == expected).all()
    # Only the last column of the kept patch carries the separating line.
    assert (painted[:, :19] == frame[:, :19]).all()
    assert (painted[:, 19] == np.rint(0.55 * frame[:, 19] + 0.45 * 255)).all()


def test_dropped_patches_show_on_black_and_on_white() -> None:
    for colour in ((0, 0, 0), (255, 255, 255)):
        painted = overlay(plain(40, 40, colour), cells([[KEPT, DROPPED]])).astype(int)
        assert abs(painted[20, 30] - painted[20, 10]).max() > 25


def test_folded_patches_are_tinted_like_their_group_and_outlined() -> None:
    painted = overlay(plain(60, 90), cells([[KEPT, MERGED, MERGED]], [[7, 7, 3]]))
    colours = group_colours(np.array([7, 3]))
    assert (painted[30, 10] == (200, 80, 20)).all()
    for place, colour in ((45, colours[0]), (75, colours[1])):
        assert (painted[30, place] == np.rint(0.54 * np.array((200, 80, 20)) + 0.46 * colour)).all()
    # The line lies between the groups, not between the kept patch and what was folded into it.
    assert np.allclose(painted[30, 58:60], colours[0], atol=1) and np.allclose(painted[30, 60:62], colours[1], atol=1)
    assert (painted[30, 29] == (200, 80, 20)).all()


def test_neighbouring_groups_have_different_colours() -> None:
    colours = group_colours(np.arange(40))
    assert colours.shape == (40, 3) and colours.min() >= 0 and colours.max() <= 255
    assert (np.abs(np.diff(colours, axis=0)).sum(1) > 100).all()


def test_absent_patches_are_hatched() -> None:
    painted = overlay(plain(32, 64), cells([[KEPT, ABSENT]]))[:, 32:]
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2
    assert (painted[..., 0] == painted[..., 1]).all()


@pytest.mark.parametrize(("height", "width"), [(47, 31), (28, 28), (300, 211)])
def test_edges_lie_on_whole_pixels_and_all_patches_are_there(height: int, width: int) -> None:
    rows, columns = 14, 7
    state = np.full((rows, columns), DROPPED, np.int8)
    state[::2, ::2] = KEPT
    grey = overlay(plain(height, width, (255, 0, 0)), Cells(state, np.full(state.shape, -1)))
    dropped = (grey[..., 0] == grey[-1, columns and width * 3 // columns // 2, 0]) & (grey[..., 0] < 120)
    expected = state[(np.arange(height) * rows // height)[:, None], np.arange(width) * columns // width] == DROPPED
    assert np.array_equal(dropped, expected)


def test_the_given_frame_is_not_written_to() -> None:
    frame = plain(20, 20)
    frame.setflags(write=False)
    before = frame.copy()
    overlay(frame, cells([[DROPPED, MERGED]], [[-1, 0]]))
    assert np.array_equal(frame, before)


def test_fit_keeps_the_shape_and_leaves_four_pixels_a_patch() -> None:
    frame = plain(90, 160)
    assert fit(frame, 320, (4, 4)).shape == (180, 320, 3)
    assert fit(frame, 80, (4, 4)).shape == (45, 80, 3)
    assert fit(frame, 160, (4, 4)) is frame
    assert fit(plain(2, 400), 200, (10, 20)).shape == (40, 200, 3)
