"""EVS: drop the patches that did not change since the previous temporal step.

Based on "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (arXiv
2510.14624). A token scores by its cosine dissimilarity to the token of the same cell one step earlier, the
first step is kept whole, and one ranking over the whole video decides. The number of kept tokens depends on
geometry alone. The rule for positions of the serving engine is in `tokensieve.ops.mrope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.select import top_mask
from tokensieve.ops.similarity import neighbour_cosine, unit_vectors

FIRST_STEP = 255.0
"""Score of the first step; the largest possible dissimilarity is 2."""
EPSILON = 1e-8
_STILL = 1e-5
_BISECTIONS = 24

Reference = Literal["previous", "last_kept"]


def retained_count(steps: int, cells: int, rate: float) -> int:
    """Number of tokens that survive, ``max(N, floor(T * N * (1 - q)))`` (step 1).

    Parameters
    ----------
    steps, cells : int
        Temporal steps T and cells N of each.
    rate : float
        Pruning rate q in [0, 1). The product is taken in float64 in the order of the engine, so that 1000
        tokens at q = 0.9 leave 99.

    Returns
    -------
    int
        Between N and ``T * N``.

    Raises
    ------
    MethodError
        If the rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise MethodError(f"The pruning rate of EVS is {rate}, but it must be at least 0 and below 1.")
    return max(cells, math.floor(steps * cells * (1.0 - rate)))


def dissimilarity(features: Tensor, score_dtype: torch.dtype = torch.float32) -> Tensor:
    """Change of every token since the previous step, ``1 - cosine`` (steps 2 and 3).

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]``.
    score_dtype : torch.dtype
        Float32, or float16 / bfloat16 for the literal computation of an engine in half precision.

    Returns
    -------
    Tensor
        ``[T, N]`` in ``score_dtype``; 255 in the first step. A token that is bit-identical to the one before
        scores exactly 0 in float32, so that equal tokens tie and the earlier one wins.
    """
    first = features.new_full((1, features.shape[1]), FIRST_STEP, dtype=score_dtype)
    if score_dtype != torch.float32:
        work = features.to(score_dtype)
        cosine = torch.nn.functional.cosine_similarity(work[1:], work[:-1], dim=-1, eps=EPSILON)
        return torch.cat((first, 1 - cosine))
    change = 1 - neighbour_cosine(features.float(), EPSILON)
    step, cell = (change.abs() < _STILL).nonzero(as_tuple=True)
    same = torch.eq(features[step + 1, cell], features[step, cell]).all(dim=-1)
    change[step[same], cell[same]] = 0.0
    return torch.cat((first, change.clamp_min_(0)))


def changed_mask(features: Tensor, threshold: float, reference: Reference = "previous") -> Tensor:
    """Streaming variant (ours): keep what changed by more than a threshold, without a ranking.

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]``.
    threshold : float
        Smallest dissimilarity that survives (exclusive). The first step is kept whole.
    reference : {"previous", "last_kept"}
        Compare with the step before, or with the last token of the cell that was kept, so that slow drift
        adds up until it shows.

    Returns
    -------
    Tensor
        ``[T, N]`` bool.
    """
    if reference == "previous":
        return dissimilarity(features) > threshold
    units = unit_vectors(features, EPSILON)
    last = units[0].clone()
    kept = torch.ones(units.shape[:2], dtype=torch.bool, device=units.device)
    for step in range(1, units.shape[0]):
        kept[step] = 1 - torch.linalg.vecdot(units[step], last) > threshold
        last = torch.where(kept[step].unsqueeze(1), units[step], last)
    return kept


