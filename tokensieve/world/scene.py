"""What happens in a clip, before anything is drawn: objects, their paths, their moments.

A scene is a pure function of ``(split, index)``. It is made so that every question that can be asked about it has one
right answer, and so that nothing but the frames tells which (see :mod:`tokensieve.world.questions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tokensieve.world.words import COLOUR_NAMES, SHAPES

SIZE = 96
"""Height and width of a frame in pixels."""

CELL = 16
"""Edge in pixels of the square that becomes one token after the 2 x 2 pooling of the bundled model."""

SPLITS: dict[str, int] = {"train": 0, "validation": 1, "test": 2, "long": 3}
"""Splits and the first word of their random seeds; no two splits share a seed."""

Role = Literal["still", "mover", "event", "flash"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Parameters
    ----------
    role
        ``"still"`` (there all the time), ``"mover"``, ``"event"`` (there for a few frames) or ``"flash"`` (one frame).
    shape, colour
        Indices into :data:`~tokensieve.world.words.SHAPES` and ``COLOUR_NAMES``.
    later_colour
        The colour from ``changes_at`` on; equal to ``colour`` for most.
    start, velocity
        Centre ``(x, y)`` in pixels in frame 0, and pixels per frame.
    first, stop
        Visible in frames ``first <= t < stop``.
    radius
        Half the extent in pixels.
    """

    role: Role
    shape: int
    colour: int
    later_colour: int
    changes_at: int
    start: tuple[float, float]
    velocity: tuple[float, float]
    first: int
    stop: int
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as a question would call it."""
        return f"{COLOUR_NAMES[self.colour]} {SHAPES[self.shape]}"

    @property
    def changed(self) -> bool:
        """Whether the colour changes during the clip."""
        return self.colour != self.later_colour

    def centre(self, frame: int) -> tuple[float, float]:
        """Centre ``(x, y)`` in pixels in one frame."""
        return self.start[0] + self.velocity[0] * frame, self.start[1] + self.velocity[1] * frame

    def colour_at(self, frame: int) -> int:
        """Index of the colour shown in one frame."""
        return self.later_colour if frame >= self.changes_at else self.colour

    def seen_in(self, frame: int) -> bool:
        """Whether one frame shows it."""
        return self.first <= frame < self.stop


@dataclass(frozen=True)
class Sign:
    """A small panel with a digit: ``panel`` 0 is white, 1 is black; visible in ``first <= t < stop``."""

    panel: int
    digit: int
    centre: tuple[float, float]
    first: int
    stop: int

    def seen_in(self, frame: int) -> bool:
        """Whether one frame shows it."""
        return self.first <= frame < self.stop


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn.

    ``counted`` is the colour whose number of objects is balanced over clips, ``watched`` the index of the object that
    changes its colour in every second clip (at most one but in :func:`practice`). ``cut`` is the frame at which the
    background changes (0: never).
    """

    seed: tuple[int, ...]
    frames: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    counted: int
    watched: tuple[int, ...]
    cut: int
    noise: float
    pan: tuple[float, float] = field(default=(0.0, 0.0))


