"""Questions and answers as token rows, the way the chat template writes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from tokensieve.world.models import tokenizer
from tokensieve.world.questions import Question, count_of, questions
from tokensieve.world.scene import Scene
from tokensieve.world.words import COLOUR_NAMES, COUNTS, SHAPES

LIMITS: dict[str, int] = {"attributes": 4, "existence": 4, "spatial": 4}
"""Families with many questions per clip, and how many of them enter one training sequence."""

FOCUS: dict[str, int] = dict.fromkeys(("attributes", "existence", "spatial", "motion", "moment", "reading", "order"), 1)
"""The same while the families that are not named here are exercised."""

IGNORED = -100


@cache
def _words() -> PreTrainedTokenizerFast:
    return tokenizer()


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Tokens of a text without anything added."""
    return tuple(_words()(text, add_special_tokens=False)["input_ids"])


def opening() -> tuple[int, ...]:
    """Tokens before the video."""
    return token_ids("<|im_start|> user")


def turn(question: Question, opened: bool) -> tuple[list[int], list[int]]:
    """Tokens of one question with its answer, and the target of each position (:data:`IGNORED` where none).

    With ``opened`` the turn follows the video directly; otherwise it begins a new message of the user.
    """
    asked = [*(() if opened else opening()), *token_ids(question.text), *token_ids("<|im_end|> <|im_start|> assistant")]
    answered = [*token_ids(question.answer), *token_ids("<|im_end|>")]
    targets = [IGNORED] * (len(asked) - 1) + answered + [IGNORED]
    return asked + answered, targets


def choose(scene: Scene, number: int, rng: np.random.Generator, focus: bool = False) -> list[Question]:
    """Up to ``number`` different questions of a scene in random order, large families cut to their limit.

    With ``focus`` few questions of the easy families are asked, and two more colours are counted.
    """
    picked: list[Question] = []
    for family, found in questions(scene).items():
        if family == "one-frame" and scene.frames < 8:
            continue
        limit = (FOCUS if focus else LIMITS).get(family, len(found))
        picked += [found[int(i)] for i in rng.permutation(len(found))[:limit]]
    if focus:
        picked += _more_counts(scene, rng)
    return [picked[int(i)] for i in rng.permutation(len(picked))[:number]]


def _more_counts(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Two further colours to count, frequent ones first: left to chance most counts would be zero."""
    seen = Counter(thing.colour for thing in scene.things)
    unclear = {scene.counted} | {thing.later_colour for thing in scene.things if thing.changed}
    order = sorted((int(i) for i in rng.permutation(len(COLOUR_NAMES))), key=lambda colour: -seen[colour])
    asked = [colour for colour in order if colour not in unclear and seen[colour] < len(COUNTS)]
    return [count_of(scene, colour) for colour in asked[:2]]


@dataclass(frozen=True)
class Mention:
    """The token ``[clip, turn, position]`` that completes the name of an object, and its index in the scene or -1.

    ``before`` is the object that the same question names before it, -1 if none.
    """

    clip: int
    turn: int
    position: int
    thing: int
    before: int


@dataclass(frozen=True)
class Turns:
    """Token rows of a batch.

    ``ids`` and ``targets`` are ``int64 [B, K, L]`` for turns that do not see each other, or ``[B, 1, L]`` for one
    conversation; padding comes last and is ignored. ``families`` names the family of each ``[B, K]`` turn ("" where
    a clip has fewer). ``mentions`` says where the words speak of an object, in separate turns only.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    families: list[list[str]]
    mentions: tuple[Mention, ...] = ()


def separate(asked: list[list[Question]]) -> Turns:
    """Every question as the first one after the video."""
    rows = [[turn(question, True) for question in clip] for clip in asked]
    found = _packed(rows, [[question.family for question in clip] for clip in asked])
    mentions = (
        Mention(i, j, position, thing, before)
        for i, clip in enumerate(asked)
        for j, question in enumerate(clip)
        for position, thing, before in zip(_named(question), question.about, (-1, *question.about), strict=False)
    )
    return replace(found, mentions=tuple(mentions))


@cache
def _names() -> frozenset[int]:
    return frozenset(token for word in (*SHAPES, "object") for token in token_ids(word))


def _named(question: Question) -> list[int]:
    """Positions of the words that complete the names of the objects that a question mentions."""
    ids = token_ids(question.text)
    if question.family == "one-frame":
        return [ids.index(token_ids("flashes")[0])]
    return [i for i, token in enumerate(ids) if token in _names()] if question.about else []


def conversation(asked: list[list[Question]]) -> Turns:
    """All questions of a clip one after the other."""
    rows = []
    for clip in asked:
        parts = [turn(question, i == 0) for i, question in enumerate(clip)]
        rows.append([([t for ids, _ in parts for t in ids], [t for _, targets in parts for t in targets])])
    return _packed(rows, [["conversation"] for _ in asked])


def _packed(rows: list[list[tuple[list[int], list[int]]]], families: list[list[str]]) -> Turns:
    number = max(map(len, rows))
    length = max(len(ids) for clip in rows for ids, _ in clip)
    ids = torch.full((len(rows), number, length), _words().pad_token_id)
    targets = torch.full((len(rows), number, length), IGNORED)
    for i, clip in enumerate(rows):
        for j, (tokens, target) in enumerate(clip):
            ids[i, j, : len(tokens)] = torch.tensor(tokens)
            targets[i, j, : len(target)] = torch.tensor(target)
    return Turns(ids, targets, [names + [""] * (number - len(names)) for names in families])
