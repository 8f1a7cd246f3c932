"""FastV: drop the visual tokens that the last prompt token hardly attends to, after an early LLM layer.

Based on "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models" (arXiv 2403.06764, ECCV 2024). The score is the attention row of the last prompt
token, as in the released code; the paper's text averages over all query rows instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.select import top_indices


def rank_visual(attention_row: Tensor, visual_mask: Tensor, keep: int) -> Tensor:
    """Visual tokens with the largest attention (steps 2 and 3).

    Parameters
    ----------
    attention_row : Tensor
        ``[L]`` score of every token of the sequence, usually the attention of the last prompt token in
        layer K-1, averaged over heads.
    visual_mask : Tensor
        ``[L]`` bool, true at the visual tokens that may be dropped. Text and padding never take part.
    keep : int
        Number of visual tokens to keep.

    Returns
    -------
    Tensor
        ``[keep]`` int64 ids among the visual tokens (0 for the first true place of the mask), ascending;
        the lowest id wins ties.

    Raises
    ------
    MethodError
        If the shapes differ or ``keep`` is outside 1..number of visual tokens.
    """
    if attention_row.shape != visual_mask.shape or attention_row.dim() != 1:
        raise MethodError(
            f"ranking needs one score per token, but the scores have shape {tuple(attention_row.shape)} "
            f"and the mask {tuple(visual_mask.shape)}."
        )
    scores = attention_row[visual_mask.bool()]
    if not 1 <= keep <= scores.numel():
        raise MethodError(f"cannot keep {keep} of {scores.numel()} visual tokens; keep at least 1 and at most all.")
    return top_indices(scores, keep)


def kept_positions(visual_mask: Tensor, kept: Tensor) -> Tensor:
    """Places of the sequence that survive: all that is not visual, and the kept tokens (steps 4 and 5).

    Parameters
    ----------
    visual_mask : Tensor
        ``[L]`` bool.
    kept : Tensor
        ``[n]`` ids among the visual tokens.

    Returns
    -------
    Tensor
        ``[L - V + n]`` int64, ascending. They are also the position ids used from layer K on.
    """
    survives = ~visual_mask.bool()
    survives[visual_mask.nonzero()[kept, 0]] = True
    return survives.nonzero()[:, 0]


def average_retention(retention: float, first_layer: int, layers: int) -> float:
    """Visual tokens per layer, averaged over all layers, as a share of the uncompressed number.

    Parameters
    ----------
    retention : float
        Share kept from ``first_layer`` on (1 - R in the paper's notation).
    first_layer : int
        K, the index of the first layer that sees the shortened sequence; layers 0..K-1 see everything.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        ``(K + (layers - K) * retention) / layers``.
    """
    return (first_layer + (layers - first_layer) * retention) / layers


def retention_for_average(average: float, first_layer: int, layers: int) -> float:
    """Share to keep from layer K on so that the average over all layers is a wanted one.

    Parameters
    ----------
    average : float
        Wanted average retention, above ``first_layer / layers`` and at most 1.
    first_layer : int
        K.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        ``(average * layers - K) / (layers - K)``, in (0, 1].

    Raises
    ------
    RetentionError
        If the first K full layers alone already use up the average.
    """
    if not first_layer / layers < average <= 1.0:
        raise RetentionError(
            f"an average retention of {average} cannot be reached with {first_layer} of {layers} layers "
            f"at full length; it must be above {first_layer / layers:.3f} and at most 1."
        )
    return (average * layers - first_layer) / (layers - first_layer)


@register
@dataclass
class FastV(Method):
    """FastV: one cut in front of decoder layer K, by the attention of the last prompt token in layer K-1.

    Parameters
    ----------
    retention
        Share of the visual tokens that goes on into layer K; the published R is the share dropped.
    layer
        K, counted from zero; None takes 2, or the first layer behind the DeepStack layers.
    average
        ``retention`` is the average over all layers instead; the cut is deep enough to reach it.
    scope
        ``"prompt"`` ranks all visual tokens of a prompt together, ``"item"`` each image and video apart.
    """

    retention: float = 0.5
    layer: int | None = None
    average: bool = False
    scope: Literal["prompt", "item"] = "prompt"

    name: ClassVar[str] = "fastv"
    title: ClassVar[str] = "FastV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    venue: ClassVar[str] = "ECCV 2024"
    code: ClassVar[str] = "https://github.com/pkunlp-icler/FastV"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    accepts_budget: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = "newline embeddings are kept and never ranked; on DeepStack models K is 3"

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """K."""
        return (self.layer if self.layer is not None else max(2, facts.deepstack_layers),)

    def check_host(self, facts: HostFacts) -> None:
        """K must exist, and an average must be reachable behind K full layers."""
        super().check_host(facts)
        if self.average:
            self._share(facts)

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM; the cut comes later."""
        return layout.patches

    def _share(self, facts: HostFacts) -> float:
        if not self.average:
            return self.retention
        return retention_for_average(self.retention, self.decoder_layers(facts)[0], facts.decoder_layers)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Rank by the attention row, under the frame budget where one is given."""
        assert sample.facts is not None
        if sample.budget is not None:
            return Plan(_within_frames(sample.attention, sample.view, sample.budget), positions="original")
        share = self._share(sample.facts)
        groups = sample.item if self.scope == "item" else torch.zeros_like(sample.item)
        counts = torch.tensor([keep_count(int(size), share) for size in torch.bincount(groups)])
        return Plan(_within_frames(sample.attention, groups, counts), positions="original")


def _within_frames(scores: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[g]`` highest scores of every group (at most all of them), as ascending ids."""
    group = group.to(scores.device)
    keeps = []
    for index, count in enumerate(counts.tolist()):
        mine = (group == index).nonzero()[:, 0]
        if mine.numel() and count:
            keeps.append(mine[top_indices(scores[mine], min(count, mine.numel()))])
    return torch.cat(keeps).sort().values
