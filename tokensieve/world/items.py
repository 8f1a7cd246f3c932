"""Clips with their questions, as a benchmark reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tokensieve.world.draw import draw
from tokensieve.world.questions import Question, questions
from tokensieve.world.scene import Scene, scene_of
from tokensieve.world.words import FAMILIES

FRAMES_PER_SECOND = 4.0


@dataclass(frozen=True)
class WorldItem:
    """One question about one clip of the world.

    Attributes
    ----------
    id, clip
        ``test-000012/3`` and ``test-000012``.
    family, question, candidates, answer
        See :class:`~tokensieve.world.questions.Question`.
    scene
        What happens in the clip; :meth:`read_frames` draws it.
    """

    id: str
    clip: str
    family: str
    question: str
    candidates: tuple[str, ...]
    answer: str
    scene: Scene

    def read_frames(self) -> tuple[np.ndarray, float]:
        """The frames ``uint8 [F, 96, 96, 3]`` and their rate per second."""
        return _drawn(self.scene).copy(), FRAMES_PER_SECOND


@lru_cache(maxsize=64)
def _drawn(scene: Scene) -> np.ndarray:
    frames = draw(scene)
    frames.setflags(write=False)
    return frames


def items(
    split: str = "test",
    clips: int = 300,
    families: Sequence[str] = FAMILIES,
    *,
    per_clip: int = 2,
    frames: int = 16,
    first: int = 0,
) -> list[WorldItem]:
    """Questions about consecutive clips of a split, spread evenly over the families.

    Each clip is asked the families that have had the fewest questions so far (ties by a random order of the clip), so
    the result depends on nothing but the arguments.

    Parameters
    ----------
    split
        ``"train"``, ``"validation"``, ``"test"`` or ``"long"``.
    clips
        Number of clips.
    families
        Question families to ask.
    per_clip
        Questions per clip, at most one of a family.
    frames
        Frames per clip.
    first
        Number of the first clip in its split.

    Raises
    ------
    ValueError
        If a family, the split or a number is out of range.
    """
    if clips < 1 or per_clip < 1:
        raise ValueError(f"At least one clip and one question per clip are needed, got {clips} and {per_clip}.")
    asked: Counter[str] = Counter()
    found: list[WorldItem] = []
    for index in range(first, first + clips):
        scene = scene_of(split, index, frames)
        rng = np.random.default_rng((*scene.seed, 3))
        pool = {family: some for family, some in questions(scene, tuple(families)).items() if some}
        order = sorted(rng.permutation(list(pool)), key=lambda family: asked[str(family)])
        for number, family in enumerate(map(str, order[:per_clip])):
            asked[family] += 1
            question = pool[family][int(rng.integers(len(pool[family])))]
            found.append(_item(split, index, number, question, scene))
    return found


def _item(split: str, index: int, number: int, question: Question, scene: Scene) -> WorldItem:
    clip = f"{split}-{index:06d}"
    return WorldItem(
        f"{clip}/{number}", clip, question.family, question.text, question.candidates, question.answer, scene
    )
