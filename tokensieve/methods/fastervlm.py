"""FasterVLM: the patches that the class token of the vision encoder attends to most.

Based on "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster"
(arXiv 2412.01818, first version). Every image or frame keeps the same number of patches; neither the question
nor the other frames play a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.grouped import top_in_groups
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

Source = Literal["class", "received"]


def rank_patches(attention: Tensor, keep: int) -> Tensor:
    """Patches of every frame with the largest attention (steps 2 and 3).

    Parameters
    ----------
    attention : Tensor
        ``[F, H, N]`` attention of the class token to the patches per head, or ``[F, N]`` its mean over heads.
        A positive factor per frame changes nothing.
    keep : int
        K, patches kept per frame, from 1 to N.

    Returns
    -------
    Tensor
        ``[F, K]`` int64 patch ids, ascending; the lowest id wins ties.

    Raises
    ------
    MethodError
        If ``attention`` has another shape or K is out of range.
    """
    if attention.dim() not in (2, 3):
        raise MethodError(
            f"ranking patches needs attention [F, H, N] or [F, N], but the shape is {tuple(attention.shape)}."
        )
    # In half precision small probabilities round to the same value, so the mean is taken in float32.
    scores = as_float32(attention)
    scores = scores.mean(dim=1) if scores.dim() == 3 else scores
    if not 1 <= keep <= scores.shape[-1]:
        raise MethodError(f"cannot keep {keep} of {scores.shape[-1]} patches per frame; keep at least 1, at most all.")
    return top_indices(scores, keep)


@register
@dataclass
class FasterVLM(Method):
    """FasterVLM: ``round(N * retention)`` patches of every view by the attention of the class token.

    Parameters
    ----------
    signal
        ``"class"`` is the method and needs a tower with a class token. ``"received"`` ranks by the attention
        that a patch receives from all patches instead, the usual stand-in on towers without one (our choice,
        not part of the publication).
    layer
        Tower layer counted from zero; None takes the layer whose output is projected, as published.
    """

    signal: Source = "class"
    layer: int | None = None

    name: ClassVar[str] = "fastervlm"
    title: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818v1"
    venue: ClassVar[str] = "arXiv 2024"
    code: ClassVar[str] = "https://github.com/Theia-4869/FasterVLM"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    causal: ClassVar[bool] = True
    accepts_budget: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "exact on towers with a class token; signal='received' for the others is inferred; newline embeddings of "
        "any-resolution images are kept and the mosaic of tiles is ranked as one view"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal not in get_args(Source):
            raise MethodError(f"signal must be 'class' or 'received', not {self.signal!r}.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Class-token attention (or, if asked for, received attention) of the projected layer."""
        return (self._request(),)

    def _request(self) -> str:
        return f"encoder.{self.signal}_attention@{'feature' if self.layer is None else self.layer}"

    def token_count(self, layout: Layout) -> int | None:
        """``round(N * retention)`` of every view, at least one."""
        return None if self.budget is not None else int(self._counts(layout).sum())

    def _counts(self, layout: Layout) -> Tensor:
        return torch.tensor([keep_count(size, self.retention) for size in layout.patches_per_view.tolist()])

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Rank inside every view; the frame budget, where one is given, replaces the equal shares."""
        counts = self._counts(sample.layout) if sample.budget is None else sample.budget
        scores = sample.signal(self._request())
        keep = top_in_groups(scores, sample.layout.patch_view, counts)
        return Plan(keep, positions=self.position_policy, info={"token_score": scores.detach().cpu()})
