"""FrameFusion: patches that repeat the frame before merge in the first layers, then one cut by attention.

Based on "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language Models"
(arXiv 2501.01986, ICCV 2025). In front of the LLM and behind the attention of its first layers each visual token is
compared with the one of the same cell in the frame before; similar ones are averaged into the earlier token. When
little is left to merge, one cut by the attention of the last prompt token brings the average number of tokens per
layer to the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan, Positions
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, PromptSample
from tokensieve.errors import MethodError
from tokensieve.ops.merge import mean_merge
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

NEVER = -2.0
"""Similarity of the first token of a cell, which has nothing to be merged into."""


def sparsity_left(sparsities: Sequence[float], cost: float, layers: int) -> float | None:
    """Sparsity g that, applied now and kept to the end, makes the average share of tokens equal the cost.

    Parameters
    ----------
    sparsities : sequence of float
        Share removed in every layer so far, of what was there.
    cost : float
        c, the wanted average share over all layers.
    layers : int
        NL.

    Returns
    -------
    float or None
        In [0, 1]; None where the layers so far have used up more than the cost allows.
    """
    share, spent = 1.0, 0.0
    for sparsity in sparsities:
        share *= 1 - sparsity
        spent += share
    remain = layers * cost - spent
    left = (layers - len(sparsities)) * share
    if remain < 0:
        return None
    return 0.0 if left <= 0 or remain / left > 1 else 1 - remain / left


def neighbour_similarity(states: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of every token with the one before it in the same cell (step 1 of the merging).

    Parameters
    ----------
    states : Tensor
        ``[n, D]`` in reading order.
    group : Tensor
        ``[n]`` int64 cell of every token.

    Returns
    -------
    similarity : Tensor
        ``[n]`` float32 in the order below; -2 for the first token of a cell.
    order : Tensor
        ``[n]`` int64 tokens by cell, inside a cell in reading order.
    """
    order = group.sort(stable=True).indices.to(states.device)
    cells, values = group.to(states.device)[order], as_float32(states)[order]
    norms = values.norm(dim=-1)
    cosine = torch.linalg.vecdot(values[1:], values[:-1]) / (norms[1:] * norms[:-1])
    similarity = torch.full((states.shape[0],), NEVER, device=states.device)
    similarity[1:] = torch.where(cells[1:] == cells[:-1], cosine.float(), similarity[1:])
    return torch.nan_to_num(similarity, nan=NEVER), order


