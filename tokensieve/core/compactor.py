"""The only code that changes the length of a sequence.

A prompt row is rearranged as a list of source positions; everything that must stay aligned with it (embeddings,
masks, positions, DeepStack planes, labels) is gathered with the same index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Placement:
    """Where the tokens of one item go.

    Attributes
    ----------
    positions : Tensor [T]
        Sequence positions of all its placeholders, ascending.
    tokens : Tensor [M]
        Item-local ids of the tokens that survive, in reading order.
    """

    positions: Tensor
    tokens: Tensor


@dataclass
class Compaction:
    """A rearrangement of a batch of sequences.

    Attributes
    ----------
    index : Tensor [B, L']
        Source position of every new position (any position for padding), int64 on the CPU.
    real : Tensor [B, L']
        True where a real token stands, False for padding.
    length
        Length L of the sequences before.
    """

    index: Tensor
    real: Tensor
    length: int

    @property
    def removed(self) -> int:
        """How much shorter the padded batch became."""
        return self.length - self.index.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return self.removed == 0 and bool((self.index == torch.arange(self.length)).all())


def arrange_row(real: Tensor, placements: Sequence[Placement]) -> Tensor:
    """Source positions of one row after compaction, padding left out.

    A survivor takes a place inside the run of placeholders that its source belongs to, so that text between
    frames (timestamps) stays where it was even when a method reorders the tokens of a frame.

    Parameters
    ----------
    real : Tensor [L]
        True for real tokens of the row.
    placements
        The visual items of the row.
    """
    text = real.clone()
    sources, keys = [], []
    for placement in placements:
        positions = placement.positions
        text[positions] = False
        breaks = torch.ones(positions.numel(), dtype=torch.long)
        breaks[1:] = (positions.diff() != 1).long()
        run = breaks.cumsum(0) - 1
        chosen_run = run[placement.tokens]
        order = torch.sort(chosen_run, stable=True).indices
        chosen_run = chosen_run[order]
        starts = positions[breaks.bool()]
        first = torch.searchsorted(chosen_run, chosen_run)
        sources.append(positions[placement.tokens[order]])
        keys.append(starts[chosen_run] + torch.arange(chosen_run.numel()) - first)
    plain = text.nonzero().flatten()
    source, key = torch.cat((plain, *sources)), torch.cat((plain, *keys))
    return source[key.argsort()]


def pad_rows(rows: Sequence[Tensor], length: int, left: bool) -> Compaction:
    """A compaction of ragged rows, padded on one side to the longest."""
    width = max(row.numel() for row in rows)
    index = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(width - row.numel(), width) if left else slice(0, row.numel())
        index[i, part] = row
        real[i, part] = True
    return Compaction(index, real, length)


def identity(real: Tensor) -> Compaction:
    """The compaction that changes nothing, padding included."""
    batch, length = real.shape
    return Compaction(torch.arange(length).expand(batch, -1).clone(), real, length)


def gather_sequence(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of ``tensor [B or 1, L, ...]`` at ``index [B, L']``."""
    index = index.to(tensor.device)
    if tensor.shape[0] == 1 and index.shape[0] == 1:
        return tensor.index_select(1, index[0])
    if tensor.shape[0] == 1:
        return tensor[0][index]
    return tensor[torch.arange(index.shape[0], device=tensor.device)[:, None], index]


def gather_positions(positions: Tensor, index: Tensor) -> Tensor:
    """``positions`` of shape [1 or B, L] or [axes, 1 or B, L] at ``index [B, L']``."""
    index = index.to(positions.device)
    batch = index.shape[0]
    if positions.ndim == 2:
        return positions.expand(batch, -1).gather(1, index)
    full = positions.expand(-1, batch, -1)
    return full.gather(2, index.expand(full.shape[0], -1, -1))


def gather_planes(
    planes: Sequence[Tensor], visual: Tensor, compaction: Compaction, patches: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """DeepStack planes [n, D] and their mask [B, L] after a compaction.

    Plane rows follow the True entries of the mask in row-major order, so they are re-ranked. Places outside of
    ``patches [B, L']`` get none: there a separator took the place of a patch.
    """
    visual_cpu = visual.cpu()
    rank = (visual_cpu.flatten().long().cumsum(0) - 1).view_as(visual_cpu)
    rows = torch.arange(visual_cpu.shape[0])[:, None]
    moved = visual_cpu[rows, compaction.index] & compaction.real
    moved = moved if patches is None else moved & patches
    chosen = rank[rows, compaction.index][moved]
    return [plane[chosen.to(plane.device)] for plane in planes], moved.to(visual.device)


def renumbered(positions: Tensor, compaction: Compaction) -> Tensor:
    """One-axis positions [B, L'] that count on without gaps from each row's first real position."""
    real = compaction.real.to(positions.device)
    gathered = gather_positions(positions, compaction.index)
    first = gathered.gather(1, real.long().argmax(1, keepdim=True))
    return ((real.long().cumsum(1) - 1) + first).masked_fill(~real, 0)
