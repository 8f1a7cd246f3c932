"""Controls that every table must hold: no compression, random, uniform, fewer frames, mean pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Selector, Stage
from tokensieve.core.plan import MergeMap, Plan, keep_all
from tokensieve.core.registry import register
from tokensieve.core.sample import FrameSample, TokenSample
from tokensieve.ops.allocate import keep_count


@register
@dataclass
class NoCompression(Method):
    """Keeps every token; measures the machinery itself."""

    retention: float = 1.0

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "No compression"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "none"
    causal: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "control"

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """All tokens."""
        return keep_all(sample.layout.patches, self.position_policy)

    def token_count(self, layout: Layout) -> int:
        """All patches."""
        return layout.patches


@register
@dataclass
class RandomTokens(Selector):
    """A uniformly random subset of the tokens of an item, the same for the same seed.

    Parameters
    ----------
    seed
        Seed of the draw; item ``i`` of a prompt uses ``seed + i``.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random tokens"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    fidelity: ClassVar[Fidelity] = "control"

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """Draw without replacement on the CPU, so that every device draws alike."""
        generator = torch.Generator().manual_seed(self.seed + sample.index)
        return torch.randperm(sample.layout.patches, generator=generator)[:count].sort().values


@register
@dataclass
class UniformTokens(Selector):
    """Every n-th token of an item in reading order."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "Uniform stride"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    fidelity: ClassVar[Fidelity] = "control"

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """The middles of ``count`` equal stretches."""
        return middles(sample.layout.patches, count)


@register
@dataclass
class FrameSubsample(Method):
    """Evenly spaced frames with all their tokens; the frames left out are not encoded where the host allows it."""

    name: ClassVar[str] = "frame-subsample"
    title: ClassVar[str] = "Frame subsampling"
    stages: ClassVar[tuple[Stage, ...]] = ("frames",)
    fidelity: ClassVar[Fidelity] = "control"

    def signals(self, facts: object) -> tuple[str, ...]:
        """Only the number of frames."""
        return ("frames.count",)

    def plan_frames(self, sample: FrameSample) -> Tensor:
        """The middles of ``keep_count(frames)`` equal stretches of the clip."""
        return middles(sample.frames, keep_count(sample.frames, self.retention))

    def token_count(self, layout: Layout) -> int:
        """Tokens of the frames kept; pictures are not subsampled."""
        if layout.kind == "image":
            return layout.patches
        kept = middles(len(layout.views), keep_count(len(layout.views), self.retention))
        return sum(layout.views[i][0] * layout.views[i][1] for i in kept.tolist())


@register
@dataclass
class MeanPool(Method):
    """Average pooling inside each frame to a smaller grid.

    The grid of a frame is divided into ``rows x columns`` cells as equal as possible, with the cell counts
    chosen so that the number of cells comes closest to ``retention`` times the patches of the frame. A pooled
    token takes the place of the patch nearest to the middle of its cell.
    """

    name: ClassVar[str] = "mean-pool"
    title: ClassVar[str] = "Mean pooling"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    causal: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "control"
    uniform_views: ClassVar[bool] = True

    def token_count(self, layout: Layout) -> int:
        """Cells of all views."""
        return sum(a * b for a, b in (cells(*view, self.retention) for view in layout.views))

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Weighted scatter of every patch into its cell."""
        rows, columns = sample.layout.views[0]
        down, across = cells(rows, columns, self.retention)
        row_cell = torch.arange(rows) * down // rows
        column_cell = torch.arange(columns) * across // columns
        cell = (row_cell[:, None] * across + column_cell).flatten()
        size = torch.bincount(cell, minlength=down * across)
        middle = middles(rows, down)[:, None] * columns + middles(columns, across)
        frames = torch.arange(sample.frames)[:, None]
        keep = (frames * rows * columns + middle.flatten()).flatten()
        target = (frames * down * across + cell).flatten()
        weight = (1.0 / size[cell]).repeat(sample.frames)
        features = sample.features
        pooled = features.new_zeros(keep.numel(), features.shape[-1], dtype=torch.float32)
        scaled = features.float() * weight.to(features.device)[:, None]
        pooled = pooled.index_add(0, target.to(features.device), scaled).to(features.dtype)
        merged = MergeMap(torch.arange(sample.layout.patches), target, weight)
        return Plan(keep, pooled, merged, self.position_policy)


def middles(total: int, count: int) -> Tensor:
    """Middles of ``count`` equal stretches of ``range(total)``, ascending and distinct, int64 [count]."""
    return (torch.arange(count) * 2 + 1) * total // (2 * count)


def cells(rows: int, columns: int, retention: float) -> tuple[int, int]:
    """Rows and columns of the pooled grid whose size is nearest to ``retention * rows * columns``.

    Among equally near grids the one closest to the aspect of the picture is taken.
    """
    wanted = retention * rows * columns
    aspect = rows / columns

    def cost(grid: tuple[int, int]) -> tuple[float, float]:
        return abs(grid[0] * grid[1] - wanted), abs(grid[0] / grid[1] - aspect)

    return min(((a, b) for a in range(1, rows + 1) for b in range(1, columns + 1)), key=cost)
