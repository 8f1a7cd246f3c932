"""The procedural world as training data: clips drawn on the fly, with exact questions."""

from __future__ import annotations

from collections.abc import Sequence

from tokensieve.train.records import Sample, Turn
from tokensieve.world.items import WorldItem, items
from tokensieve.world.words import FAMILIES

__all__ = ["WorldSamples", "sample_of"]


def sample_of(item: WorldItem) -> Sample:
    """A question of the world with its answer, its clip drawn."""
    frames, _ = item.read_frames()
    turns = [Turn("user", item.question), Turn("assistant", item.answer)]
    return Sample(turns, videos=[frames], name=item.id)


class WorldSamples:
    """Questions about clips of the world; every epoch shows other clips.

    What is shown depends on the arguments and the epoch alone, so that a resumed run sees the same.

    Parameters
    ----------
    clips : int
        Clips of an epoch.
    per_clip : int
        Questions per clip, each a sample of its own.
    frames : int
        Frames per clip.
    families : sequence of str
        Question families.
    split : str
        ``"train"``, or another split of the world.
    first : int
        Number of the first clip of the first epoch.
    """

    def __init__(
        self,
        clips: int,
        *,
        per_clip: int = 2,
        frames: int = 16,
        families: Sequence[str] = FAMILIES,
        split: str = "train",
        first: int = 0,
    ) -> None:
        self.clips, self.per_clip, self.frames = clips, per_clip, frames
        self.families, self.split, self.first = tuple(families), split, first
        self.items: list[WorldItem] = []
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Go on to the clips of an epoch."""
        self.epoch = epoch
        first = self.first + epoch * self.clips
        found = items(self.split, self.clips, self.families, per_clip=self.per_clip, frames=self.frames, first=first)
        # Every epoch has to have as many samples as the first one.
        wanted = len(self.items) or len(found)
        self.items = (found * (1 + wanted // len(found)))[:wanted]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        return sample_of(self.items[index])
