"""The words of the world: what is drawn, what is asked, and what is answered.

The bundled models read whole words, so everything that they can be told or asked is listed here; another word
becomes ``<unk>``.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 225, 50),
    "green": (50, 190, 60),
    "cyan": (60, 215, 225),
    "blue": (45, 80, 230),
    "purple": (160, 60, 215),
    "white": (245, 245, 245),
}
"""Colour names and their RGB values in 0-255."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
"""Shape names, in the order of their labels."""

DIGITS: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
"""What a sign may show."""

SIGNS: tuple[str, ...] = ("white", "black")
"""The colours of a sign's panel."""

COUNTS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
QUARTERS: tuple[str, ...] = ("first", "second", "third", "fourth")
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down")

COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)

FAMILIES: tuple[str, ...] = (
    "attributes",
    "existence",
    "counting",
    "motion",
    "order",
    "moment",
    "one-frame",
    "reading",
    "spatial",
    "two-places",
)
"""The question families, in the order of every table."""

_ANSWERS = (
    *COLOUR_NAMES,
    *SHAPES,
    *DIGITS,
    *COUNTS,
    *QUARTERS,
    *DIRECTIONS,
    *("above", "below", "yes", "no", "same", "different"),
)
_QUESTION_WORDS = """
what which when where how is are does do did was there it any
the a an of in on at and or with to for by that this has have
colour color shape shapes object objects thing things many number digit sign signs says shown
move moves moving direction way go goes appear appears appearing first before after last than
quarter clip video frame frames single one flash flashes flashing only start end
can you see seen find tell me please answer word question it's its change changes
empty background texture scene shows contains black , . ? : ' ( ) -
describe everything nothing picture photo image near side top bottom middle corner
""".split()  # noqa: SIM905  (as a list it would take 120 lines)


def vocabulary() -> list[str]:
    """Every word of the world once, answers first, in an order that never changes."""
    return list(dict.fromkeys((*_ANSWERS, *_QUESTION_WORDS)))
