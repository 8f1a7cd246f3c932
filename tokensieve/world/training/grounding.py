"""Auxiliary targets inside the language model: what each visual token sees, and what a mentioned object is like.

Answers about order, place and motion need these facts on the way. Found from answers alone they take many times longer
to learn, so two small heads that are dropped after the training ask for them directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tokensieve.world.models import POOLED, WIDTH
from tokensieve.world.scene import CELL, SIZE, Scene, Thing
from tokensieve.world.training.labels import CELL_WORDS, FATES
from tokensieve.world.training.turns import IGNORED, Mention, Turns
from tokensieve.world.words import COLOUR_NAMES, DIRECTIONS, SHAPES

TIMES = 8
"""Parts of a clip that the heads tell apart."""

SIGHTS = {
    "words": len(CELL_WORDS),
    "time": TIMES,
    "row": POOLED,
    "column": POOLED,
    "motion": 1 + len(DIRECTIONS),
    "fates": len(FATES),
}
FACTS = {
    "there": 2,
    "colour": len(COLOUR_NAMES),
    "later colour": len(COLOUR_NAMES),
    "shape": len(SHAPES),
    "time": TIMES,
    "row": POOLED,
    "column": POOLED,
    "motion": 1 + len(DIRECTIONS),
}

RELATIONS = ("changed", "later", "right", "below")
"""Of a named object: does its colour change, and how does it stand to the object that was named before."""


def relation_head() -> nn.Linear:
    """Head over the words that name objects, two classes for every relation."""
    return nn.Linear(WIDTH, 2 * len(RELATIONS))


def sight_head() -> nn.Linear:
    """Head over visual tokens."""
    head = nn.Linear(WIDTH, sum(SIGHTS.values()))
    # Few words apply to a cell; without this the first hundred steps only learn that.
    nn.init.constant_(head.bias[: SIGHTS["words"]], -4.5)
    return head


def fact_head() -> nn.Linear:
    """Head over the words that name objects."""
    return nn.Linear(WIDTH, sum(FACTS.values()))


def sight_loss(
    read: torch.Tensor, words: torch.Tensor, motion: torch.Tensor, fates: torch.Tensor, idx: torch.Tensor | None
) -> torch.Tensor:
    """How well each visual token knows when and where it is, how its content moved, and what was there before.

    Parameters
    ----------
    read
        Output of the head ``[B, M, S]``.
    words, motion, fates
        Targets ``[B, F, 36, W]``, ``[B, F, 36]`` and ``[B, F, 36, 3]``, see
        :func:`~tokensieve.world.training.labels.clip_targets`.
    idx
        Positions ``[B, M]`` of the tokens among all of the clip, or None for all; without some tokens the past is not
        asked for.
    """
    batch, frames, cells, _ = words.shape
    past, time, row, column, moved, fate = read.float().split(list(SIGHTS.values()), -1)
    at = torch.arange(frames * cells).expand(batch, -1) if idx is None else idx
    loss = F.cross_entropy(time.flatten(0, 1), (at // cells * TIMES // frames).flatten())
    loss = loss + F.cross_entropy(row.flatten(0, 1), (at % cells // POOLED).flatten())
    loss = loss + F.cross_entropy(column.flatten(0, 1), (at % POOLED).flatten())
    still_is_common = torch.tensor([0.05, *[1.0] * len(DIRECTIONS)])
    loss = loss + F.cross_entropy(moved.flatten(0, 1), motion.flatten(1).gather(1, at).flatten(), still_is_common)
    if idx is None:
        before = words[:, :-1].flatten(1, 2).float()
        each = F.binary_cross_entropy_with_logits(past[:, cells:], before, reduction="sum")
        loss = loss + 0.3 * each / before.sum().clamp(min=1)
        rare = torch.tensor([20.0, 60.0, 60.0])
        happened = fates[:, 1:].flatten(0, 2).float()
        loss = loss + 3 * F.binary_cross_entropy_with_logits(fate[:, cells:].flatten(0, 1), happened, pos_weight=rare)
        loss = loss + 3 * _flash_loss(fate[:, cells:, FATES.index("flashed")], words, fates)
    return loss


def _flash_loss(read: torch.Tensor, words: torch.Tensor, fates: torch.Tensor) -> torch.Tensor:
    """How well the tokens of cells that an object has just left tell one frame from longer; ``read`` is ``[B, M]``.

    Among all tokens these few hardly count, and every object that leaves would be taken for a flash.
    """
    there = words[..., CELL_WORDS.index("object")].bool()
    left = (there[:, :-1] & ~there[:, 1:]).flatten(1)
    flashed = fates[:, 1:, :, FATES.index("flashed")].flatten(1).float()
    # A clip has one flash, two or three longer events, and objects that move on to other cells.
    rare = torch.tensor(4.0)
    each = F.binary_cross_entropy_with_logits(read, flashed, pos_weight=rare, reduction="none")
    return (each * left).sum() / left.sum().clamp(min=1)


def fact_loss(
    read: torch.Tensor, mentions: Sequence[Mention], scenes: Sequence[Scene], weights: torch.Tensor
) -> torch.Tensor:
    """How well the word that completes an object's name knows the object.

    Parameters
    ----------
    read
        Output of the head for each mention ``[m, G]``.
    mentions
        Where they are.
    scenes
        What happens in each clip of the batch.
    weights
        How much each turn counts, ``[B, K]``.
    """
    if not mentions:
        return read.sum() * 0
    targets = torch.tensor([_facts(scenes[one.clip], one.thing) for one in mentions])
    return _asked(read.float().split(list(FACTS.values()), -1), targets, _of_mentions(weights, mentions))


def relation_loss(
    read: torch.Tensor, mentions: Sequence[Mention], scenes: Sequence[Scene], weights: torch.Tensor
) -> torch.Tensor:
    """How well the word that completes an object's name knows :data:`RELATIONS`; arguments as for :func:`fact_loss`."""
    if not mentions:
        return read.sum() * 0
    targets = torch.tensor([_relations(scenes[one.clip], one) for one in mentions])
    return _asked(read.float().split(2, -1), targets, _of_mentions(weights, mentions))


