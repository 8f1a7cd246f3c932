"""Dense targets of single frames for the training of the image tower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokensieve.world.models import GRID, PATCH, POOLED
from tokensieve.world.scene import CELL, Scene
from tokensieve.world.words import COLOUR_NAMES, DIGITS, SHAPES, SIGNS

CELL_WORDS: tuple[str, ...] = tuple(dict.fromkeys((*COLOUR_NAMES, *SHAPES, *DIGITS, *SIGNS, "object", "sign")))
"""Words that a pooled token may carry."""

_WORD = {word: i for i, word in enumerate(CELL_WORDS)}

PHRASES: tuple[str, ...] = (
    *(f"{colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPES),
    *(f"{panel} sign with {digit}" for panel in SIGNS for digit in DIGITS),
    "empty background",
)
"""What a patch may show; the last entry is nothing."""

TEMPLATES: tuple[str, ...] = (
    "a {}",
    "the {}",
    "a {} on a background",
    "a picture of a {}",
    "a frame with a {}",
    "where is the {}?",
    "is there a {}?",
    "which way does the {} move?",
    "in which quarter does the {} appear?",
    "when does the {} appear?",
    "tell me what the {} does",
)
"""Sentences around a phrase, so that the text tower also understands questions about one thing."""


@dataclass(frozen=True)
class FrameLabels:
    """Targets of one frame.

    ``words`` is ``float32 [36, len(CELL_WORDS)]``, ``patches`` ``int64 [144]`` with indices into :data:`PHRASES`
    (-1: undecided, not trained on), ``caption`` a sentence that names up to four things.
    """

    words: np.ndarray
    patches: np.ndarray
    caption: str


def label(scene: Scene, frame: int, rng: np.random.Generator) -> FrameLabels:
    """Targets of one frame of a scene."""
    words = np.zeros((POOLED * POOLED, len(CELL_WORDS)), np.float32)
    patches = np.full((GRID, GRID), len(PHRASES) - 1, np.int64)
    names = []
    for thing in scene.things:
        if thing.seen_in(frame):
            colour, shape = COLOUR_NAMES[thing.colour_at(frame)], SHAPES[thing.shape]
            names.append(f"a {colour} {shape}")
            phrase = PHRASES.index(f"{colour} {shape}")
            _mark(words, patches, thing.centre(frame), thing.radius, (colour, shape, "object"), phrase)
    for sign in scene.signs:
        if sign.seen_in(frame):
            panel, digit = SIGNS[sign.panel], DIGITS[sign.digit]
            names.append(f"a {panel} sign with {digit}")
            _mark(words, patches, sign.centre, 5.0, (panel, digit, "sign"), PHRASES.index(f"{panel} sign with {digit}"))
    chosen = [names[i] for i in rng.permutation(len(names))[: int(rng.integers(1, 5))]]
    return FrameLabels(words, patches.reshape(-1), " , ".join(chosen) or "empty background")


def _mark(
    words: np.ndarray,
    patches: np.ndarray,
    centre: tuple[float, float],
    radius: float,
    names: tuple[str, ...],
    phrase: int,
) -> None:
    x, y = (min(max(c, 0.0), GRID * PATCH - 0.01) for c in centre)
    words[_cell(centre), [_WORD[name] for name in names]] = 1
    middle = (np.arange(GRID) + 0.5) * PATCH
    reach = np.maximum(np.abs(middle[:, None] - y), np.abs(middle[None] - x))
    near = reach < radius
    touched = (reach < radius + PATCH / 2 + 2) & ~near & (patches == len(PHRASES) - 1)
    patches[touched] = -1
    patches[near] = phrase


FATES = ("new", "flashed", "recoloured")
"""What else a visual token is asked about its cell."""


def clip_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every pooled token of a clip shows.

    Returns
    -------
    tuple of numpy.ndarray
        Words ``uint8 [F, 36, len(CELL_WORDS)]``; motion ``int64 [F, 36]``: 0 for none, otherwise one more than the
        index into ``DIRECTIONS`` of the object that has come to this cell; fates ``uint8 [F, 36, 3]``: whether an
        object is in this cell that no frame before showed, whether one was for only the frame before, and whether one
        has just changed its colour.
    """
    rng = np.random.default_rng(0)
    words = np.stack([label(scene, frame, rng).words for frame in range(scene.frames)]).astype(np.uint8)
    motion = np.zeros((scene.frames, POOLED * POOLED), np.int64)
    fates = np.zeros((scene.frames, POOLED * POOLED, len(FATES)), np.uint8)
    for thing in scene.things:
        across, down = thing.velocity
        fates[thing.first, _cell(thing.centre(thing.first)), 0] = 1
        if thing.stop == thing.first + 1 < scene.frames:
            fates[thing.stop, _cell(thing.centre(thing.first)), 1] = 1
        if thing.changed:
            fates[thing.changes_at, _cell(thing.centre(thing.changes_at)), 2] = 1
        if across or down:
            direction = 1 + ((0 if across < 0 else 1) if across else (2 if down < 0 else 3))
            for frame in range(max(1, thing.first), thing.stop):
                motion[frame, _cell(thing.centre(frame))] = direction
    return words, motion, fates


def _cell(centre: tuple[float, float]) -> int:
    x, y = (min(max(c, 0.0), GRID * PATCH - 0.01) for c in centre)
    return int(y) // CELL * POOLED + int(x) // CELL


def phrase_sentences(rng: np.random.Generator) -> list[str]:
    """One sentence for every entry of :data:`PHRASES`, each in a random template."""
    picks = rng.integers(len(TEMPLATES), size=len(PHRASES))
    sentences = [TEMPLATES[i].format(phrase) for i, phrase in zip(picks, PHRASES, strict=True)]
    colour_or_shape = rng.random(len(PHRASES))
    for i, phrase in enumerate(PHRASES[:-1]):
        if "sign" in phrase and colour_or_shape[i] < 0.3:
            panel, _, _, digit = phrase.split()
            sentences[i] = f"what number is on the {panel} sign? {digit}"
    sentences[-1] = ("empty background", "nothing", "the background", "an empty scene")[int(picks[-1]) % 4]
    return sentences
