"""What became of every patch, from hand-made traces."""

from __future__ import annotations

import numpy as np
import torch
from view_items import item, merge_map

from tokensieve.core.layout import Layout
from tokensieve.core.trace import ItemTrace
from tokensieve.view.cells import CellState, states
from tokensieve.view.data import join_items

KEPT, MERGED, LEFT, DROPPED, ABSENT = CellState


def test_kept_and_dropped_lie_on_the_grid_of_their_view() -> None:
    (state,) = states(item(2, 2, 3, keep=[0, 4, 11]))
    assert state.name == "Enters the LLM" and state.layer == 0
    assert state.views[0].state.tolist() == [[KEPT, DROPPED, DROPPED], [DROPPED, KEPT, DROPPED]]
    assert state.views[1].state.tolist() == [[DROPPED] * 3, [DROPPED, DROPPED, KEPT]]
    assert state.kept == [2, 1]
    assert all((view.group == -1).all() for view in state.views)


def test_folded_patches_carry_the_number_of_their_token() -> None:
    merged = merge_map((0, 0, 0.5), (1, 0, 0.25), (6, 0, 0.25), (2, 1, 1.0))
    (state,) = states(item(2, 2, 3, keep=[0, 2], merged=merged))
    assert state.views[0].state.tolist() == [[KEPT, MERGED, KEPT], [DROPPED] * 3]
    assert state.views[0].group.tolist() == [[0, 0, -1], [-1, -1, -1]]
    # A patch of the next frame may be folded into a token of the first.
    assert state.views[1].group.tolist() == [[0, -1, -1], [-1, -1, -1]]


def test_a_patch_in_several_tokens_belongs_to_the_heaviest() -> None:
    merged = merge_map((0, 0, 0.9), (1, 0, 0.1), (2, 1, 0.4), (1, 1, 0.6))
    (state,) = states(item(1, 1, 3, keep=[0, 2], merged=merged))
    assert state.views[0].group.tolist() == [[-1, 1, 1]]


def test_half_precision_weights_are_read() -> None:
    merged = merge_map((0, 0, 0.5), (1, 0, 0.5))
    half = merged._replace(weight=merged.weight.bfloat16())
    assert states(item(1, 1, 2, keep=[0], merged=half))[0].views[0].state.tolist() == [[KEPT, MERGED]]


def test_keep_in_another_order_does_not_mix_up_groups() -> None:
    merged = merge_map((3, 0, 0.5), (2, 0, 0.5), (0, 1, 0.5), (1, 1, 0.5))
    (state,) = states(item(1, 1, 4, keep=[3, 0], merged=merged))
    assert state.views[0].state.tolist() == [[KEPT, MERGED, MERGED, KEPT]]
    assert state.views[0].group.tolist() == [[1, 1, 0, 0]]


def test_cuts_follow_in_the_order_of_their_layers() -> None:
    merged = merge_map((0, 0, 0.5), (1, 0, 0.5), (2, 1, 0.5), (3, 1, 0.5), (5, 2, 1.0))
    decoder = {5: torch.tensor([2]), 3: torch.tensor([2, 5])}
    found = states(item(1, 1, 6, keep=[0, 2, 5], merged=merged, decoder=decoder))
    assert [(state.layer, state.name) for state in found] == [
        (0, "Enters the LLM"),
        (3, "From layer 3"),
        (5, "From layer 5"),
    ]
    assert found[0].views[0].state.tolist() == [[KEPT, MERGED, KEPT, MERGED, DROPPED, KEPT]]
    # Patch 1 was folded into patch 0 and leaves with it.
    assert found[1].views[0].state.tolist() == [[LEFT, LEFT, KEPT, MERGED, DROPPED, KEPT]]
    assert found[2].views[0].state.tolist() == [[LEFT, LEFT, KEPT, MERGED, DROPPED, LEFT]]
    assert [state.kept for state in found] == [[3], [2], [1]]


def test_tokens_that_the_processor_left_out_are_absent() -> None:
    whole = Layout.regular("video", 2, 1, 3)
    layout = whole.of_tokens(torch.tensor([0, 1, 2, 4]))
    (state,) = states(ItemTrace(0, 0, layout, torch.tensor([1, 3]), 0))
    assert state.views[1].state.tolist() == [[ABSENT, KEPT, ABSENT]]
    assert [view.patches for view in state.views] == [3, 1]


def test_separators_take_no_cell() -> None:
    for separators in ("row", "end"):
        layout = Layout.regular("video", 2, 2, 2, separators)
        (state,) = states(ItemTrace(0, 0, layout, torch.arange(8), 4))
        assert all(view.state.tolist() == [[KEPT] * 2] * 2 for view in state.views)


def test_views_of_different_sizes() -> None:
    base, mosaic = Layout.regular("image", 1, 1, 2), Layout.regular("image", 1, 2, 3, "row")
    cells = [torch.stack((part.view + i, part.row, part.column), 1) for i, part in enumerate((base, mosaic))]
    layout = Layout.from_cells("image", [(1, 2), (2, 3)], torch.cat(cells))
    (state,) = states(ItemTrace(0, 0, layout, torch.tensor([1, 2, 7]), 2))
    assert state.views[0].state.tolist() == [[DROPPED, KEPT]]
    assert state.views[1].state.tolist() == [[KEPT, DROPPED, DROPPED], [DROPPED, DROPPED, KEPT]]


def test_images_joined_keep_their_own_patches() -> None:
    merged = merge_map((0, 0, 0.5), (1, 0, 0.5))
    first = item(1, 1, 2, keep=[0], kind="image", merged=merged, info={"score": 1.0})
    cut = item(1, 2, 2, keep=[0, 3], kind="image", merged=merge_map((3, 1, 0.5), (2, 1, 0.5)))
    cut.decoder = {2: torch.tensor([3])}
    joined = join_items([first, cut])
    found = states(joined)
    assert joined.layout.views == ((1, 2), (2, 2)) and joined.info == {"picture0.score": 1.0}
    assert found[0].views[0].state.tolist() == [[KEPT, MERGED]]
    assert found[0].views[1].state.tolist() == [[KEPT, DROPPED], [MERGED, KEPT]]
    assert found[0].views[1].group.tolist() == [[-1, -1], [2, 2]]
    # The first image was not cut, so all of it goes on.
    assert found[1].views[0].state.tolist() == [[KEPT, MERGED]]
    assert found[1].views[1].state.tolist() == [[LEFT, DROPPED], [MERGED, KEPT]]
    assert join_items([first]) is first


def test_every_state_counts_every_patch_once() -> None:
    trace = item(5, 4, 4, merged=merge_map((0, 0, 0.5), (1, 0, 0.5)), decoder={2: torch.tensor([0, 3])})
    for state in states(trace):
        assert sum(state.count(one) for one in CellState) == trace.layout.patches
        assert np.concatenate([view.state.ravel() for view in state.views]).dtype == np.int8