def pointer_loss(looks: torch.Tensor, turns: Turns, fates: torch.Tensor) -> torch.Tensor:
    """How well the word "flashes" looks at the token from which the flash can be known.

    That an object was there for one frame only shows in its cell one frame later. Left alone the model looks at the
    object itself, where all objects that have just appeared look alike.

    Parameters
    ----------
    looks
        Attention logits ``[m, M]`` from each mention to all visual tokens.
    turns
        Questions with mentions.
    fates
        ``[B, F, 36, 3]``, see :func:`~tokensieve.world.training.labels.clip_targets`.
    """
    left = fates[..., FATES.index("flashed")].flatten(1)
    rows, targets = [], []
    for row, one in enumerate(turns.mentions):
        if turns.families[one.clip][one.turn] == "one-frame" and bool(left[one.clip].any()):
            rows.append(row)
            targets.append(int(left[one.clip].argmax()))
    if not rows:
        return looks.sum() * 0
    return F.cross_entropy(looks[rows], torch.tensor(targets))


def _of_mentions(weights: torch.Tensor, mentions: Sequence[Mention]) -> torch.Tensor:
    return torch.stack([weights[one.clip, one.turn] for one in mentions])


def _asked(parts: Sequence[torch.Tensor], targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of the weighted cross-entropies of ``[m, classes]`` parts against the columns of ``targets [m, parts]``."""
    total = parts[0].sum() * 0
    for part, target in zip(parts, targets.unbind(1), strict=True):
        each = F.cross_entropy(part, target, ignore_index=IGNORED, reduction="none")
        total = total + (each * weights).sum() / (weights * (target != IGNORED)).sum().clamp(min=1)
    return total


def _relations(scene: Scene, mention: Mention) -> list[int]:
    """One target for every entry of :data:`RELATIONS`; ignored where nothing is to be compared."""
    if mention.thing < 0:
        return [IGNORED] * len(RELATIONS)
    thing = scene.things[mention.thing]
    # Most objects never change; asked about all of them, the head would learn to say so.
    found = [int(thing.changed) if mention.thing in scene.watched else IGNORED]
    if mention.before < 0:
        return found + [IGNORED] * (len(RELATIONS) - 1)
    other = scene.things[mention.before]
    later = int(thing.first > other.first) if thing.first != other.first else IGNORED
    across, down = (mine - theirs for mine, theirs in zip(thing.start, other.start, strict=True))
    apart = [int(gap > 0) if abs(gap) >= CELL else IGNORED for gap in (across, down)]
    return [*found, later, *(apart if thing.role == other.role == "still" else [IGNORED] * 2)]


def _facts(scene: Scene, index: int) -> list[int]:
    """One target for every entry of :data:`FACTS`."""
    if index < 0:
        return [0] + [IGNORED] * (len(FACTS) - 1)
    thing = scene.things[index]
    across, down = thing.velocity
    column, row = (min(max(int(c), 0), SIZE - 1) // CELL for c in thing.start)
    place = [IGNORED, IGNORED] if across or down else [row, column]
    return [
        1,
        thing.colour,
        thing.later_colour,
        thing.shape,
        thing.first * TIMES // scene.frames,
        *place,
        _motion(thing),
    ]


def _motion(thing: Thing) -> int:
    """0 for none, otherwise one more than the index into ``DIRECTIONS``."""
    across, down = thing.velocity
    if across:
        return 1 if across < 0 else 2
    if down:
        return 3 if down < 0 else 4
    return 0
