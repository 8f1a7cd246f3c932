"""DivPrune: the most diverse visual tokens, chosen greedily.

Based on "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175,
CVPR 2025). Pruning as a max-min diversity problem: all visual tokens of the prompt form one pool, and every
chosen token is the one farthest (in cosine distance) from those chosen before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.core.method import Selector, Stage
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.diversity import farthest_point


def select_diverse(features: Tensor, ratio: float, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a diverse subset of visual tokens (steps 1 to 5).

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` visual tokens as they enter the LLM. A factor per token changes nothing.
    ratio : float
        Share to keep, in (0, 1]; ``round(ratio * n)`` tokens survive, halves to even and at least one.
    count : int, optional
        Exact number to keep, in place of the ratio.

    Returns
    -------
    keep : Tensor
        ``[K]`` int64 indices, ascending.
    order : Tensor
        ``[K]`` the same indices in the order of the choice.
    distances : Tensor
        ``[K]`` float32 cosine distance of each token, in that order, to the nearest one chosen before (the
        first one: to its nearest other token). Never increases from the second one on.

    Raises
    ------
    RetentionError
        If the ratio is outside (0, 1].
    """
    order, distances = farthest_point(features, keep_count(features.shape[0], ratio) if count is None else count)
    return order.sort().values, order, distances


@register
@dataclass
class DivPrune(Selector):
    """DivPrune: patches of one visual item form one pool; newline tokens stay.

    The published defaults keep 9.8 % of an image and 10 % of a video.
    """

    retention: float = 0.1

    name: ClassVar[str] = "divprune"
    title: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    venue: ClassVar[str] = "CVPR 2025"
    code: ClassVar[str] = "https://github.com/vbdi/divprune"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    fidelity_note: ClassVar[str] = (
        "newline embeddings are kept and never compete with patches, unlike in the released code"
    )

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """Greedy max-min selection over all patches of the item."""
        return select_diverse(sample.features, self.retention, count)[0]
