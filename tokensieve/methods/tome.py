"""ToMe: tokens of a vision transformer merged by the similarity of their keys, a few in every block.

Based on "Token Merging: Your ViT But Faster" (arXiv 2210.09461, ICLR 2023). Between attention and feed-forward part
of every block, tokens at even places propose the token at an odd place with the most similar key; the best r
proposals are accepted and averaged by the number of patches each token stands for. Attention logits get the
logarithm of that number, so that a merged token counts as often as its patches.

`Tome` does this inside the vision tower of a model; `TomeMerge` applies the same merging to the projected tokens in
front of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.core.tower import Block, TowerProgram, TowerSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.bipartite import (
    TokenGroups,
    alternate_match,
    chain_groups,
    identity_groups,
    merge_weighted,
    unmerge_groups,
)
from tokensieve.ops.merge import MergeMap
from tokensieve.ops.similarity import as_float32

BLOCKS = "tower.blocks"
GROUPS = "encoder.groups"
Output = Literal["auto", "tokens", "unmerge"]
Attend = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Feed = Callable[[Tensor], Tensor]


class MergeState(NamedTuple):
    """What merged tokens stand for, carried from block to block.

    Attributes
    ----------
    size : Tensor
        ``[B, T]`` float32 number of patches of every token.
    groups : TokenGroups
        Partition of the tokens that entered the first block.
    """

    size: Tensor
    groups: TokenGroups


def merge_schedule(layers: int, r: int | Sequence[int], inflect: float = 0.0) -> list[int]:
    """Tokens to remove in every block ("r schedules").

    Parameters
    ----------
    layers : int
        L, blocks.
    r : int or sequence of int
        Mean number per block, or the numbers themselves; missing blocks remove none.
    inflect : float
        0 constant, -1 falling from 2r to 0 (the paper's decreasing schedule), 1 rising.

    Returns
    -------
    list of int
        L numbers, fractions cut off.

    Raises
    ------
    MethodError
        If a sequence has more entries than there are blocks, or there is no block.
    """
    if layers < 1 or (not isinstance(r, int) and len(r) > layers):
        raise MethodError(f"a schedule for {layers} blocks needs at least one block and at most one number for each.")
    if not isinstance(r, int):
        return [*r, *[0] * (layers - len(r))]
    low = int(r * (1 - inflect))
    step = (2 * r - low - low) / max(layers - 1, 1)
    return [int(low + step * layer) for layer in range(layers)]


def tokens_after(tokens: int, schedule: Sequence[int], protected: int = 0) -> list[int]:
    """Tokens behind every block; at most half of those that are not protected are removed in one block."""
    counts = []
    for r in schedule:
        tokens -= max(0, min(r, (tokens - protected) // 2))
        counts.append(tokens)
    return counts


def spread_schedule(tokens: int, target: int, layers: int) -> list[int]:
    """Tokens to remove in every block so that ``target`` are left, as evenly as halving allows.

    Parameters
    ----------
    tokens, target : int
        Patches in front of the first block and behind the last one. A block removes at most half, so that more are
        left where the blocks are too few.
    layers : int
        Blocks.
    """
    # How many may enter each block so that those behind it can still reach the target.
    most, schedule = [target], []
    for _ in range(layers):
        most.append(2 * most[-1])
    for left in range(layers, 0, -1):
        even = -(-(tokens - target) // left)
        schedule.append(min(max(even, tokens - most[left - 1]), tokens // 2))
        tokens -= schedule[-1]
    return schedule


def initial_state(batch: int, tokens: int, device: torch.device | None = None) -> MergeState:
    """Every token stands for itself."""
    return MergeState(torch.ones(batch, tokens, device=device), identity_groups(batch, tokens, device))


def source_map(groups: TokenGroups) -> Tensor:
    """Which tokens each output is made of (step 9): bool ``[B, M, T]``, one True in every column."""
    outputs = torch.arange(groups.source.shape[1], device=groups.group.device)
    return groups.group.unsqueeze(1) == outputs.unsqueeze(1)


def proportional_bias(size: Tensor) -> Tensor:
    """Term ``[B, 1, 1, T]`` to add to attention logits: the logarithm of the sizes of the keys (step 10)."""
    return as_float32(size).log()[:, None, None, :]


def merge_block(
    values: Tensor,
    state: MergeState,
    attend: Attend,
    feed: Feed,
    r: int,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    proportional: bool = True,
) -> tuple[Tensor, MergeState]:
    """One transformer block with merging between its two parts (steps 10 to 12).

    Parameters
    ----------
    values : Tensor
        ``[B, T, C]`` tokens that enter the block.
    state : MergeState
        From the block before, or `initial_state`.
    attend : callable
        ``(values, bias) -> (update, keys)``: output ``[B, T, C]`` of norm and attention with the bias (or None)
        added to its logits, and keys ``[B, T, d]`` averaged over heads, as the projection gives them.
    feed : callable
        ``values -> update``: norm and feed-forward part.
    r : int
        Tokens to remove here.
    class_token, distill_token : bool
        Tokens in front that take no part.
    proportional : bool
        Proportional attention; off for encoders trained as masked autoencoders and used as they are.

    Returns
    -------
    values : Tensor
        ``[B, T', C]``.
    state : MergeState
        For the next block.
    """
    # Sizes of one change nothing but the kernel, and r = 0 must leave the block as it is, bit for bit.
    merged_before = state.size.shape[1] < state.groups.group.shape[1]
    update, keys = attend(values, proportional_bias(state.size) if proportional and merged_before else None)
    values = values + update
    if r > 0:
        step = alternate_match(keys, r, class_token=class_token, distill_token=distill_token)
        if step.source.shape[1] < values.shape[1]:
            values, size = merge_weighted(values, state.size, step)
            state = MergeState(size, chain_groups(state.groups, step))
    return values + feed(values), state


def restore(values: Tensor, state: MergeState) -> Tensor:
    """Copy merged tokens ``[B, M, C]`` back to all places they stand for, ``[B, T, C]``, for hosts that need a grid."""
    return unmerge_groups(values, state.groups)


def weighted_pool(values: Tensor, state: MergeState, protected: int = 0) -> Tensor:
    """Mean ``[B, C]`` over patches of the tokens ``[B, M, C]`` behind the ``protected`` first ones (step 13)."""
    size = as_float32(state.size)[:, protected:].unsqueeze(2)
    return ((as_float32(values)[:, protected:] * size).sum(dim=1) / size.sum(dim=1)).to(values.dtype)


class MergeProgram(TowerProgram):
    """Merging in every block by a schedule.

    Parameters
    ----------
    schedule : sequence of int
        Tokens to remove in every block.
    class_token : bool
        Whether a class token stands in front.
    proportional : bool
        Proportional attention.
    """

    def __init__(self, schedule: Sequence[int], class_token: bool, proportional: bool = True) -> None:
        self.schedule, self.class_token, self.proportional = schedule, class_token, proportional

    def merge(self, block: Block) -> TokenGroups | None:
        """Match by the keys, mean over heads (steps 10 and 11)."""
        r = self.schedule[block.layer]
        if r <= 0:
            return None
        return alternate_match(as_float32(block.k).mean(dim=1), r, class_token=self.class_token)


def tokens_of_groups(group: Tensor) -> tuple[Tensor, MergeMap]:
    """Tokens that stand for the groups of an item's patches, in the order of the mean places of their patches.

    Parameters
    ----------
    group : Tensor
        ``[n]`` int64 any number that tells the groups apart.

    Returns
    -------
    source : Tensor
        ``[M]`` int64 the patch of every group nearest to its mean place, the first of two.
    merge_map : MergeMap
        All patches, in equal parts.
    """
    member = group.unique(return_inverse=True)[1]
    size = torch.bincount(member)
    place = torch.arange(group.numel(), device=group.device, dtype=torch.float64)
    mean = torch.zeros(size.numel(), dtype=torch.float64, device=group.device).index_add(0, member, place) / size
    order = mean.sort(stable=True).indices
    rank = order.argsort()
    target = rank[member]
    distance = (place - mean[member]).abs()
    by_distance = distance.sort(stable=True).indices
    by_group = by_distance[target[by_distance].sort(stable=True).indices]
    size = size[order]
    first = size.cumsum(0) - size
    return by_group[first], MergeMap(place.long(), target, (1.0 / size.float())[target])


@register
@dataclass
class Tome(Method):
    """ToMe inside the vision tower: every block up to the projected one merges some tokens of every picture.

    Parameters
    ----------
    r
        Tokens that a block removes, instead of the even spread that leaves ``retention``; retention then only says
        whether to act at all. Published: 8 (ViT-L at 224 pixels), 23 (at 384), 16 (ViT-B).
    inflect
        With ``r``: 0 constant, -1 falling from 2r to 0, 1 rising.
    proportional
        Merged tokens count in attention as often as their patches. Off for towers trained as masked autoencoders.
    output
        ``"tokens"`` sends the merged tokens to the LLM, which needs a host without pooling; ``"unmerge"`` copies
        them back to all places, which saves time in the tower only and leaves the tokens stage to another method;
        ``"auto"`` does the first where it can be done, otherwise the second.
    """

    r: int | None = None
    inflect: float = 0.0
    proportional: bool = True
    output: Output = "auto"

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    venue: ClassVar[str] = "ICLR 2023"
    code: ClassVar[str] = "https://github.com/facebookresearch/ToMe"
    stages: ClassVar[tuple[Stage, ...]] = ("encoder", "tokens")
    kind: ClassVar[Kind] = "merge"
    causal: ClassVar[bool] = True
    exact_count: ClassVar[bool] = False
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "merging inside the blocks is exact; the paper knows classifiers only, so that what happens behind the tower "
        "(tokens in the order of their mean places, or copied back where the host pools) is ours"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output not in get_args(Output):
            raise MethodError(f"output is {self.output!r}, but tome knows {', '.join(get_args(Output))}.")
        if self.r is not None and self.r < 1:
            raise MethodError(f"r is {self.r}, but a block must remove at least 1 token; leave r out for the spread.")
        if not -1 <= self.inflect <= 1:
            raise MethodError(f"inflect is {self.inflect}; use a number from -1 (falling) to 1 (rising).")
        if self.output == "unmerge":
            vars(self)["stages"] = ("encoder",)

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Keys of every block; where the merged tokens enter the LLM also which patches they stand for."""
        enter = self.output == "tokens" or (self.output == "auto" and facts.patch_tokens)
        return (BLOCKS, GROUPS) if enter and self.retention < 1.0 else (BLOCKS,)

    def token_count(self, layout: Layout) -> int | None:
        """Not known from geometry: it depends on the host whether the LLM reads merged tokens."""
        return None

    def tower_program(self, sample: TowerSample) -> TowerProgram:
        """The schedule for these pictures."""
        if self.r is not None:
            schedule = merge_schedule(sample.layers, self.r, self.inflect)
        else:
            target = keep_count(sample.patches, self.retention)
            schedule = spread_schedule(sample.patches, target, sample.layers)
        return MergeProgram(schedule, sample.class_token, self.proportional)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """One token for every group; all places where the host pooled the restored grid."""
        if GROUPS not in sample.signals:
            return keep_all(sample.layout.patches, self.position_policy)
        source, merge_map = tokens_of_groups(sample.signal(GROUPS).round().long())
        return Plan(source, None, merge_map, self.position_policy, "occupied")
