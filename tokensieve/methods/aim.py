"""AIM: similar tokens of a frame merged in rounds, then visual tokens ranked away layer by layer inside the LLM.

Based on "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (arXiv 2412.03248, ICCV 2025).
In front of the LLM each round halves the tokens of every frame at most: tokens at even places join their most
similar neighbours at odd places. Inside the LLM a random walk on the attention of each layer ranks the tokens, and
their number falls linearly to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.attention_walk import ITERATIONS, TEMPERATURE, walk_mass
from tokensieve.ops.bipartite import alternate_match, chain_groups, identity_groups, merge_groups
from tokensieve.ops.merge import MergedTokens, MergeMap, sort_merged
from tokensieve.ops.select import top_indices, top_mask
from tokensieve.ops.similarity import as_float32

WALK = "decoder.attention_walk"
KEYS, STATES = "encoder.joined_keys@last", "encoder.states@feature"
Metric = Literal["auto", "features", "keys"]
_WINDOWS = {28: (14, 22), 32: (13, 21)}


def merge_rounds(tokens: int, retention: float) -> list[int]:
    """Tokens to remove from a frame in every round.

    Parameters
    ----------
    tokens : int
        N, tokens of the frame.
    retention : float
        Share to keep, in (0, 1]. A power ``2^-j`` gives the published schedule ``N // 2, N // 4, ...`` of j
        rounds, which keeps a little more than the share where N is odd. Other values halve as often as they can
        and remove the rest in the last round, down to ``round(N * retention)``.

    Returns
    -------
    list of int
        Each at least 1 and at most half of the tokens left.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    """
    target = keep_count(tokens, retention)
    halvings = -math.log2(retention)
    rounds: list[int] = []
    left = tokens
    while left > 1:
        if halvings.is_integer():
            wanted = tokens >> (len(rounds) + 1) if len(rounds) < halvings else 0
        else:
            wanted = left - target
        removed = min(wanted, left // 2)
        if removed <= 0:
            break
        rounds.append(removed)
        left -= removed
    return rounds


def merge_frames(
    features: Tensor, rounds: Sequence[int], metric: Tensor | None = None, keep_order: bool = False
) -> MergedTokens:
    """Merge similar tokens inside every frame, round after round (part A).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    rounds : sequence of int
        Tokens to remove per frame and round; more than half of those left is limited to half.
    metric : Tensor, optional
        ``[F, N, c]`` what is compared; the features by default. It is merged along with them.
    keep_order : bool
        Sort the tokens of a frame by their place. As published, tokens that found no partner stand in front, by
        falling similarity, so that odd numbers of tokens are out of order.

    Returns
    -------
    MergedTokens
        ``F * M`` tokens, frame by frame; ``source`` is ``frame * N + patch``. A token is the mean of what it was in
        the round before and of those that joined it, whatever these had absorbed earlier.

    Raises
    ------
    MethodError
        If shapes do not match.
    """
    if features.dim() != 3 or (metric is not None and metric.shape[:2] != features.shape[:2]):
        raise MethodError(
            f"AIM merges features [F, N, D] by a metric [F, N, c], but the shapes are {tuple(features.shape)} and "
            f"{None if metric is None else tuple(metric.shape)}."
        )
    frames, patches = features.shape[:2]
    values, keys = as_float32(features), None if metric is None else as_float32(metric)
    groups = identity_groups(frames, patches, features.device)
    weight = torch.ones(frames, patches, device=features.device)
    for remove in rounds:
        step = alternate_match(values if keys is None else keys, remove)
        values = merge_groups(values, step)
        keys = None if keys is None else merge_groups(keys, step)
        groups = chain_groups(groups, step)
        sizes = torch.zeros(step.source.shape, device=features.device)
        sizes.scatter_add_(1, step.group, torch.ones_like(step.group, dtype=torch.float32))
        weight = weight / sizes.gather(1, groups.group)
    start = torch.arange(frames, device=features.device).unsqueeze(1)
    source = (groups.source + start * patches).flatten()
    target = (groups.group + start * groups.source.shape[1]).flatten()
    merge_map = MergeMap(torch.arange(frames * patches, device=features.device), target, weight.flatten())
    merged = MergedTokens(values.flatten(0, 1).to(features.dtype), source, merge_map)
    return sort_merged(merged) if keep_order else merged


def prune_window(layers: int) -> tuple[int, int]:
    """First pruning layer l1 and the layer l2 from which no visual token is left, for an LLM of some depth.

    Published for 28 and 32 layers; other depths scale the window of the first.
    """
    return _WINDOWS.get(layers) or (round(layers * 14 / 28), round(layers * 22 / 28))


def visual_share(layer: int, first: int, last: int) -> float:
    """Share rho of the visual tokens that goes on behind decoder layer ``layer`` (step 7), linear to 0.

    Raises
    ------
    MethodError
        If the window is empty.
    """
    if not first < last:
        raise MethodError(f"the pruning window {first}..{last} is empty; use a first layer below the last.")
    return 1.0 if layer < first else max(0.0, 1 - (layer - first + 1) / (last - first))


def attention_rank(
    logits: Tensor, total: int | None = None, temperature: float = TEMPERATURE, iterations: int = ITERATIONS
) -> Tensor:
    """Importance of tokens by a random walk on the attention of one layer (step 8).

    Parameters
    ----------
    logits : Tensor
        ``[H, L, L]`` scaled scores with the causal mask, and columns of tokens removed earlier masked too. Masked
        entries are very negative or -inf; every row needs one entry that is not.
    total : int, optional
        Length by which the start mass is divided. Pass that of the full prompt where removed tokens have really
        left, so that scores of later layers stay comparable; L by default.
    temperature, iterations : float, int
        0.1 and 5 as released; the walk has no restarts.

    Returns
    -------
    Tensor
        ``[L]`` float32, root of the mean square over heads.

    Raises
    ------
    MethodError
        If the logits have another shape.
    """
    return walk_mass(logits, total, temperature, iterations).square().mean(dim=0).sqrt()


def visible_count(visual: int, text: int, share: float) -> int:
    """Visual tokens that go on, ``int(V share + T) - T`` (step 9).

    The released rounding is over all tokens, which matters where ``V share`` is near an integer.
    """
    return max(0, int(visual * share + text) - text)


def keep_visible(importance: Tensor, visual: Tensor, visible: Tensor, share: float) -> Tensor:
    """Tokens that the next layer sees (step 9).

    Parameters
    ----------
    importance : Tensor
        ``[L]`` from `attention_rank`.
    visual, visible : Tensor
        ``[L]`` bool: visual tokens of the full prompt, and tokens not removed so far.
    share : float
        Of the original visual tokens, from `visual_share`.

    Returns
    -------
    Tensor
        ``[L]`` bool. All text tokens and ``int(V share + T) - T`` visual ones, the lowest index on ties.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if importance.shape != visual.shape or importance.shape != visible.shape:
        raise MethodError(
            f"importance and both masks must have one entry per token, but the shapes are {tuple(importance.shape)}, "
            f"{tuple(visual.shape)} and {tuple(visible.shape)}."
        )
    count, text = int(visual.sum()), int((~visual).sum())
    keep = visible_count(count, text, share)
    scores = as_float32(importance).masked_fill(~(visual & visible), float("-inf"))
    chosen = top_mask(scores, min(keep, int((visual & visible).sum())))
    return (chosen | ~visual) & visible


