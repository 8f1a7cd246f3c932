"""What became of every patch: from the trace of an item to one grid per view and state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokensieve.core.trace import ItemTrace

__all__ = ["CellState", "Cells", "State", "states"]


class CellState(IntEnum):
    """What became of a patch.

    ``KEPT`` is a token of its own, ``MERGED`` was folded into another, ``LEFT`` entered the LLM and did not go
    on behind a cut, ``DROPPED`` never entered, ``ABSENT`` was left out by the model's own processor before
    any method ran.
    """

    KEPT = 0
    MERGED = 1
    LEFT = 2
    DROPPED = 3
    ABSENT = 4


@dataclass(frozen=True)
class Cells:
    """The patches of one view.

    Attributes
    ----------
    state : ndarray [rows, columns], int8
        A `CellState` each.
    group : ndarray [rows, columns], int64
        Which token the patch is part of when that token was made from several patches, else -1. Numbers
        are shared by all views of an item.
    """

    state: NDArray[np.int8]
    group: NDArray[np.int64]

    def count(self, state: CellState) -> int:
        """Number of patches in a state."""
        return int((self.state == state).sum())

    @property
    def patches(self) -> int:
        """Number of patches that the uncompressed model reads."""
        return self.state.size - self.count(CellState.ABSENT)


@dataclass(frozen=True)
class State:
    """All views at one point of the way through the model.

    Attributes
    ----------
    layer
        Decoder layer from which on it holds, counted from zero.
    name
        ``"Enters the LLM"`` or ``"From layer 3"``.
    views
        One grid per view.
    """

    layer: int
    name: str
    views: list[Cells]

    @property
    def kept(self) -> list[int]:
        """Tokens of every view."""
        return [view.count(CellState.KEPT) for view in self.views]

    def count(self, state: CellState) -> int:
        """Number of patches of all views in a state."""
        return sum(view.count(state) for view in self.views)


def states(item: ItemTrace) -> list[State]:
    """The item in front of the LLM and behind every cut inside of it, in order.

    Parameters
    ----------
    item : ItemTrace
        Trace of one video or image.
    """
    layout = item.layout
    group = _groups(item)
    entered = np.full(layout.patches, CellState.DROPPED, np.int8)
    if item.merged is not None:
        entered[_numbers(item.merged.source)] = CellState.MERGED
    entered[_numbers(item.keep)] = CellState.KEPT
    found = [State(0, "Enters the LLM", _grids(item, entered, group))]
    for layer in sorted(item.decoder):
        alive = np.zeros(layout.patches, bool)
        alive[_numbers(item.decoder[layer])] = True
        now = entered.copy()
        now[(entered == CellState.KEPT) & ~alive] = CellState.LEFT
        # A folded patch goes the way of the token that it is part of.
        target = np.full(layout.patches, -1)
        member = (group >= 0) & (entered == CellState.MERGED)
        target[member] = _numbers(item.keep)[group[member]]
        now[member & ~alive[target]] = CellState.LEFT
        found.append(State(layer, f"From layer {layer}", _grids(item, now, group)))
    return found


def _numbers(values: Tensor) -> NDArray[Any]:
    """A tensor of any device and type as an array (numpy has no bfloat16)."""
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _groups(item: ItemTrace) -> NDArray[np.int64]:
    """Place in ``keep`` of the token that each patch is part of [n]; -1 for tokens of one patch."""
    group = np.full(item.layout.patches, -1, np.int64)
    if item.merged is None:
        return group
    source, target, weight = (_numbers(part) for part in item.merged)
    # The heaviest contribution is written last.
    order = np.argsort(weight, kind="stable")
    group[source[order]] = target[order]
    keep = _numbers(item.keep)
    folded = np.ones(item.layout.patches, bool)
    folded[keep] = False
    several = np.zeros(keep.size, bool)
    several[group[folded & (group >= 0)]] = True
    group[keep] = np.where(several, np.arange(keep.size), -1)
    return group


def _grids(item: ItemTrace, state: NDArray[np.int8], group: NDArray[np.int64]) -> list[Cells]:
    """Values of patches laid out on the grids of their views."""
    layout = item.layout
    tokens = layout.patch_tokens
    sizes = np.array([rows * columns for rows, columns in layout.views])
    starts = np.concatenate(([0], sizes.cumsum()))
    columns = np.array([grid[1] for grid in layout.views])
    view, row, column = (_numbers(part[tokens]) for part in (layout.view, layout.row, layout.column))
    place = starts[view] + row * columns[view] + column
    states_flat = np.full(starts[-1], CellState.ABSENT, np.int8)
    groups_flat = np.full(starts[-1], -1, np.int64)
    states_flat[place], groups_flat[place] = state, group
    return [
        Cells(states_flat[start : start + size].reshape(grid), groups_flat[start : start + size].reshape(grid))
        for start, size, grid in zip(starts, sizes, layout.views, strict=False)
    ]
