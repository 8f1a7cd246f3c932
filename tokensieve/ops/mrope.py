"""Temporal / height / width positions of pruned media as a serving engine numbers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokensieve.errors import MethodError


def media_positions(
    grid: Sequence[int], merge: int = 2, *, tokens_per_second: float = 1.0, seconds_per_grid: float = 1.0
) -> Tensor:
    """Position table of one video or image as if it stood at the beginning of the prompt.

    Parameters
    ----------
    grid : sequence of int
        Temporal steps, rows and columns of the encoder's patch grid, before spatial merging.
    merge : int
        Spatial merge size; rows and columns are divided by it (rounded down).
    tokens_per_second, seconds_per_grid : float
        Their product is the distance of two steps on the temporal axis.

    Returns
    -------
    Tensor
        ``[T * h * w, 4]`` int64: temporal, row and column position, and the merged grid width w.
    """
    steps, rows, columns = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    step, row, column = torch.meshgrid(torch.arange(steps), torch.arange(rows), torch.arange(columns), indexing="ij")
    time = (step * (tokens_per_second * seconds_per_grid)).long()
    return torch.stack((time, row, column, torch.full_like(row, columns)), dim=-1).flatten(0, 2)


def engine_positions(
    ids: Tensor, tables: Sequence[Tensor], positions: Tensor, *, vision_start: int, media_ids: Sequence[int]
) -> tuple[Tensor, int]:
    """Positions of a prompt whose media have been pruned, by the rules of the vLLM engine.

    Kept media tokens take their row of the table plus a base, the position after the vision-start token. Text
    behind an item goes on consecutively, at ``base + w`` for tables with the width in their fourth channel
    (which may lie below the largest temporal position), and behind the largest position for tables with five
    channels, whose span also holds timestamps and vision-start and vision-end tokens.

    Parameters
    ----------
    ids : Tensor
        ``[L]`` token ids of the already shortened prompt.
    tables : sequence of Tensor
        ``[n, 4]`` or ``[n, 5]`` int64 kept rows of every item in prompt order. Five channels are temporal,
        row, column, is-vision-start and is-vision; such a table covers every token of its span.
    positions : Tensor
        ``[3, L]`` int64 positions before; those in front of the first item stay.
    vision_start : int
        Id of the token in front of the media tokens.
    media_ids : sequence of int
        Ids of the placeholder tokens of images and videos.

    Returns
    -------
    positions : Tensor
        ``[3, L]`` int64.
    delta : int
        Largest position plus one, minus L: what decoding adds to the index of a new token.

    Raises
    ------
    MethodError
        If a table does not fit the placeholders of the prompt.
    """
    total = ids.numel()
    out = positions.clone()
    is_media = torch.isin(ids, torch.tensor(list(media_ids), device=ids.device))
    cursor = 0
    for number, table in enumerate(tables):
        with_text = table.shape[1] == 5
        starts = (ids[cursor:] == vision_start).nonzero().flatten()
        if not with_text:
            starts = starts[starts + cursor + 1 < total]
            starts = starts[is_media[starts + cursor + 1]]
        if starts.numel() == 0 or table.shape[0] == 0:
            raise MethodError(f"The prompt has no vision-start token for media item {number} of {len(tables)}.")
        first = cursor + int(starts[0])
        first = first - int(table[:, 3].argmax()) if with_text else first + 1
        end = first + table.shape[0]
        wanted = table[:, 4].bool() if with_text else torch.ones(table.shape[0], dtype=torch.bool)
        if first < cursor or end > total or not torch.equal(is_media[first:end], wanted.to(is_media.device)):
            raise MethodError(
                f"The {table.shape[0]} rows of media item {number} do not match the placeholders from token {first} "
                "on; pass the rows of the kept tokens only."
            )
        base = int(out[-1, first - 1]) + 1 if first else 0
        out[:, first:end] = table[:, :3].T.to(out) + base
        follow = base + (int(table[:, :3].max()) + 1 if with_text else int(table[0, 3]))
        out[:, end:] = torch.arange(follow, follow + total - end, device=out.device)
        cursor = end
    return out, int(out.max()) + 1 - total
