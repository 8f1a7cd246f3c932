"""A world of short clips with exact questions and answers, and small models that were trained on it.

The data flow, a file each: :mod:`.words` (what can be said) -> :mod:`.scene` (what happens) -> :mod:`.draw` (frames)
and :mod:`.questions` (exact answers) -> :mod:`.items` (what a benchmark reads) -> :mod:`.files` (mp4 and JSONL).
:mod:`.models` builds the bundled architectures, :mod:`.training` trains them, :mod:`.bundled` finds the weights.
"""

from tokensieve.world.bundled import bundled
from tokensieve.world.items import FRAMES_PER_SECOND, WorldItem, items
from tokensieve.world.questions import Question, questions
from tokensieve.world.scene import SPLITS, Scene, scene_of
from tokensieve.world.words import FAMILIES

__all__ = [
    "FAMILIES",
    "FRAMES_PER_SECOND",
    "SPLITS",
    "Question",
    "Scene",
    "WorldItem",
    "bundled",
    "items",
    "questions",
    "scene_of",
]
