"""VidCom2: a token budget per frame, and the least typical tokens of every frame.

Based on "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models"
(arXiv 2505.14454, EMNLP 2025). Frames that differ from the whole video get more tokens (frame compression
adjustment); inside a frame the tokens least similar to the centre of the video and of the frame are kept
(adaptive token compression). Scores are Gaussian similarities, as in the released code, or cosines, as in
the paper's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from tokensieve.core.budget import register_budget
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan, SeparatorRule
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.select import top_mask
from tokensieve.ops.uniqueness import (
    TEMPERATURE,
    FrameVariant,
    Similarity,
    TokenVariant,
    budget_from_scores,
    frame_budget,
    frame_uniqueness,
    gaussian_scores,
    low_variance_channels,
    token_scores,
)


@register
@dataclass
class VidCom2(Method):
    """VidCom2, the headline plug-and-play compressor.

    Parameters
    ----------
    temperature
        Softmax temperature of the frame budgets; 0.01 in every release.
    similarity
        ``"gaussian"`` (released code) or ``"cosine"`` (the paper's text).
    frame_variant, token_variant
        Ablation switches of the first release, see `frame_uniqueness` and `token_scores`.
    exact_total
        Correct the frame budgets so that exactly ``round(R * F * N)`` tokens survive. Off by default, as
        published; serving engines that size placeholders beforehand need it.
    score_dtype
        ``"float32"`` or the half-precision type of a reference run to be reproduced.
    """

    temperature: float = TEMPERATURE
    similarity: Similarity = "gaussian"
    frame_variant: FrameVariant = "negative_mean"
    token_variant: TokenVariant = "video_and_frame"
    exact_total: bool = False
    score_dtype: str = "float32"

    name: ClassVar[str] = "vidcom2"
    title: ClassVar[str] = "VidCom2"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.14454"
    venue: ClassVar[str] = "EMNLP 2025"
    code: ClassVar[str] = "https://github.com/xuyang-liu16/VidCom2"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_dtype not in ("float32", "float16", "bfloat16"):
            raise MethodError(f"score_dtype must be float32, float16 or bfloat16, not {self.score_dtype!r}.")
        for value, kind in (
            (self.similarity, Similarity),
            (self.frame_variant, FrameVariant),
            (self.token_variant, TokenVariant),
        ):
            if value not in get_args(kind):
                raise MethodError(f"{value!r} is no option of VidCom2; choose from {', '.join(get_args(kind))}.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Features alone, unless tokens are to be scored by encoder attention (an ablation)."""
        return ("encoder.received_attention@feature",) if "attention" in self.token_variant else ()

    def token_count(self, layout: Layout) -> int | None:
        """Known beforehand with ``exact_total`` only."""
        # Every frame keeps a token, also where that is more than asked for.
        return max(len(layout.views), keep_count(layout.patches, self.retention)) if self.exact_total else None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Steps 1 to 8 on one video (or one picture as a video of one frame)."""
        features, dtype = sample.by_frame, getattr(torch, self.score_dtype)
        channels = low_variance_channels(features, dtype)
        video_score, frame_score = gaussian_scores(features, channels, self.similarity, dtype)
        ratios, counts = budget_from_scores(
            video_score, self.retention, self.temperature, self.frame_variant, self.exact_total
        )
        attention = None
        if "attention" in self.token_variant:
            attention = sample.signal("encoder.received_attention@feature").view_as(video_score)
        scores = token_scores(video_score, frame_score, self.token_variant, attention)
        keep = top_mask(scores, counts, largest=False).flatten().nonzero()[:, 0]
        info = {
            "frame_uniqueness": frame_uniqueness(video_score).cpu(),
            "frame_ratio": ratios.cpu(),
            "frame_count": counts.cpu(),
            "token_score": scores.cpu(),
        }
        # The released LLaVA-Video wrapper appends the newlines of a frame behind its patches.
        rule: SeparatorRule = "after-frame" if sample.layout.kind == "video" else "in-place"
        return Plan(keep, positions=self.position_policy, separators=rule, info=info)


@register_budget("vidcom2")
def vidcom2_budget(sample: TokenSample, retention: float) -> Tensor:
    """Frame budgets of VidCom2 for any other selector, int64 [views]."""
    if sample.layout.is_uniform:
        return frame_budget(sample.by_frame, retention)[1]
    counts = [keep_count(patches, retention) for patches in sample.layout.patches_per_view.tolist()]
    return torch.tensor(counts)
