"""ToMe on projected tokens: the merging of a vision tower's blocks, applied to what the tower has made.

Based on "Token Merging: Your ViT But Faster" (arXiv 2210.09461, ICLR 2023); here the tower itself runs in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods.tome import MergeState, initial_state
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.bipartite import alternate_match, chain_groups, merge_groups, merge_weighted
from tokensieve.ops.merge import MergedTokens, MergeMap
from tokensieve.ops.similarity import as_float32

KEYS = "encoder.mean_key@feature"


def merge_tokens(features: Tensor, keys: Tensor, target: int) -> tuple[Tensor, MergeState]:
    """Merge tokens of a sequence in rounds until ``target`` are left, sizes carried along.

    Parameters
    ----------
    features : Tensor
        ``[B, T, C]``.
    keys : Tensor
        ``[B, T, d]`` what is compared; averaged with the same weights after every round.
    target : int
        Tokens to leave, from 1 to T. A round removes at most half.

    Returns
    -------
    features : Tensor
        ``[B, target, C]``.
    state : MergeState
        Sizes and members.

    Raises
    ------
    MethodError
        If shapes do not match or the target is out of range.
    """
    if features.dim() != 3 or keys.shape[:2] != features.shape[:2] or not 1 <= target <= features.shape[1]:
        raise MethodError(
            f"cannot merge to {target} tokens with features {tuple(features.shape)} and keys {tuple(keys.shape)}; pass "
            "[B, T, C], [B, T, d] and a target from 1 to T."
        )
    values, keys = as_float32(features), as_float32(keys)
    state = initial_state(values.shape[0], values.shape[1], values.device)
    while values.shape[1] > target:
        step = alternate_match(keys, values.shape[1] - target)
        keys, _ = merge_weighted(keys, state.size, step)
        values, size = merge_weighted(values, state.size, step)
        state = MergeState(size, chain_groups(state.groups, step))
    return values.to(features.dtype), state


def frames_as_merged(features: Tensor, state: MergeState) -> MergedTokens:
    """Tokens of frames ``[F, M, C]`` from `merge_tokens`, each frame sorted by the mean place of its patches."""
    frames, patches = state.groups.group.shape
    outputs = state.groups.source.shape[1]
    place = torch.arange(patches, device=features.device).float().view(1, -1, 1).expand(frames, -1, 1)
    order = merge_groups(place, state.groups)[..., 0].sort(dim=1, stable=True).indices
    start = torch.arange(frames, device=features.device).unsqueeze(1)
    source = (state.groups.source.gather(1, order) + start * patches).flatten()
    target = (order.argsort(dim=1).gather(1, state.groups.group) + start * outputs).flatten()
    weight = 1 / state.size.gather(1, state.groups.group).flatten()
    merge_map = MergeMap(torch.arange(frames * patches, device=features.device), target, weight)
    rows = features.gather(1, order.unsqueeze(2).expand_as(features)).flatten(0, 1)
    return MergedTokens(rows, source, merge_map)


@register
@dataclass
class TomeMerge(Method):
    """ToMe's merging on projected tokens: every view down to ``round(N * retention)`` by the keys of its patches."""

    name: ClassVar[str] = "tome-merge"
    title: ClassVar[str] = "ToMe (projected tokens)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    venue: ClassVar[str] = "ICLR 2023"
    code: ClassVar[str] = "https://github.com/facebookresearch/ToMe"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    causal: ClassVar[bool] = True
    uniform_views: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "inferred"
    fidelity_note: ClassVar[str] = (
        "the published method merges inside the encoder and knows no LLM; this one merges its output with the same "
        "matching and weighted average, which does not make the encoder faster"
    )

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Keys of the projected layer."""
        return (KEYS,)

    def token_count(self, layout: Layout) -> int:
        """``round(N * retention)`` of every view, at least one."""
        return sum(keep_count(size, self.retention) for size in layout.patches_per_view.tolist())

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Merge all frames at once, each inside itself."""
        features = sample.by_frame
        frames, patches = features.shape[:2]
        keys = sample.signal(KEYS).view(frames, patches, -1)
        merged = frames_as_merged(*merge_tokens(features, keys, keep_count(patches, self.retention)))
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, "occupied")
