"""FoPru: the patches, or the image rows, that stand out in the attention of the vision encoder.

Based on "FoPru: Focal Pruning for Efficient Large Vision-Language Models" (arXiv 2411.14164). The significance of
a patch is the attention it receives from the other patches or the attention it gives to them, whichever differs
more between patches. Every image or frame is pruned alone, with or without regard for whole rows.

Where the tower has no class token every patch gives the same total attention, and received attention decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.grouped import top_in_groups
from tokensieve.ops.similarity import as_float32

Strategy = Literal["rank", "row"]


def attention_means(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Attention received and given by every patch (steps 2 and 3).

    Parameters
    ----------
    attention : Tensor
        ``[F, H, N, N]`` softmax attention of the penultimate encoder layer; rows and column of a class token cut
        away and the rest not renormalised.

    Returns
    -------
    received, given : Tensor
        ``[F, N]`` float32: mean over heads and rows, and over heads and columns.

    Raises
    ------
    MethodError
        If the maps are not square.
    """
    if attention.dim() != 4 or attention.shape[2] != attention.shape[3]:
        raise MethodError(f"FoPru needs attention [F, H, N, N], but the shape is {tuple(attention.shape)}.")
    # Scores are of the order 1/N and their variances far below what half precision can hold.
    mean = as_float32(attention).mean(dim=1)
    return mean.mean(dim=1), mean.mean(dim=2)


def grouped_variance(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Variance of the scores of each group around its own mean, float64 ``[groups]``; 0 for an empty one."""
    values = scores.double()
    group = group.to(values.device)
    sizes = torch.bincount(group, minlength=groups).clamp_min(1)
    mean = torch.bincount(group, values, groups) / sizes
    return torch.bincount(group, (values - mean[group]).square(), groups) / sizes


def significance(received: Tensor, given: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Significance of every patch under the variance rule (step 4).

    Parameters
    ----------
    received, given : Tensor
        ``[n]`` from `attention_means`, patches of all frames one after the other.
    group : Tensor
        ``[n]`` int64 frame of every patch.

    Returns
    -------
    scores : Tensor
        ``[n]``, per frame ``received`` if its variance is larger than that of ``given``, else ``given``.
    by_given : Tensor
        ``[F]`` bool, frames where the given attention decides.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if received.shape != given.shape or received.shape != group.shape or received.dim() != 1:
        raise MethodError(
            f"the variance rule needs two scores and a frame per patch, but the shapes are {tuple(received.shape)}, "
            f"{tuple(given.shape)} and {tuple(group.shape)}."
        )
    group = group.to(received.device)
    frames = int(group.max()) + 1 if group.numel() else 0
    by_given = grouped_variance(received, group, frames) <= grouped_variance(given, group, frames)
    return torch.where(by_given[group], as_float32(given), as_float32(received)), by_given


def select_rank(scores: Tensor, group: Tensor, retention: float) -> Tensor:
    """Best ``max(1, round(r * N))`` patches of every frame (step 5).

    Parameters
    ----------
    scores : Tensor
        ``[n]`` from `significance`.
    group : Tensor
        ``[n]`` int64 frame of every patch.
    retention : float
        r, in (0, 1].

    Returns
    -------
    Tensor
        Ascending ids, int64; the lowest id wins ties.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    """
    sizes = torch.bincount(group).tolist()
    return top_in_groups(scores, group, torch.tensor([keep_count(size, retention) for size in sizes]))


def select_rows(scores: Tensor, group: Tensor, row: Tensor, retention: float) -> Tensor:
    """All patches of the best ``max(1, round(r * h))`` grid rows of every frame (step 6).

    Parameters
    ----------
    scores : Tensor
        ``[n]`` from `significance`.
    group, row : Tensor
        ``[n]`` int64 frame and grid row of every patch. A row scores the mean of the patches it has.
    retention : float
        r, in (0, 1].

    Returns
    -------
    Tensor
        Ascending ids, int64.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    """
    group, row = group.to(scores.device), row.to(scores.device)
    key = group * (int(row.max()) + 1) + row
    lines, line = key.unique(return_inverse=True)
    means = torch.bincount(line, scores.double()) / torch.bincount(line)
    owner = lines.div(int(row.max()) + 1, rounding_mode="floor")
    chosen = select_rank(means, owner, retention)
    return torch.isin(line, chosen).nonzero().flatten()


@register
@dataclass
class FoPru(Method):
    """FoPru: focal pruning of every view.

    Parameters
    ----------
    strategy
        ``"rank"`` keeps the best patches, ``"row"`` the best grid rows as a whole (for text lines and the like);
        rows are counted in whole numbers, so the share kept can differ from the retention.
    layer
        Tower layer counted from zero; None takes the layer whose output is projected, which is the penultimate one
        on the published hosts.
    """

    strategy: Strategy = "rank"
    layer: int | None = None

    name: ClassVar[str] = "fopru"
    title: ClassVar[str] = "FoPru"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"
    venue: ClassVar[str] = "arXiv 2024"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    causal: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "inferred"
    fidelity_note: ClassVar[str] = (
        "written from the paper's rules without released code; rounding, the class token's row and column, tiles "
        "ranked as one mosaic and use on video are inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in get_args(Strategy):
            raise MethodError(f"strategy must be 'rank' or 'row', not {self.strategy!r}.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention among patches; both directions where a class token makes the given one differ."""
        names = ("patch", "given") if facts.has_class_token else ("received",)
        return tuple(f"encoder.{name}_attention@{'feature' if self.layer is None else self.layer}" for name in names)

    def token_count(self, layout: Layout) -> int | None:
        """Of every view ``round(N * r)`` patches, or ``round(h * r)`` rows; None where rows have gaps."""
        if self.strategy == "rank":
            return sum(keep_count(size, self.retention) for size in layout.patches_per_view.tolist())
        if layout.patches != sum(rows * columns for rows, columns in layout.views):
            return None
        return sum(keep_count(rows, self.retention) * columns for rows, columns in layout.views)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Prune every view by the same share."""
        assert sample.facts is not None
        group = sample.layout.patch_view
        first, *second = (sample.signal(request) for request in self.signals(sample.facts))
        if second:
            scores, by_given = significance(first, second[0], group)
        else:
            scores, by_given = as_float32(first), torch.zeros(sample.frames, dtype=torch.bool)
        if self.strategy == "rank":
            keep = select_rank(scores, group, self.retention)
        else:
            keep = select_rows(scores, group, sample.layout.row[sample.layout.patch_tokens], self.retention)
        info = {"token_score": scores.detach().cpu(), "by_given_attention": by_given.cpu()}
        return Plan(keep, positions=self.position_policy, separators="occupied", info=info)
