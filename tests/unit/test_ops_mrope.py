"""Positions of pruned media by the rules of the serving engine."""

from __future__ import annotations

import pytest
import torch

from tokensieve.errors import MethodError
from tokensieve.ops.mrope import engine_positions, media_positions

START, VIDEO, IMAGE, END = 900, 800, 801, 901


def _positions(ids: list[int], tables: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    before = torch.arange(len(ids)).expand(3, -1)
    return engine_positions(torch.tensor(ids), tables, before, vision_start=START, media_ids=[VIDEO, IMAGE])


def test_table_truncates_the_temporal_axis() -> None:
    table = media_positions((3, 4, 6), 2, tokens_per_second=2, seconds_per_grid=0.7)
    assert table.shape == (3 * 2 * 3, 4)
    assert table[::6, 0].tolist() == [0, 1, 2]
    assert table[6:12, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert table[6:12, 2].tolist() == [0, 1, 2, 0, 1, 2]
    assert table[:, 3].unique().tolist() == [3]
    assert media_positions((2, 5, 7), 2).shape[0] == 2 * 2 * 3


def test_text_restarts_at_the_width_and_may_fall_below_the_media() -> None:
    table = media_positions((4, 4, 6), 2, tokens_per_second=2, seconds_per_grid=2)
    kept = table[[0, 4, 23]]
    positions, delta = _positions([1, START, VIDEO, VIDEO, VIDEO, END, 2], [kept])
    assert positions[0].tolist() == [0, 1, 2, 2, 14, 5, 6]
    assert positions[1].tolist() == [0, 1, 2, 3, 3, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert delta == 14 + 1 - 7


def test_several_items_follow_each_other() -> None:
    video, image = media_positions((2, 4, 4), 2), media_positions((1, 6, 4), 2)
    ids = [START, IMAGE, IMAGE, END, 7, START, VIDEO, VIDEO, END]
    positions, delta = _positions(ids, [image[[0, 5]], video[[1, 7]]])
    # The image begins at 1 and is 2 wide: its end token stands at 3, the next vision-start at 5.
    assert positions[0].tolist() == [0, 1, 1, 3, 4, 5, 6, 7, 8]
    assert positions[1].tolist() == [0, 1, 3, 3, 4, 5, 6, 7, 8]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 7, 7, 8]
    assert delta == 0


def test_spans_with_timestamps_restart_behind_their_largest_position() -> None:
    # timestamp, vision-start, two kept tokens, vision-end; again with one kept token
    rows = [
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [2, 2, 2, 0, 1],
        [2, 3, 5, 0, 1],
        [6, 6, 6, 0, 0],
        [7, 7, 7, 0, 0],
        [8, 8, 8, 1, 0],
        [9, 9, 9, 0, 1],
        [10, 10, 10, 0, 0],
    ]
    ids = [1, 50, START, VIDEO, VIDEO, END, 51, START, VIDEO, END, 2, 3]
    positions, delta = _positions(ids, [torch.tensor(rows)])
    assert positions[2].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13]
    assert positions[0].tolist() == [0, 1, 2, 3, 3, 7, 8, 9, 10, 11, 12, 13]
    assert delta == 14 - 12


def test_tables_that_do_not_fit() -> None:
    table = media_positions((1, 4, 4), 2)
    with pytest.raises(MethodError, match="4 rows of media item 0"):
        _positions([START, VIDEO, VIDEO, VIDEO, END], [table])
    with pytest.raises(MethodError, match="no vision-start token for media item 1 of 2"):
        _positions([START, VIDEO, VIDEO, VIDEO, VIDEO, END], [table, table])
