"""PruneVid: merging over scenes in front of the LLM, and a selection for the question inside it.

Based on "PruneVid: Visual Token Pruning for Efficient Video Large Language Models" (arXiv 2412.16117, ACL Findings
2025). In front of the LLM frames are clustered into scenes; patches that hardly change inside a scene are averaged over
its frames, and both these and the others are clustered in space. Inside the LLM the tokens that any question token
attends to survive, also in the caches of the layers that have run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokensieve.core.method import Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.methods.prunevid_merge import PruneVidMerge
from tokensieve.ops.select import top_indices, top_mask

ALPHA = 0.4
LAYER, DEPTH = 10, 32
"""Layer behind which the question selects, and the number of layers of the published model."""
TEXT = "decoder.text_attention"


def question_scores(attention: Tensor) -> Tensor:
    """Score of every visual token: the largest attention from any text token in any head (step 7).

    Parameters
    ----------
    attention : Tensor
        ``[H, T, V]`` softmax attention of one layer, rows of all text tokens behind the video.

    Returns
    -------
    Tensor
        ``[V]``.
    """
    return attention.amax(dim=(0, 1))


def select_for_question(
    scores: Tensor,
    static_sizes: Sequence[int],
    dynamic_sizes: Sequence[int],
    frames: Sequence[int],
    alpha: float = ALPHA,
) -> Tensor:
    """Merged tokens that survive inside the LLM (step 8).

    Parameters
    ----------
    scores : Tensor
        ``[V]`` of `question_scores`, in the order of `merge_scenes`.
    static_sizes, dynamic_sizes, frames : sequence of int
        Static tokens, dynamic tokens and frames of every segment.
    alpha : float
        Share kept: ``int(size alpha)`` of the static tokens and of every frame's dynamic tokens.

    Returns
    -------
    Tensor
        Ascending ids, int64.

    Raises
    ------
    MethodError
        If the sizes do not add up to the number of scores.
    """
    if sum(static_sizes) + sum(dynamic_sizes) != scores.numel():
        raise MethodError(
            f"the segments hold {sum(static_sizes)} static and {sum(dynamic_sizes)} dynamic tokens, but there are "
            f"{scores.numel()} scores."
        )
    kept, start = [], 0
    for static, dynamic, length in zip(static_sizes, dynamic_sizes, frames, strict=True):
        for size, rows in ((static, 1), (dynamic // length, length)):
            block = scores[start : start + size * rows].view(rows, size)
            kept.append(start + top_mask(block, int(size * alpha)).flatten().nonzero()[:, 0])
            start += size * rows
    return torch.cat(kept)


@register
@dataclass
class PruneVid(PruneVidMerge):
    """PruneVid as a whole: merging in front of the LLM, and a selection for the question behind one of its layers.

    Parameters
    ----------
    alpha
        Share of the merged tokens that survives the selection, ``int(size * alpha)`` of the static tokens of every
        segment and of each frame's other tokens; the best token stays where that is none. Published: 0.4.
    layer
        M: the selection is behind this decoder layer, counted from zero; None takes 10 where the LLM has more than 20
        layers, and the same share of the depth elsewhere.
    """

    alpha: float = ALPHA
    layer: int | None = None

    name: ClassVar[str] = "prunevid"
    title: ClassVar[str] = "PruneVid"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    fidelity_note: ClassVar[str] = (
        "meeting a retention, places of merged tokens on hosts other than PLLaVA and the layer of LLMs that are not 32 "
        "deep are inferred; a picture, or a video of one frame, is a segment of its own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.alpha <= 1.0:
            raise MethodError(f"alpha is {self.alpha}, but it must be above 0 and at most 1; published is 0.4.")

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """In front of the layer behind M."""
        if self.layer is not None:
            return (self.layer + 1,)
        deep = facts.decoder_layers > 2 * LAYER
        behind = LAYER if deep else max(0, min(facts.decoder_layers * LAYER // DEPTH, facts.decoder_layers - 2))
        return (max(1, behind + 1, facts.deepstack_layers),)

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention of the text behind the video."""
        return (TEXT,)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Select inside every group of every visual item, and leave the caches of the layers before alike."""
        scores = question_scores(sample.signal(TEXT)).cpu()
        kept = []
        for number, info in enumerate(sample.infos):
            mine = (sample.item == number).nonzero()[:, 0]
            groups = self._groups(sample, mine, info)
            for group in groups.unique().tolist():
                members = mine[groups == group]
                kept.append(members[top_indices(scores[members], int(members.numel() * self.alpha))])
        keep = torch.cat(kept).sort().values
        if keep.numel() == 0:
            keep = scores.argmax()[None]
        return Plan(keep, positions="original", fate="evicted")

    @staticmethod
    def _groups(sample: DecoderSample, mine: Tensor, info: Mapping[str, Any]) -> Tensor:
        """Group that every token of an item competes in: the static ones of a segment, the others of a frame."""
        if "segments" not in info:
            return sample.view[mine]
        assert sample.patch is not None
        tokens = info["static"].shape[1]
        frame, cell = sample.patch[mine] // tokens, sample.patch[mine] % tokens
        if "views" in info:
            frame = torch.searchsorted(info["views"], frame)
        segment = torch.searchsorted(info["segments"][:, 1].contiguous(), frame)
        static = info["static"].cpu()[segment, cell]
        # Frames have numbers from zero on, segments below zero.
        return torch.where(static, -1 - segment, frame)