@register
@dataclass
class AimMerge(Method):
    """The part of AIM in front of the LLM.

    Parameters
    ----------
    retention
        Share of the tokens of every frame, see `merge_rounds`.
    keep_order
        See `merge_frames`.
    metric
        What is compared: ``"features"`` as published for video, or ``"keys"`` of the last tower layer as published for
        pictures, which merge in front of the projector then. ``"auto"`` takes the second for pictures where every patch
        of a tower with a class token is a token of the LLM.
    """

    keep_order: bool = False
    metric: Metric = "auto"

    name: ClassVar[str] = "aim-merge"
    title: ClassVar[str] = "AIM (merging)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.03248"
    venue: ClassVar[str] = "ICCV 2025"
    code: ClassVar[str] = "https://github.com/LaVi-Lab/AIM"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    causal: ClassVar[bool] = True
    uniform_views: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "exact, without the pruning inside the LLM; shares that are no power of two, newlines of grid rows, pictures "
        "in tiles and pictures of towers without class token (which compare features) are inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in get_args(Metric):
            raise MethodError(f"metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r}.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Keys and states of the tower, where pictures merge in front of the projector."""
        keys = self.metric == "keys" or (self.metric == "auto" and facts.has_class_token and facts.patch_tokens)
        return (KEYS, STATES) if keys else ()

    def token_count(self, layout: Layout) -> int:
        """Tokens left of every view by its rounds."""
        return sum(size - sum(merge_rounds(size, self.retention)) for size in layout.patches_per_view.tolist())

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Merge all frames at once."""
        features = sample.by_frame
        frames, tokens = features.shape[:2]
        rounds = merge_rounds(tokens, self.retention)
        if KEYS in sample.signals and sample.layout.kind == "image":
            if sample.project is None:
                raise MethodError(f"{self.name} merges pictures in front of the projector, which the sample lacks.")
            states, keys = (sample.signal(name).unflatten(0, (frames, tokens)) for name in (STATES, KEYS))
            merged = merge_frames(states, rounds, keys, self.keep_order)
            merged = merged._replace(features=sample.project(merged.features).to(features))
        else:
            merged = merge_frames(features, rounds, keep_order=self.keep_order)
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, "occupied")


@register
@dataclass
class Aim(AimMerge):
    """AIM as a whole: merging in front of the LLM, and fewer visual tokens behind every layer of a window.

    Parameters
    ----------
    retention
        Share of the tokens of every frame that enters the LLM; 0.25 is published for video.
    first, last
        l1 and l2: behind layer l1 (from zero) visual tokens start to leave, behind layer ``l2 - 1`` none are left.
        None takes the published window (14, 22 of 28 layers; 13, 21 of 32), scaled for other depths.
    exact
        Hide the tokens from later layers instead of removing them, as the released code does. They go on voting on the
        other tokens then, and no computation is saved. Removal chooses slightly different tokens.
    """

    first: int | None = None
    last: int | None = None
    exact: bool = False

    name: ClassVar[str] = "aim"
    title: ClassVar[str] = "AIM"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    may_be_empty: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "exact with exact=True; tokens are really removed by default, after which they rank no others; shares that are "
        "no power of two, newlines of grid rows, pictures in tiles or of towers without class token, and windows of "
        "other depths are inferred"
    )

    def window(self, facts: HostFacts) -> tuple[int, int]:
        """l1 and l2 on a host."""
        first, last = prune_window(facts.decoder_layers)
        first = max(first, facts.deepstack_layers - 1) if self.first is None else self.first
        last = max(last, first + 1) if self.last is None else self.last
        if not 0 <= first < last:
            raise MethodError(f"the pruning window {first}..{last} is empty; use a first layer below the last.")
        return first, last

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """In front of the layers behind those of the window."""
        first, last = self.window(facts)
        return tuple(layer + 1 for layer in range(first, last) if layer + 1 < facts.decoder_layers)

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """The random walk on the layer in front of the cut."""
        return (WALK,)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """The share of the layer in front of the cut, by rank."""
        assert sample.facts is not None
        share = visual_share(sample.layer - 1, *self.window(sample.facts))
        text = 0 if sample.text_item is None else sample.text_item.numel()
        keep = top_indices(sample.signal(WALK), visible_count(sample.entered, text, share))
        return Plan(keep, positions="original", fate="hidden" if self.exact else "gone")
