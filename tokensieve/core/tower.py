"""What a method that shortens sequences inside the vision tower sees, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokensieve.core.sample import HostFacts
from tokensieve.ops.attention import class_attention
from tokensieve.ops.bipartite import TokenGroups

Together = Literal["all", "item", "picture"]
"""Pictures that run through the tower as one batch: of one call, of one visual item, or each alone."""


@dataclass(frozen=True)
class TowerSample:
    """Pictures that are about to be encoded together.

    Attributes
    ----------
    pictures
        How many they are.
    patches
        Patches N of each.
    tokens
        Patches of their visual items as the uncompressed LLM would read them.
    is_video
        Whether the pictures are frames of a video.
    layers
        Blocks up to the one whose output is projected.
    class_token
        Whether a class token runs along at place 0.
    facts : HostFacts
        About the host.
    """

    pictures: int
    patches: int
    tokens: int
    is_video: bool
    layers: int
    class_token: bool
    facts: HostFacts


@dataclass(frozen=True)
class Block:
    """One block of the tower for the tokens still there.

    Attributes
    ----------
    layer
        Its index, from zero.
    q, k, v : Tensor [B, H, T, d]
        Queries, keys and values, the class token at place 0 included where there is one.
    class_token
        Whether there is one.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    class_token: bool

    @property
    def patches(self) -> int:
        """Patch tokens left."""
        return self.k.shape[2] - int(self.class_token)

    def class_attention(self) -> Tensor:
        """Attention of the class token to the patches, mean over heads, float32 [B, n]; one row is computed."""
        return class_attention(self.q, self.k)[:, 1:]


class TowerProgram:
    """What a method does to the tokens of some pictures while the tower runs; one object for each run.

    Attributes
    ----------
    proportional
        Whether merged tokens count in attention as often as the patches they stand for.
    """

    proportional: bool = False

    def merge(self, block: Block) -> TokenGroups | None:
        """Partition of the T tokens to average by between attention and feed-forward part; None merges nothing.

        The class token must stay alone and first.
        """
        return None

    def drop(self, block: Block) -> Tensor | None:
        """Patches that go on behind the block, ascending int64 [B, n'] among those left; None keeps all."""
        return None
