"""V-CAST: more tokens where the video turns, and in each frame the tokens that stand out.

Based on "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models"
(arXiv 2603.27650). The mean vectors of the frames are seen as a trajectory, and frames where it bends sharply
get more tokens; inside a frame tokens are kept for being unlike its mean or for their large norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.budget import register_budget
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count, largest_remainder
from tokensieve.ops.select import top_mask
from tokensieve.ops.similarity import as_float32, unit_vectors

TEMPERATURE = 0.7
EPSILON = 1e-6

Score = Literal["hybrid", "outlier", "norm"]
Allocation = Literal["curvature", "uniform"]
Remainder = Literal["fair", "official"]


def frame_vectors(features: Tensor) -> Tensor:
    """Mean token of every frame, scaled to length one (step 1).

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]``.

    Returns
    -------
    Tensor
        ``[T, D]`` float32.
    """
    return unit_vectors(as_float32(features).mean(dim=1), EPSILON)


def curvature(vectors: Tensor) -> Tensor:
    """Discrete curvature of a trajectory (step 2).

    Parameters
    ----------
    vectors : Tensor
        ``[T, D]`` frame vectors.

    Returns
    -------
    Tensor
        ``[T]``: one minus the cosine between the steps before and after a frame, from 0 (straight on) to 2
        (reversal); 1 at both ends and where the video stands still.
    """
    bend = torch.ones_like(vectors[:, 0])
    steps = vectors.diff(dim=0)
    if steps.shape[0] > 1:
        norms = steps.norm(dim=-1).clamp_min(EPSILON)
        bend[1:-1] = 1 - torch.linalg.vecdot(steps[:-1], steps[1:]) / (norms[:-1] * norms[1:])
    return bend


def frame_weights(bend: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Share of the budget of every frame, a softmax of the curvature (step 3).

    Parameters
    ----------
    bend : Tensor
        ``[T]``.
    temperature : float
        Divides the curvature; 0.7 limits the ratio of two shares to about 17.

    Returns
    -------
    Tensor
        ``[T]`` summing to 1.

    Raises
    ------
    MethodError
        If the temperature is not above 0.
    """
    if not temperature > 0:
        raise MethodError(f"temperature is {temperature}, but it must be above 0; the published value is 0.7.")
    return torch.softmax(bend / temperature, dim=0)


def total_budget(frames: int, tokens: int, retention: float, minimum: int = 1) -> int:
    """Number of tokens kept of a video, ``round(T N R)`` but at least ``minimum`` a frame (step 4)."""
    return max(keep_count(frames * tokens, retention), frames * min(minimum, tokens))


def allocate(weights: Tensor, total: int, tokens: int, *, minimum: int = 1, remainder: Remainder = "fair") -> Tensor:
    """Tokens of every frame, adding up to the exact total (step 5).

    Parameters
    ----------
    weights : Tensor
        ``[T]`` shares, not negative.
    total : int
        Sum wanted, at least ``T * minimum`` and at most ``T * N``.
    tokens : int
        N, the most that a frame can keep.
    minimum : int
        The least that a frame keeps.
    remainder : {"fair", "official"}
        What rounding down leaves goes to the frames furthest below their share, one token each, or, as in the
        released code, all of it to the frame with the largest fraction until that one is full.

    Returns
    -------
    Tensor
        ``[T]`` int64.
    """
    frames, minimum = weights.numel(), min(minimum, tokens)
    shares = weights / weights.sum() * (total - frames * minimum)
    if remainder == "fair":
        return largest_remainder(shares + minimum, total, tokens, minimum)
    counts = minimum + shares.floor().long().clamp_max(tokens - minimum)
    left = total - int(counts.sum())
    fraction = (shares - shares.floor()).masked_fill(counts >= tokens, -1.0)
    for frame in fraction.sort(descending=True, stable=True).indices.tolist():
        added = min(left, tokens - int(counts[frame]))
        counts[frame] += added
        left -= added
    return counts


def token_scores(features: Tensor, vectors: Tensor, score: Score = "hybrid") -> Tensor:
    """Score whose largest values are kept (step 6).

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]``.
    vectors : Tensor
        ``[T, D]`` frame vectors.
    score : {"hybrid", "outlier", "norm"}
        Cosine distance to the frame vector, plus the norm scaled to 0..1 inside the frame; or one of the two.

    Returns
    -------
    Tensor
        ``[T, N]`` float32.
    """
    work = as_float32(features)
    norms = work.norm(dim=-1)
    lowest, highest = norms.amin(1, keepdim=True), norms.amax(1, keepdim=True)
    energy = (norms - lowest) / (highest - lowest + EPSILON)
    if score == "norm":
        return energy
    dots = torch.linalg.vecdot(work, vectors.unsqueeze(1))
    lengths = vectors.norm(dim=-1).clamp_min(EPSILON).unsqueeze(1)
    outlier = 1 - dots / (norms.clamp_min(EPSILON) * lengths)
    return outlier if score == "outlier" else outlier + energy


