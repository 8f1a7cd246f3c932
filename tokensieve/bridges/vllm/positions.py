"""Positions on three axes of prompts whose videos were pruned.

Text positions follow from geometry: behind a video the text goes on where it would without pruning. They are
therefore right from the beginning, also when the prefix cache holds the video and its embeddings are never seen
again. The positions of the visual tokens depend on which were kept; they travel with the embeddings as extra
channels and are filled in when the engine gathers these, chunk by chunk.

A channel holds one digit to the base 128, so that bfloat16 and float16 carry it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import HostError

BASE = 128
DIGITS = 3
FIELDS = 5
CHANNELS = FIELDS * DIGITS
"""Extra channels behind an embedding: time, row, column, index in the item, and the item's leading text tokens."""


def to_channels(positions: Tensor, lead: int, like: Tensor) -> Tensor:
    """Digits of the positions of one item, to be put behind its embeddings.

    Parameters
    ----------
    positions : Tensor [3, n]
        Positions of its tokens, counted from its own beginning.
    lead
        Number of its tokens in front of its first placeholder in the prompt (a timestamp and a marker).
    like : Tensor
        Gives dtype and device.

    Returns
    -------
    Tensor [n, CHANNELS]
    """
    count = positions.shape[1]
    index = torch.arange(count)
    numbers = torch.stack((*positions.cpu().long().unbind(0), index, torch.full_like(index, lead)), 1)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < BASE**DIGITS:
        raise HostError(f"A video position of {int(numbers.max())} is too large; shorten the video.")
    digits = [(numbers // BASE**power) % BASE for power in range(DIGITS)]
    return torch.stack(digits, -1).flatten(1).to(like)


def from_channels(channels: Tensor) -> Tensor:
    """The numbers [n, FIELDS] that `to_channels` wrote, int64 on the CPU."""
    digits = channels.detach().cpu().float().round().long().unflatten(1, (FIELDS, DIGITS))
    return (digits * BASE ** torch.arange(DIGITS)).sum(-1)


@dataclass(frozen=True)
class _Item:
    """A visual item at its place in a prompt that was not pruned."""

    feature: Any
    tokens: list[int]
    pruned: int
    start: int


def prompt_positions(
    whole: Callable[[list[int], list[Any]], tuple[Tensor, int]],
    prompt: Sequence[int],
    features: Sequence[Any],
    unpruned: Callable[[Any], list[int] | None],
) -> tuple[Tensor, int]:
    """Positions of a prompt whose videos are shorter than their grids.

    Parameters
    ----------
    whole
        The engine's function from ids and items to positions, for prompts that are not pruned.
    prompt
        Ids with pruned videos.
    features
        Visual items with their places in the prompt.
    unpruned
        Ids that an item would have without pruning, None for items that are never pruned.

    Returns
    -------
    positions : Tensor [3, L]
        Right for text; visual tokens get theirs from `fill_positions`.
    delta
        What the engine adds to the number of a later token to get its position.
    """
    ids: list[int] = []
    items: list[_Item] = []
    cursor = 0
    for feature in sorted(features, key=lambda item: item.mm_position.offset):
        place = feature.mm_position
        ids += prompt[cursor : place.offset]
        own = list(prompt[place.offset : place.offset + place.length])
        full = unpruned(feature)
        items.append(_Item(feature, own if full is None else full, place.length, len(ids)))
        ids += items[-1].tokens
        cursor = place.offset + place.length
    ids += prompt[cursor:]
    moved = [
        replace(item.feature, mm_position=replace(item.feature.mm_position, offset=item.start, length=len(item.tokens)))
        for item in items
    ]
    positions, _ = whole(ids, moved)
    keep = torch.ones(len(ids), dtype=torch.bool)
    for item in items:
        keep[item.start + item.pruned : item.start + len(item.tokens)] = False
    return positions[:, keep], int(positions.max()) + 1 - len(prompt)


def fill_positions(
    prompt: Sequence[int],
    chunks: Sequence[Tensor],
    positions: Tensor,
    computed: int,
    placeholders: Sequence[int],
) -> Tensor:
    """Put in the positions of visual tokens whose embeddings are about to be read.

    Parameters
    ----------
    prompt
        All ids of the prompt.
    chunks
        Digits [n, CHANNELS] of every item, or part of an item, that stands in this prefill chunk, in prompt order.
    positions : Tensor [3, L]
        So far.
    computed
        Number of tokens that were computed before; a part that does not begin its item begins here.
    placeholders
        Ids of the placeholders.

    Returns
    -------
    Tensor [3, L]
        A copy with the items filled in.
    """
    positions = positions.clone()
    cursor = computed
    for chunk in chunks:
        numbers = from_channels(chunk)
        if numbers.shape[0] == 0:
            continue
        first, lead = int(numbers[0, 3]), int(numbers[0, 4])
        if first:
            start = cursor - first
        else:
            start = next(i for i in range(cursor, len(prompt)) if prompt[i] in placeholders) - lead
        base = int(positions[:, start - 1].max()) + 1 if start else 0
        begin, end = start + first, start + first + numbers.shape[0]
        positions[:, begin:end] = numbers[:, :3].T.to(positions) + base
        cursor = end
    return positions