def merge_runs(states: Tensor, order: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Average every run of members into the token in front of it (step 4 of the merging).

    Parameters
    ----------
    states : Tensor
        ``[n, D]``.
    order : Tensor
        ``[n]`` tokens by cell, of `neighbour_similarity`.
    members : Tensor
        ``[n]`` bool in that order; never the first token of a cell.

    Returns
    -------
    keep : Tensor
        ``[M]`` int64 tokens that are no members, ascending.
    merged : Tensor
        ``[M, D]`` their new states, means with equal weights taken in float32.
    """
    heads = ~members
    group = heads.long().cumsum(0) - 1
    merged = mean_merge(states[order], group, int(heads.sum()))
    keep = order[heads]
    ascending = keep.argsort()
    return keep[ascending], merged[ascending]


@register
@dataclass
class FrameFusion(Method):
    """FrameFusion: merging behind the attention of the first layers until little merges, then one cut.

    Parameters
    ----------
    retention
        The cost c: visual tokens per layer, averaged over all layers, as a share of those that enter.
    similarity
        sigma: tokens at least this similar to their predecessor merge. Published: 0.6, and 0.5 for Qwen2-VL and
        InternVL 2.5.
    least_ratio
        rho: merging ends with a layer that merges a smaller share than this.
    layers
        NL of the cost; None takes the depth of the model. The released code always counts 28.
    official
        Where the first layers alone cost more than allowed, fail as the released code does. By default one visual
        token is left then.
    """

    retention: float = 0.3
    similarity: float = 0.6
    least_ratio: float = 0.1
    layers: int | None = None
    official: bool = False

    name: ClassVar[str] = "framefusion"
    title: ClassVar[str] = "FrameFusion"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.01986"
    venue: ClassVar[str] = "ICCV 2025"
    code: ClassVar[str] = "https://github.com/thu-nics/FrameFusion"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    kind: ClassVar[Kind] = "merge"
    average: ClassVar[bool] = True
    lowest_layer: ClassVar[int] = 0
    cuts_separators: ClassVar[bool] = True
    published_positions: ClassVar[Positions] = "original"
    fidelity_note: ClassVar[str] = (
        "cosines and means in float32; row separators are cells of their own, as published, and trailing ones are "
        "kept; on DeepStack models it starts behind the layers that receive extra features"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("similarity", "least_ratio"):
            value = getattr(self, option)
            if not -1.0 <= value <= 1.0:
                raise MethodError(f"{option} is {value}, but it must lie between -1 and 1.")
        if self.layers is not None and self.layers < 1:
            raise MethodError(f"layers is {self.layers}, but the cost needs at least one; leave it out for the depth.")

    def decoder_cuts(self, facts: HostFacts) -> tuple[Cut, ...]:
        """In front of the first layer, and behind the attention of every layer but the last."""
        first = facts.deepstack_layers
        return (Cut(first), *(Cut(layer, "feed") for layer in range(first, facts.decoder_layers - 1)))

    def acts(self, cut: Cut, memory: dict[str, Any]) -> bool:
        """Until the cut by attention is done; in front of the first layer and in rows with visual tokens only."""
        return "sparsity" in memory and not memory.get("pruned", False)

    def read_prompt(self, sample: PromptSample) -> dict[str, Any]:
        """Nothing merged so far."""
        return {"sparsity": [], "merged": False, "pruned": False}

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM."""
        return layout.patches

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Prune if merging has ended, merge otherwise."""
        assert sample.facts is not None and sample.cut is not None and sample.cell is not None
        memory = sample.memory
        if sample.cut.point == "layer":
            # Layers in front of the first call, if any, ran on everything.
            memory["sparsity"] = [0.0] * sample.cut.layer
        bound = sparsity_left(memory["sparsity"], self.retention, self.layers or sample.facts.decoder_layers)
        if bound is None:
            if self.official:
                raise MethodError(
                    f"framefusion cannot reach a cost of {self.retention}: the first {len(memory['sparsity'])} layers "
                    "have used it up; raise the retention."
                )
            bound = 1.0
        if memory["merged"]:
            return self._prune(sample, bound)
        return self._merge(sample, bound)

    def _merge(self, sample: DecoderSample, bound: float) -> Plan:
        memory, count = sample.memory, sample.hidden.shape[0]
        assert sample.cell is not None
        cells = sample.item * (int(sample.cell.max()) + 1) + sample.cell
        similarity, order = neighbour_similarity(sample.hidden, cells)
        members = similarity >= self.similarity
        ratio = int(members.sum()) / count
        if ratio < bound:
            memory["sparsity"].append(ratio)
            memory["merged"] = ratio < self.least_ratio
        else:
            chosen = top_indices(similarity, min(int(bound * count), int((similarity > NEVER).sum())))
            members = torch.zeros_like(members)
            members[chosen] = True
            memory["merged"] = memory["pruned"] = True
        info = {"sparsity": list(memory["sparsity"])}
        if not bool(members.any()):
            return Plan(torch.arange(count), positions=self.position_policy, info=info)
        keep, merged = merge_runs(sample.hidden, order, members)
        return Plan(keep, merged, positions=self.position_policy, info=info)

    def _prune(self, sample: DecoderSample, bound: float) -> Plan:
        sample.memory["pruned"] = True
        count = max(1, round(sample.hidden.shape[0] * (1 - bound)))
        return Plan(top_indices(sample.attention, count), positions=self.position_policy)