def scene_of(split: str, index: int, frames: int = 16) -> Scene:
    """The scene with a number in a split.

    Parameters
    ----------
    split
        One of :data:`SPLITS`.
    index
        Number of the clip in its split, from 0.
    frames
        Length of the clip, at least 4. Clips with the same index and different lengths are different scenes.

    Raises
    ------
    ValueError
        If the split is unknown or a number is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; use one of {', '.join(SPLITS)}.")
    if index < 0 or frames < 4:
        raise ValueError(f"A clip needs index >= 0 and frames >= 4, got {index} and {frames}.")
    return _compose((SPLITS[split], index, frames), frames)


def crowd(seed: tuple[int, ...]) -> Scene:
    """A single frame full of objects and signs, to train a vision tower on (frames = 1)."""
    rng = np.random.default_rng((9, *seed))
    cells = _cells(rng)
    things = []
    for _ in range(int(rng.integers(4, 12))):
        shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOUR_NAMES)))
        # A moving object is seen anywhere, so half of them ignore the grid.
        jitter = 2.0 if rng.random() < 0.5 else 7.0
        things.append(_thing(rng, "still", shape, colour, _at(rng, next(cells), jitter), 0, 1))
    signs = _signs(rng, cells, 1, int(rng.integers(1, 4)))
    return Scene((9, *seed), 1, tuple(things), signs, 0, (), 0, float(rng.uniform(2, 9)))


def practice(index: int, frames: int) -> Scene:
    """A training scene for exercise: every second one lets all objects that can be compared change at random.

    Other scenes have at most one such object; a model that is to learn from few clips needs more.
    """
    scene = scene_of("train", index, frames)
    if index % 2:
        return scene
    rng = np.random.default_rng((8, index, frames))
    things, watched = list(scene.things), _comparable(scene.things, scene.counted)
    for i in watched[1:]:
        if rng.random() < 0.5:
            things[i] = _recoloured(rng, things[i], scene.counted, frames)
    return replace(scene, things=tuple(things), watched=watched)


def _compose(seed: tuple[int, ...], frames: int) -> Scene:
    rng = np.random.default_rng(seed)
    roles: list[Role] = ["still"] * int(rng.integers(2, 5))
    roles += ["mover"] * int(rng.integers(1, 3))
    roles += ["event"] * int(rng.integers(2, 4))
    roles += ["flash"]
    shapes, colours, counted = _looks(rng, len(roles))
    horizontal = bool(rng.random() < 0.5)
    lanes = [int(lane) for lane in rng.permutation(SIZE // CELL)[: roles.count("mover")]]
    cells = (cell for cell in _cells(rng) if cell[1 if horizontal else 0] not in lanes)
    quarters = iter([int(q) for q in rng.permutation(4)])
    movers = iter(lanes)
    things: list[Thing] = []
    for role, shape, colour in zip(roles, shapes, colours, strict=True):
        if role == "mover":
            things.append(_mover(rng, shape, colour, next(movers), horizontal, frames))
            continue
        first, stop = 0, frames
        if role == "event":
            first, stop = _within_quarter(rng, next(quarters), frames)
        elif role == "flash":
            first = int(rng.integers(frames))
            stop = first + 1
        things.append(_thing(rng, role, shape, colour, _at(rng, next(cells), 2.0), first, stop))
    watched = _comparable(things, counted)[:1]
    if watched and rng.random() < 0.5:
        things[watched[0]] = _recoloured(rng, things[watched[0]], counted, frames)
    signs = _signs(rng, cells, frames, int(rng.integers(1, 3)))
    cut = int(rng.integers(frames // 4, 3 * frames // 4 + 1)) if rng.random() < 0.3 else 0
    pan = (float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
    reach = 16 / max(frames, 16)
    return Scene(
        seed,
        frames,
        tuple(things),
        signs,
        counted,
        watched,
        cut,
        float(rng.uniform(2, 9)),
        (pan[0] * reach, pan[1] * reach),
    )


def _looks(rng: np.random.Generator, number: int) -> tuple[list[int], list[int], int]:
    """Shapes and colours, all pairs distinct, with a balanced number of objects in the counted colour."""
    counted = int(rng.integers(len(COLOUR_NAMES)))
    quota = int(rng.integers(0, 5))
    others = [colour for colour in range(len(COLOUR_NAMES)) if colour != counted]
    colours = [counted] * quota + [int(c) for c in rng.choice(others, number - quota)]
    colours = [colours[i] for i in rng.permutation(number)]
    shapes: list[int] = []
    taken: set[tuple[int, int]] = set()
    for colour in colours:
        free = [shape for shape in range(len(SHAPES)) if (shape, colour) not in taken]
        shapes.append(int(rng.choice(free)))
        taken.add((shapes[-1], colour))
    return shapes, colours, counted


def _comparable(things: Sequence[Thing], counted: int) -> tuple[int, ...]:
    """The still objects whose shape no other has and whose colour is not the counted one."""
    shapes = [thing.shape for thing in things]
    return tuple(
        i
        for i, thing in enumerate(things)
        if thing.role == "still" and shapes.count(thing.shape) == 1 and thing.colour != counted
    )


def _recoloured(rng: np.random.Generator, thing: Thing, counted: int, frames: int) -> Thing:
    others = [c for c in range(len(COLOUR_NAMES)) if c not in (thing.colour, counted)]
    later = int(rng.choice(others))
    at = int(rng.integers(frames // 4, 3 * frames // 4 + 1))
    return replace(thing, later_colour=later, changes_at=at)


def _mover(rng: np.random.Generator, shape: int, colour: int, lane: int, horizontal: bool, frames: int) -> Thing:
    """An object that crosses 40 to 68 pixels of its lane during the clip, forwards or backwards."""
    reach = float(rng.uniform(40, 68))
    low = float(rng.uniform(8, SIZE - 8 - reach))
    forwards = bool(rng.random() < 0.5)
    begin, step = (low, reach / (frames - 1)) if forwards else (low + reach, -reach / (frames - 1))
    across = lane * CELL + CELL / 2 + float(rng.uniform(-1, 1))
    start = (begin, across) if horizontal else (across, begin)
    velocity = (step, 0.0) if horizontal else (0.0, step)
    return _thing(rng, "mover", shape, colour, start, 0, frames, velocity)


def _thing(
    rng: np.random.Generator,
    role: Role,
    shape: int,
    colour: int,
    start: tuple[float, float],
    first: int,
    stop: int,
    velocity: tuple[float, float] = (0.0, 0.0),
) -> Thing:
    return Thing(role, shape, colour, colour, stop, start, velocity, first, stop, float(rng.uniform(6.0, 7.5)))


def _within_quarter(rng: np.random.Generator, quarter: int, frames: int) -> tuple[int, int]:
    """An interval of at least two frames (one in clips of fewer than eight) inside a quarter of the clip."""
    begin, end = quarter * frames // 4, (quarter + 1) * frames // 4
    length = min(int(rng.integers(2, 4)), end - begin)
    first = int(rng.integers(begin, end - length + 1))
    return first, first + length


def _signs(rng: np.random.Generator, cells: Iterator[tuple[int, int]], frames: int, number: int) -> tuple[Sign, ...]:
    """Signs of different panel colours (more than two only in single frames), each for at least half of the clip."""
    signs = []
    order = [int(p) for p in rng.permutation(2)]
    for i in range(number):
        length = int(rng.integers(max(1, frames // 2), frames + 1))
        first = int(rng.integers(0, frames - length + 1))
        signs.append(Sign(order[i % 2], int(rng.integers(10)), _at(rng, next(cells), 2.0), first, first + length))
    return tuple(signs)


def _cells(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    edge = SIZE // CELL
    return iter([(int(i) % edge, int(i) // edge) for i in rng.permutation(edge * edge)])


def _at(rng: np.random.Generator, cell: tuple[int, int], jitter: float) -> tuple[float, float]:
    x, y = (c * CELL + CELL / 2 + float(rng.uniform(-jitter, jitter)) for c in cell)
    return min(max(x, 7.0), SIZE - 7.0), min(max(y, 7.0), SIZE - 7.0)
