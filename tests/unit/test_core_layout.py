"""Geometry, reading orders and index arithmetic against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokensieve.core.compactor import (
    Placement,
    arrange_row,
    gather_planes,
    gather_positions,
    gather_sequence,
    identity,
    pad_rows,
    renumbered,
)
from tokensieve.core.layout import Layout
from tokensieve.core.plan import MergeMap, Plan, join_views, reading_order
from tokensieve.errors import MethodError


def test_row_separators_follow_their_rows() -> None:
    layout = Layout.regular("video", 2, 2, 2, "row")
    assert layout.tokens == 12
    assert layout.patch_tokens.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert layout.has_row_separators
    assert layout.is_uniform


def test_one_separator_at_the_end_belongs_to_no_view() -> None:
    layout = Layout.regular("video", 2, 1, 3, "end")
    assert layout.tokens == 7
    assert layout.view.tolist()[-1] == -1
    assert not layout.has_row_separators
    assert layout.patches_per_view.tolist() == [3, 3]


def test_some_views_are_renumbered() -> None:
    part, tokens = Layout.regular("video", 3, 1, 2, "row").of_views(torch.tensor([0, 2]))
    assert tokens.tolist() == [0, 1, 2, 6, 7, 8]
    assert part.view.tolist() == [0, 0, 0, 1, 1, 1]
    assert part.is_uniform


def test_missing_tokens_make_an_item_ragged() -> None:
    layout = Layout.regular("video", 2, 2, 2).of_tokens(torch.tensor([0, 1, 2, 3, 6]))
    assert not layout.is_uniform
    assert layout.patches_per_view.tolist() == [4, 1]
    assert layout.of_view(1).patches == 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("in-place", [1, 2, 5, 6, 8, 11]),
        ("after-frame", [1, 2, 5, 6, 8, 11]),
        ("occupied", [1, 2, 6, 8]),
    ],
)
def test_where_separators_go(rule: str, expected: list[int]) -> None:
    """Two frames of 2 x 2; patch 1 of frame 0 and patch 0 of frame 1 survive."""
    layout = Layout.regular("video", 2, 2, 2, "row")
    plan = Plan(torch.tensor([1, 4]), separators=rule)
    tokens, slots = reading_order(layout, plan)
    assert tokens.tolist() == expected
    assert slots[tokens == 6].item() == 1


def test_separators_behind_the_patches_of_their_frame() -> None:
    layout = Layout.regular("video", 1, 2, 2, "row")
    tokens, _ = reading_order(layout, Plan(torch.tensor([0, 3]), separators="after-frame"))
    assert tokens.tolist() == [0, 4, 2, 5]
    tokens, _ = reading_order(layout, Plan(torch.tensor([0, 3])))
    assert tokens.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("rule", "expected", "slots"),
    [
        ("drop", [7, 1, 0], [0, 1, 2]),
        ("per-frame", [0, 1, 5, 7, 11, 17], [2, 1, -1, 0, -1, -1]),
        ("per-group", [7, 1, 5, 0, 2], [0, 1, -1, 2, -1]),
    ],
)
def test_one_separator_each(rule: Any, expected: list[int], slots: list[int]) -> None:
    """Three frames of 2 x 2 with row separators; the last frame keeps nothing, two groups end in the first one."""
    layout = Layout.regular("video", 3, 2, 2, "row")
    plan = Plan(torch.tensor([5, 1, 0]), separators=rule, groups=torch.tensor([0, 0, 1])).checked(12, "toy")
    found, places = reading_order(layout, plan)
    assert found.tolist() == expected
    assert places.tolist() == slots


def test_separators_run_out_from_the_nearest_frame() -> None:
    """Frames of one row have one newline; a third group in one frame takes that of the next frame."""
    layout = Layout.regular("video", 3, 1, 3, "row")
    plan = Plan(torch.tensor([0, 1, 2]), separators="per-group", groups=torch.tensor([0, 1, 2]))
    tokens, _ = reading_order(layout, plan)
    assert tokens.tolist() == [0, 3, 1, 7, 2, 11]


def test_separators_that_the_host_does_not_have() -> None:
    """They take the places of tokens that do not survive; the newline behind the video stays where it was."""
    layout = Layout.regular("video", 2, 1, 3, "end")
    plan = Plan(torch.tensor([0, 3, 5]), separators="per-frame", separator=torch.zeros(4))
    tokens, slots = reading_order(layout, plan)
    assert tokens.tolist() == [0, 2, 3, 5, 4, 6]
    assert slots.tolist() == [0, -2, 1, 2, -2, -1]
    full = Plan(torch.arange(6), separators="per-frame", separator=torch.zeros(4))
    assert reading_order(layout, full)[0].tolist() == [0, 1, 2, 3, 4, 5, 6], "nothing is left to give its place"
    plain = Plan(torch.tensor([0, 3, 5]), separators="per-frame")
    assert reading_order(layout, plain)[0].tolist() == [0, 3, 5, 6]


def test_groups_must_be_given_in_order() -> None:
    for groups in (None, torch.tensor([0]), torch.tensor([1, 0])):
        with pytest.raises(MethodError, match="toy wants a separator per group"):
            Plan(torch.tensor([0, 1]), separators="per-group", groups=groups).checked(4, "toy")


def test_separators_of_dropped_views_go() -> None:
    layout = Layout.regular("video", 2, 1, 2, "row")
    tokens, _ = reading_order(layout, Plan(torch.tensor([2, 3]), views=torch.tensor([1])))
    assert tokens.tolist() == [3, 4, 5]


def test_order_of_a_method_is_kept_without_row_separators() -> None:
    layout = Layout.regular("video", 2, 1, 2, "end")
    tokens, slots = reading_order(layout, Plan(torch.tensor([2, 0])))
    assert tokens.tolist() == [2, 0, 4]
    assert slots.tolist() == [0, 1, -1]


@pytest.mark.parametrize("keep", [[], [0, 0], [4], [-1, 2]])
def test_impossible_plans_are_errors(keep: list[int]) -> None:
    with pytest.raises(MethodError, match="toy"):
        Plan(torch.tensor(keep, dtype=torch.long)).checked(4, "toy")


def test_views_of_an_image_join() -> None:
    layout = Layout.from_cells(
        "image", [(1, 2), (1, 3)], torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 0, 3]])
    )
    assert layout.is_patch.tolist() == [True] * 5 + [False]
    merged = MergeMap(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    plans = [Plan(torch.tensor([1]), merged=merged), Plan(torch.tensor([0, 2]), merged=merged)]
    joined = join_views(layout, plans)
    assert joined.keep.tolist() == [1, 2, 4]
    assert joined.merged is not None
    assert joined.merged.source.tolist() == [0, 1, 2, 3]
    assert joined.merged.target.tolist() == [0, 0, 1, 1]


def test_text_between_frames_stays_between_them() -> None:
    """Positions: text 0, frame 1-2, text 3, frame 4-5, text 6; the method puts the second frame first."""
    real = torch.ones(7, dtype=torch.bool)
    placement = Placement(torch.tensor([1, 2, 4, 5]), torch.tensor([3, 1]))
    assert arrange_row(real, [placement]).tolist() == [0, 2, 3, 5, 6]
    together = Placement(torch.tensor([1, 2, 3, 4]), torch.tensor([3, 1]))
    assert arrange_row(real, [together]).tolist() == [0, 4, 2, 5, 6]


def test_padding_goes_to_the_asked_side() -> None:
    rows = [torch.tensor([0, 2]), torch.tensor([0, 1, 3])]
    left = pad_rows(rows, 4, left=True)
    assert left.real.tolist() == [[False, True, True], [True, True, True]]
    assert left.removed == 1
    right = pad_rows(rows, 4, left=False)
    assert right.index[0, :2].tolist() == [0, 2]
    assert not right.real[0, 2]


def test_gathering_follows_the_index() -> None:
    index = torch.tensor([[0, 2], [1, 2]])
    values = torch.arange(6).view(2, 3, 1)
    assert gather_sequence(values, index)[..., 0].tolist() == [[0, 2], [4, 5]]
    assert gather_sequence(values[:1], index)[..., 0].tolist() == [[0, 2], [1, 2]]
    assert gather_positions(torch.arange(3)[None], index).tolist() == [[0, 2], [1, 2]]
    axes = torch.arange(9).view(3, 1, 3)
    assert gather_positions(axes, index)[2].tolist() == [[6, 8], [7, 8]]


def test_renumbering_starts_where_the_row_started() -> None:
    compaction = pad_rows([torch.tensor([1, 3]), torch.tensor([0, 1, 2])], 4, left=True)
    positions = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
    assert renumbered(positions, compaction).tolist() == [[0, 0, 1], [0, 1, 2]]


def test_identity_changes_nothing() -> None:
    same = identity(torch.ones(2, 3, dtype=torch.bool))
    assert same.is_identity
    assert same.removed == 0


def test_deepstack_planes_are_ranked_anew() -> None:
    visual = torch.tensor([[False, True, True, True], [True, False, True, False]])
    plane = torch.arange(5.0)[:, None]
    compaction = pad_rows([torch.tensor([0, 2, 3]), torch.tensor([1, 2])], 4, left=True)
    (moved,), mask = gather_planes([plane], visual, compaction)
    assert moved[:, 0].tolist() == [1.0, 2.0, 4.0]
    assert mask.tolist() == [[False, True, True], [False, False, True]]
