"""Geometry of one visual item: where each of its tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

ItemKind = Literal["video", "image"]
Separators = Literal["none", "row", "end"]


@dataclass(frozen=True)
class Layout:
    """Every token of one visual item (a video or an image) in the order in which the LLM reads it.

    An item is a list of *views*: the frames of a video (temporal grid steps for the Qwen family), or the
    base picture and the high-resolution mosaic of an any-resolution image. Tokens that are not patches
    (newline embeddings) are *separators*; no method ever scores them.

    Attributes
    ----------
    kind
        ``"video"`` or ``"image"``.
    views
        Grid of each view as ``(rows, columns)``; a patch of view ``v`` lies inside ``views[v]``.
    view, row, column : Tensor [T]
        Source cell of every token, int64 on the CPU. A row separator carries its view and row and the
        column just behind the grid; a separator that belongs to no view has view -1.
    is_patch : Tensor [T]
        True for patches, False for separators.
    """

    kind: ItemKind
    views: tuple[tuple[int, int], ...]
    view: Tensor
    row: Tensor
    column: Tensor
    is_patch: Tensor

    @classmethod
    def regular(cls, kind: ItemKind, frames: int, rows: int, columns: int, separators: Separators = "none") -> Layout:
        """Equal grids, frame-major and row-major, with no separators, one behind each row, or one at the end."""
        width = columns + 1 if separators == "row" else columns
        view, row, column = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(width), indexing="ij")
        view, row, column = view.flatten(), row.flatten(), column.flatten()
        if separators == "end":
            outside = torch.tensor([-1])
            view, row, column = (torch.cat((x, outside)) for x in (view, row, column))
        is_patch = (column >= 0) & (column < columns)
        return cls(kind, ((rows, columns),) * frames, view, row, column, is_patch)

    @classmethod
    def from_cells(cls, kind: ItemKind, views: Sequence[tuple[int, int]], cells: Tensor) -> Layout:
        """From ``cells [T, 3]`` of (view, row, column); a column behind its grid or a view of -1 separates."""
        view, row, column = cells.long().cpu().unbind(-1)
        columns = torch.tensor([v[1] for v in views] + [0])
        return cls(kind, tuple(views), view, row, column, (view >= 0) & (column < columns[view]))

    @property
    def tokens(self) -> int:
        """Number of tokens, separators included."""
        return self.view.numel()

    @cached_property
    def patch_tokens(self) -> Tensor:
        """Token index of every patch, ascending [n]."""
        return self.is_patch.nonzero().flatten()

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.patch_tokens.numel()

    @cached_property
    def patch_view(self) -> Tensor:
        """View of every patch [n]."""
        return self.view[self.patch_tokens]

    @property
    def has_row_separators(self) -> bool:
        """Whether separators stand between the patches (the LLaVA-Video layout)."""
        return bool((~self.is_patch & (self.view >= 0)).any())

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every view has the same full grid, so that features can be viewed as [frames, patches, D]."""
        return len(set(self.views)) == 1 and self.patches == sum(rows * columns for rows, columns in self.views)

    @cached_property
    def patches_per_view(self) -> Tensor:
        """Number of patches of every view, int64 [views]."""
        return torch.bincount(self.patch_view, minlength=len(self.views))

    def of_views(self, keep: Tensor) -> tuple[Layout, Tensor]:
        """The item with only some of its views (ascending), and the token ids it consists of.

        Separators that belong to no view stay.
        """
        renumbered = torch.full((len(self.views) + 1,), -1)
        renumbered[keep] = torch.arange(keep.numel())
        tokens = ((renumbered[self.view] >= 0) | (self.view < 0)).nonzero().flatten()
        view = torch.where(self.view[tokens] < 0, -1, renumbered[self.view[tokens]])
        views = tuple(self.views[i] for i in keep.tolist())
        part = Layout(self.kind, views, view, self.row[tokens], self.column[tokens], self.is_patch[tokens])
        return part, tokens

    def of_tokens(self, tokens: Tensor) -> Layout:
        """The item with only some of its tokens (ascending), for hosts that leave tokens out by themselves."""
        return Layout(
            self.kind,
            self.views,
            self.view[tokens],
            self.row[tokens],
            self.column[tokens],
            self.is_patch[tokens],
        )

    def of_view(self, index: int) -> Layout:
        """The patches of one view as an item of its own (separators are left out)."""
        part, _ = self.of_views(torch.tensor([index]))
        return part.of_tokens(part.patch_tokens)