def frame_budget(
    features: Tensor,
    retention: float,
    *,
    temperature: float = TEMPERATURE,
    minimum: int = 1,
    allocation: Allocation = "curvature",
    remainder: Remainder = "fair",
) -> tuple[Tensor, Tensor]:
    """Tokens of every frame (steps 1 to 5), usable in front of any other selector.

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]``.
    retention : float
        R in (0, 1].
    temperature, minimum, remainder
        See ``frame_weights`` and ``allocate``.
    allocation : {"curvature", "uniform"}
        Whether the curvature decides or all frames count alike.

    Returns
    -------
    bend : Tensor
        ``[T]`` curvature.
    counts : Tensor
        ``[T]`` int64.
    """
    frames, tokens, _ = features.shape
    bend = curvature(frame_vectors(features))
    weights = frame_weights(bend if allocation == "curvature" else torch.ones_like(bend), temperature)
    total = total_budget(frames, tokens, retention, minimum)
    return bend, allocate(weights, total, tokens, minimum=minimum, remainder=remainder)


@register
@dataclass
class VCast(Method):
    """V-CAST; a video of one step passes whole, as published, and a picture is pruned by its token scores.

    Parameters
    ----------
    temperature
        Softmax temperature of the frame budgets.
    minimum
        The least number of tokens of a frame.
    score, allocation
        Ablation switches, see `token_scores` and `frame_budget`.
    remainder
        ``"fair"`` spreads what rounding leaves over the frames; ``"official"`` gives it to one frame, as the
        released code behind the published figures does.
    """

    temperature: float = TEMPERATURE
    minimum: int = 1
    score: Score = "hybrid"
    allocation: Allocation = "curvature"
    remainder: Remainder = "fair"

    name: ClassVar[str] = "v-cast"
    title: ClassVar[str] = "V-CAST"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.27650"
    venue: ClassVar[str] = "arXiv 2026"
    code: ClassVar[str] = "https://github.com/xinyouu/V-CAST"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    uniform_views: ClassVar[bool] = True
    accepts_budget: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "rounding remainders are spread over the frames; remainder=official gives them to one frame like the "
        "released code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for value, kind in ((self.score, Score), (self.allocation, Allocation), (self.remainder, Remainder)):
            if value not in get_args(kind):
                raise MethodError(f"{value!r} is no option of V-CAST; choose from {', '.join(get_args(kind))}.")
        if self.minimum < 0:
            raise MethodError(f"minimum is {self.minimum}, but a frame keeps 0 tokens or more; the usual value is 1.")
        if not self.temperature > 0:
            raise MethodError(f"temperature is {self.temperature}, but it must be above 0; the published value is 0.7.")

    def token_count(self, layout: Layout) -> int | None:
        """Exactly the budget of step 4, view by view for pictures with views of different sizes."""
        if layout.kind == "video" and len(layout.views) == 1:
            return layout.patches
        if self.budget is not None:
            return None
        if not layout.is_uniform:
            counts = layout.patches_per_view.tolist()
            return sum(total_budget(1, patches, self.retention, self.minimum) for patches in counts)
        tokens = layout.patches // len(layout.views)
        return total_budget(len(layout.views), tokens, self.retention, self.minimum)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Steps 1 to 8 on one video or picture."""
        if sample.frames == 1 and sample.layout.kind == "video":
            return keep_all(sample.layout.patches, self.position_policy)
        features = sample.by_frame
        bend, counts = frame_budget(
            features,
            self.retention,
            temperature=self.temperature,
            minimum=self.minimum,
            allocation=self.allocation,
            remainder=self.remainder,
        )
        if sample.budget is not None:
            counts = sample.budget.to(features.device)
        scores = token_scores(features, frame_vectors(features), self.score)
        keep = top_mask(scores, counts).flatten().nonzero()[:, 0]
        info = {"frame_curvature": bend.cpu(), "frame_count": counts.cpu(), "token_score": scores.cpu()}
        return Plan(keep, positions=self.position_policy, info=info)


@register_budget("v-cast")
def v_cast_budget(sample: TokenSample, retention: float) -> Tensor:
    """Frame budgets of V-CAST for any other selector, int64 [views]."""
    if sample.layout.is_uniform:
        return frame_budget(sample.by_frame, retention)[1]
    counts = [keep_count(patches, retention) for patches in sample.layout.patches_per_view.tolist()]
    return torch.tensor(counts)