def _follow(similarity: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Tokens kept against the last kept one, and their change ``[T, N]``, from cosines ``[N, T, T]``."""
    cells, steps, _ = similarity.shape
    index = torch.arange(cells, device=similarity.device)
    last = torch.zeros_like(index)
    kept = torch.ones(steps, cells, dtype=torch.bool, device=similarity.device)
    change = similarity.new_full((steps, cells), FIRST_STEP)
    for step in range(1, steps):
        change[step] = (1 - similarity[index, step, last]).clamp_min(0)
        kept[step] = change[step] > threshold
        last = torch.where(kept[step], step, last)
    return kept, change


def _against_last_kept(features: Tensor, count: int) -> Tensor:
    """Ranking variant of ``last_kept``: scores ``[T, N]`` whose ``count`` largest are kept.

    What is the last kept token depends on what is kept, so the lowest threshold that leaves at most
    ``count`` tokens is searched for; the places that it leaves free go to the largest changes below it.
    """
    units = unit_vectors(features, EPSILON).transpose(0, 1)
    similarity = units @ units.transpose(1, 2)
    # Products of equal vectors differ from 1 by rounding, which must not rank still tokens.
    similarity = torch.where(similarity > 1 - _STILL / 10, torch.ones_like(similarity), similarity)
    low, high = -1.0, 2.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if int(_follow(similarity, middle)[0].sum()) <= count:
            high = middle
        else:
            low = middle
    kept, change = _follow(similarity, high)
    return torch.where(kept, change + FIRST_STEP, change)


def token_scores(
    features: Tensor,
    rate: float,
    *,
    reference: Reference = "previous",
    score_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scores whose ``retained_count(T, N, q)`` largest survive (steps 1 to 3).

    Parameters
    ----------
    features : Tensor
        ``[T, N, D]`` projected features of one video, row-major inside a step.
    rate : float
        Pruning rate q in [0, 1).
    reference : {"previous", "last_kept"}
        What a token is compared with: always the step before (published), or the last token of its cell that
        was kept (ours; kept tokens then score their change plus 255).
    score_dtype : torch.dtype
        See ``dissimilarity``; ``last_kept`` computes in float32.

    Returns
    -------
    Tensor
        ``[T, N]``.

    Raises
    ------
    MethodError
        If the features are not ``[T, N, D]``, or on a bad rate or reference.
    """
    if features.dim() != 3:
        raise MethodError(f"EVS needs features [T, N, D], but the shape is {tuple(features.shape)}.")
    if reference not in get_args(Reference):
        raise MethodError(f"reference {reference!r} is unknown; use 'previous' or 'last_kept'.")
    count = retained_count(features.shape[0], features.shape[1], rate)
    if reference == "last_kept" and features.shape[0] > 1:
        return _against_last_kept(features, count)
    return dissimilarity(features, score_dtype)


def retention_mask(
    features: Tensor,
    rate: float,
    *,
    reference: Reference = "previous",
    score_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Tokens of a video that survive (steps 1 to 5).

    Parameters
    ----------
    features, rate, reference, score_dtype
        See ``token_scores``.

    Returns
    -------
    Tensor
        ``[T, N]`` bool with ``retained_count(T, N, q)`` true values; ties go to the earlier token.
    """
    scores = token_scores(features, rate, reference=reference, score_dtype=score_dtype)
    return _largest(scores, rate)


def _largest(scores: Tensor, rate: float) -> Tensor:
    """Mark the tokens ``[T, N]`` that the ranking over the whole video keeps (step 4)."""
    count = retained_count(scores.shape[0], scores.shape[1], rate)
    return top_mask(scores.flatten(), count).view_as(scores)


@register
@dataclass
class EVS(Method):
    """Efficient Video Sampling; the pruning rate is one minus the retention.

    The first step always survives whole, so T steps never keep less than 1/T, and a picture stays as it is.

    Parameters
    ----------
    reference
        ``"previous"`` as published, or ``"last_kept"`` (ours), see `retention_mask`.
    threshold
        Keep every token that changed by more than this instead of ranking (ours, usable on a stream); the
        retention then only matters at 1.
    score_dtype
        ``"float32"`` or the half-precision type of an engine run to be reproduced.
    """

    reference: Reference = "previous"
    threshold: float | None = None
    score_dtype: str = "float32"

    name: ClassVar[str] = "evs"
    title: ClassVar[str] = "EVS"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14624"
    venue: ClassVar[str] = "arXiv 2025"
    code: ClassVar[str] = "https://github.com/vllm-project/vllm"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    uniform_views: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "position ids are those of the unpruned prompt on hosts with three position axes; the engine restarts the "
        "text behind a video at the width of its grid"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in get_args(Reference):
            raise MethodError(f"reference {self.reference!r} is unknown; use 'previous' or 'last_kept'.")
        if self.score_dtype not in ("float32", "float16", "bfloat16"):
            raise MethodError(f"score_dtype must be float32, float16 or bfloat16, not {self.score_dtype!r}.")

    def token_count(self, layout: Layout) -> int | None:
        """From geometry alone, unless a threshold decides."""
        if not layout.is_uniform or len(layout.views) == 1:
            return layout.patches
        if self.threshold is not None:
            return None
        cells = layout.patches // len(layout.views)
        return retained_count(len(layout.views), cells, 1.0 - self.retention)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Rank the changes of one video."""
        if sample.frames == 1:
            return keep_all(sample.layout.patches, self.position_policy)
        features, rate = sample.by_frame, 1.0 - self.retention
        if self.threshold is not None:
            mask = changed_mask(features, self.threshold, self.reference)
            info = {"frame_count": mask.sum(1).cpu()}
        else:
            dtype = getattr(torch, self.score_dtype)
            scores = token_scores(features, rate, reference=self.reference, score_dtype=dtype)
            mask = _largest(scores, rate)
            info = {"token_score": scores.float().cpu(), "frame_count": mask.sum(1).cpu()}
        return Plan(mask.flatten().nonzero()[:, 0], positions=self.position_policy, info=info)
