"""HoliTom: temporal segments over the whole video, merged static patches, selected dynamic patches.

Based on "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (arXiv 2505.21334, NeurIPS
2025). The outer part acts before the LLM: dynamic programming cuts the video into segments with as many
static patches as possible, static patches are averaged over time and clustered, the other (dynamic) patches
are selected by encoder attention. The inner part merges half of the visual tokens into similar ones at a
layer of the LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.ops.allocate import round_half_even
from tokensieve.ops.merge import sequential_average
from tokensieve.ops.segment import segment_static
from tokensieve.ops.similarity import neighbour_cosine
from tokensieve.ops.temporal_merge import BETA, MAX_WINDOW, NEIGHBOURS, THRESHOLD, inner_assignment, outer_merge


@register
@dataclass
class HoliTom(Method):
    """HoliTom with its outer (before the LLM) and inner (inside it) parts.

    Parameters
    ----------
    threshold
        Cosine above which a patch is static; None takes the published 0.8, and 0.65 at retentions up to 0.1.
    beta, plain_mean, neighbours, max_window, context_ratio
        See `outer_merge`.
    inner
        Also merge inside the LLM; False is the published "w/o M".
    inner_layer
        Decoder layer in front of which the inner part merges; None takes 18 of 28, 60 of 80, or the share of
        18 in 28 of another depth.
    inner_drop
        Share of the visual tokens that the inner part merges away.
    """

    threshold: float | None = None
    beta: float = BETA
    plain_mean: bool = False
    neighbours: int = NEIGHBOURS
    max_window: int = MAX_WINDOW
    context_ratio: float = 0.0
    inner: bool = True
    inner_layer: int | None = None
    inner_drop: float = 0.5

    name: ClassVar[str] = "holitom"
    title: ClassVar[str] = "HoliTom"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.21334"
    venue: ClassVar[str] = "NeurIPS 2025"
    code: ClassVar[str] = "https://github.com/cokeshao/HoliTom"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "the inner part runs its scoring layer causally; the released code runs it bidirectionally under sdpa"
    )

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention received in the last used tower layer."""
        return ("encoder.received_attention@feature",)

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """The layer of the inner part."""
        if not self.inner:
            return ()
        if self.inner_layer is not None:
            return (self.inner_layer,)
        share = 60 / 80 if facts.decoder_layers >= 80 else 18 / 28
        return (max(1, facts.deepstack_layers, round_half_even(facts.decoder_layers * share)),)

    def token_count(self, layout: Layout) -> int | None:
        """Depends on how static the video is."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """The outer part on one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        threshold = self.threshold
        if threshold is None:
            threshold = 0.65 if self.retention <= 0.1 else THRESHOLD
        segmentation = segment_static(neighbour_cosine(features), threshold, self.max_window)
        attention = sample.signal("encoder.received_attention@feature")
        merged = outer_merge(
            features,
            attention.view(features.shape[:2]),
            self.retention,
            threshold=threshold,
            beta=self.beta,
            plain_mean=self.plain_mean,
            neighbours=self.neighbours,
            max_window=self.max_window,
            context_ratio=self.context_ratio,
            layout="grid" if sample.layout.has_row_separators else "flat",
            segmentation=segmentation,
        )
        info = {"segments": torch.tensor(segmentation[0]), "reduced": segmentation[1]}
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, "occupied", info=info)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """The inner part on the visual tokens of one prompt."""
        keep, _, target = inner_assignment(sample.hidden, sample.attention, self.inner_drop)
        stays = torch.zeros(sample.hidden.shape[0], dtype=torch.bool, device=keep.device)
        stays[keep] = True
        merged = sequential_average(sample.hidden[keep], sample.hidden[~stays], target)
        return Plan(keep, merged, positions="original")
