"""Questions with exact answers about a scene, by family.

Every family is balanced by construction: given the words of a question, all its candidate answers are equally likely
over the scenes of a split, so a model that never looks at the frames stays at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from tokensieve.world.scene import CELL, Scene
from tokensieve.world.words import COLOUR_NAMES, COUNTS, DIGITS, DIRECTIONS, FAMILIES, QUARTERS, SHAPES, SIGNS


@dataclass(frozen=True)
class Question:
    """One question: its family, its words, the answers one may choose from, and the right one.

    ``about`` holds, for every object that the words mention, its index in the scene, or -1 if there is no such object.
    """

    family: str
    text: str
    candidates: tuple[str, ...]
    answer: str
    about: tuple[int, ...] = ()

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / len(self.candidates)


def questions(scene: Scene, families: tuple[str, ...] = FAMILIES) -> dict[str, list[Question]]:
    """All questions that a scene can answer, by family; a family may be empty.

    Parameters
    ----------
    scene
        What happens in the clip.
    families
        Families to ask for, of :data:`~tokensieve.world.words.FAMILIES`.

    Raises
    ------
    ValueError
        If a family is unknown.
    """
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"Unknown question families {sorted(unknown)}; use some of {', '.join(FAMILIES)}.")
    rng = np.random.default_rng((*scene.seed, 2))
    # Every family is asked in turn, wanted or not, so that the random numbers of one do not depend on the choice.
    made = {family: list(_MAKERS[family](scene, rng)) for family in FAMILIES}
    return {family: made[family] for family in families}


def _attributes(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    shapes = [thing.shape for thing in scene.things]
    colours = [c for thing in scene.things for c in {thing.colour, thing.later_colour}]
    for i, thing in enumerate(scene.things):
        if thing.role == "flash" or thing.changed:
            continue
        colour, shape = COLOUR_NAMES[thing.colour], SHAPES[thing.shape]
        if shapes.count(thing.shape) == 1:
            yield Question("attributes", f"what colour is the {shape}?", COLOUR_NAMES, colour, (i,))
        if colours.count(thing.colour) == 1:
            yield Question("attributes", f"what shape is the {colour} object?", SHAPES, shape, (i,))


def _existence(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """As many objects that are there as objects that are not, the latter with a shape and a colour that both occur."""
    steady = [i for i, thing in enumerate(scene.things) if thing.role != "flash" and not thing.changed]
    there = {(thing.shape, colour) for thing in scene.things for colour in (thing.colour, thing.later_colour)}
    shapes = sorted({thing.shape for thing in scene.things})
    colours = sorted({colour for _, colour in there})
    absent = [(shape, colour, -1) for shape in shapes for colour in colours if (shape, colour) not in there]
    present = [(scene.things[i].shape, scene.things[i].colour, i) for i in steady]
    number = min(len(absent), len(present))
    for pool, answer in ((present, "yes"), (absent, "no")):
        for i in rng.permutation(len(pool))[:number]:
            shape, colour, which = pool[int(i)]
            text = f"is there a {COLOUR_NAMES[colour]} {SHAPES[shape]}?"
            yield Question("existence", text, ("yes", "no"), answer, (which,))


def _counting(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    yield count_of(scene, scene.counted)


def count_of(scene: Scene, colour: int) -> Question:
    """How many objects have a colour; balanced over clips for ``scene.counted`` only."""
    number = sum(thing.colour == colour for thing in scene.things)
    return Question("counting", f"how many {COLOUR_NAMES[colour]} objects are there?", COUNTS, COUNTS[number])


def _motion(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, thing in enumerate(scene.things):
        if thing.role == "mover":
            across, down = thing.velocity
            answer = ("right" if across > 0 else "left") if across else ("down" if down > 0 else "up")
            yield Question("motion", f"which way does the {thing.name} move?", DIRECTIONS, answer, (i,))


def _order(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    events = [i for i, thing in enumerate(scene.things) if thing.role == "event"]
    for i, one in enumerate(events):
        for other in events[i + 1 :]:
            about = (one, other) if rng.random() < 0.5 else (other, one)
            pair = [scene.things[j] for j in about]
            if pair[0].shape == pair[1].shape:
                continue
            earlier = min(pair, key=lambda thing: thing.first)
            candidates = (SHAPES[pair[0].shape], SHAPES[pair[1].shape])
            text = f"which appears first, the {pair[0].name} or the {pair[1].name}?"
            yield Question("order", text, candidates, SHAPES[earlier.shape], about)


def _moment(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, thing in enumerate(scene.things):
        if thing.role == "event":
            answer = QUARTERS[thing.first * 4 // scene.frames]
            yield Question("moment", f"in which quarter does the {thing.name} appear?", QUARTERS, answer, (i,))


def _one_frame(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, thing in enumerate(scene.things):
        if thing.role == "flash":
            colour, shape = COLOUR_NAMES[thing.colour], SHAPES[thing.shape]
            yield Question("one-frame", "which shape flashes for a single frame?", SHAPES, shape, (i,))
            text = "what colour is the object that flashes for a single frame?"
            yield Question("one-frame", text, COLOUR_NAMES, colour, (i,))


def _reading(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for sign in scene.signs:
        yield Question("reading", f"what number is on the {SIGNS[sign.panel]} sign?", DIGITS, DIGITS[sign.digit])


def _spatial(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    still = [i for i, thing in enumerate(scene.things) if thing.role == "still" and not thing.changed]
    for i, j in permutations(still, 2):
        one, other = scene.things[i], scene.things[j]
        across, down = one.start[0] - other.start[0], one.start[1] - other.start[1]
        if abs(across) >= 1.25 * CELL:
            text = f"is the {one.name} left or right of the {other.name}?"
            yield Question("spatial", text, ("left", "right"), "left" if across < 0 else "right", (i, j))
        if abs(down) >= 1.25 * CELL:
            text = f"is the {one.name} above or below the {other.name}?"
            yield Question("spatial", text, ("above", "below"), "above" if down < 0 else "below", (i, j))


def _two_places(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i in scene.watched:
        thing = scene.things[i]
        text = f"is the {SHAPES[thing.shape]} the same colour at the start and at the end?"
        yield Question("two-places", text, ("yes", "no"), "no" if thing.changed else "yes", (i,))


_Maker = Callable[[Scene, np.random.Generator], Iterator[Question]]

_MAKERS: dict[str, _Maker] = {
    "attributes": _attributes,
    "existence": _existence,
    "counting": _counting,
    "motion": _motion,
    "order": _order,
    "moment": _moment,
    "one-frame": _one_frame,
    "reading": _reading,
    "spatial": _spatial,
    "two-places": _two_places,
}
