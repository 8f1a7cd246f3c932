"""FlashVID: attended and diverse tokens of every frame, and trees over time for the others.

Based on "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging"
(arXiv 2602.08024, ICLR 2026). In front of the LLM each frame keeps a set of tokens that is both attended and diverse
(ADTS); the rest of a segment is linked over time into trees that are averaged (TSTM) and clustered to the budget.
Somewhat more tokens than asked for enter the LLM, and a cut in front of a late layer makes up for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan, SeparatorRule
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import check_retention, keep_count, round_half_even
from tokensieve.ops.maxmin import greedy_max_min
from tokensieve.ops.merge import MergedTokens, MergeMap, join_merged, mean_merge, sort_merged, unmerged
from tokensieve.ops.peaks import ragged_clusters
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, unit_vectors
from tokensieve.ops.transitions import segment_transitions, transition_similarity
from tokensieve.ops.tree import link_frames, previous_frame_matches, tree_means

ALPHA = 0.7
LINK = 0.8
CUT = 0.9
NEIGHBOURS = 7
CALIBRATION = 1e6

Selection = Literal["attention", "diversity", "attended", "attended_event"]


def frame_budget(tokens: int, retention: float, expansion: float = 1.25, alpha: float = ALPHA) -> tuple[int, int]:
    """Tokens per frame that are selected and that merging makes (step 0).

    Parameters
    ----------
    tokens : int
        N.
    retention, expansion : float
        R and f; ``ceil(N R f)`` tokens per frame, at most N.
    alpha : float
        Share of the selected ones, rounded up.

    Returns
    -------
    selected, merged : int
        n_a and n_t.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    """
    total = min(tokens, math.ceil(tokens * check_retention(retention) * expansion))
    selected = math.ceil(total * alpha)
    return selected, total - selected


def attended_diverse(
    features: Tensor,
    attention: Tensor,
    count: int,
    segments: list[tuple[int, int]],
    selection: Selection = "attended",
    *,
    exclude: bool = True,
) -> Tensor:
    """Tokens of every frame that are attended and far from each other (ADTS, step 2).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    attention : Tensor
        ``[F, N]`` received in the encoder.
    count : int
        n_a, tokens per frame.
    segments : list of (int, int)
        First and last frame of every segment.
    selection : str
        ``attended`` (v1) scales the cosine distances to a token by its attention; ``attended_event`` (v2) also by
        its mean product with the frame means of its segment; ``diversity`` scales nothing; ``attention`` takes the
        most attended tokens.
    exclude : bool
        False lets v2 choose a token twice, as the released code can.

    Returns
    -------
    Tensor
        ``[F, n_a]`` int64, ascending.

    Raises
    ------
    MethodError
        If the selection is unknown.
    """
    if selection not in get_args(Selection):
        raise MethodError(f"selection '{selection}' is unknown; use one of {', '.join(get_args(Selection))}.")
    if selection == "attention":
        return top_indices(attention, count)
    units = unit_vectors(features)
    distances = 1 - units @ units.transpose(1, 2)
    if selection != "diversity":
        distances *= (as_float32(attention) * CALIBRATION).unsqueeze(1)
    if selection == "attended_event":
        means = as_float32(features).mean(dim=1)
        for first, last in segments:
            # The mean product with several vectors is the product with their mean.
            event = as_float32(features[first : last + 1]) @ means[first : last + 1].mean(dim=0)
            distances[first : last + 1] *= event.unsqueeze(1)
    repeats = selection == "attended_event" and not exclude
    return greedy_max_min(distances, count, exclude=not repeats).sort(dim=1).values


def merge_trees(
    features: Tensor,
    selected: Tensor,
    segments: list[tuple[int, int]],
    budget: tuple[int, int],
    *,
    threshold: float = LINK,
    official: bool = False,
) -> MergedTokens:
    """Average the tokens that were not selected over time and space (TSTM, steps 3 and 4).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    selected : Tensor
        ``[F, N]`` bool.
    segments : list of (int, int)
        First and last frame of every segment.
    budget : (int, int)
        n_a and n_t.
    threshold : float
        Cosine above which a token is linked to one of the frame before.
    official : bool
        Divide the sum of a tree by one more than the number of the root's own children, whatever hangs on these (a
        chain of four equal tokens doubles), and let a frame that is a segment of its own cluster its selected tokens
        again. By default a tree becomes its mean and selected tokens stay out.

    Returns
    -------
    MergedTokens
        Merged tokens, frame by frame; with ``official`` a source may also be a selected token.
    """
    trees = link_frames(*previous_frame_matches(features, ~selected), segments, threshold, sum(budget))
    survives = ~trees.linked & ~selected
    if official:
        for first, last in segments:
            survives[first] |= first == last
    sizes = survives.sum(dim=1).tolist()
    counts: list[int] = []
    for first, last in segments:
        share = budget[1] * (last - first + 1) / max(1, sum(sizes[first : last + 1]))
        counts += [math.ceil(size * share) if share < 1 else size for size in sizes[first : last + 1]]
    means = tree_means(features, trees, survives, by_children=official)
    members, wanted = torch.tensor([sizes, counts], device=features.device)
    label, heads = ragged_clusters(means.features, members, wanted, NEIGHBOURS, strict=official)
    merged = mean_merge(means.features, label, heads.numel()).to(features.dtype)
    source, slot, weight = means.merge_map
    weight = weight / torch.bincount(label, minlength=heads.numel())[label[slot]]
    return MergedTokens(merged, means.source[heads], MergeMap(source, label[slot], weight))


def flash_merge(
    features: Tensor,
    attention: Tensor,
    budget: tuple[int, int],
    segments: list[tuple[int, int]],
    *,
    selection: Selection = "attended",
    threshold: float = LINK,
    official: bool = False,
) -> tuple[MergedTokens, Tensor]:
    """The part in front of the LLM on one video (steps 2 to 5).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features.
    attention : Tensor
        ``[F, N]`` mean attention that each patch receives in the last used encoder layer, pooled like the features.
    budget : (int, int)
        n_a and n_t of `frame_budget`.
    segments : list of (int, int)
        First and last frame of every segment.
    selection, threshold, official
        See `attended_diverse` and `merge_trees`; ``official`` also lets v2 choose a token twice.

    Returns
    -------
    merged : MergedTokens
        Ascending by ``frame * N + patch``. With ``official`` a position may occur twice.
    selected : Tensor
        ``[F, n_a]`` selected tokens of every frame.

    Raises
    ------
    MethodError
        If shapes do not match.
    """
    if features.dim() != 3 or attention.shape != features.shape[:2]:
        raise MethodError(
            f"FlashVID needs features [F, N, D] and attention [F, N], but the shapes are {tuple(features.shape)} and "
            f"{tuple(attention.shape)}."
        )
    frames, tokens, _ = features.shape
    selected = attended_diverse(features, attention, budget[0], segments, selection, exclude=not official)
    mask = torch.zeros(frames, tokens, dtype=torch.bool, device=features.device).scatter_(1, selected, True)
    starts = torch.arange(frames, device=features.device).unsqueeze(1) * tokens
    parts = [unmerged(features.flatten(0, 1), (starts + selected).flatten())]
    if budget[1] > 0:
        parts.append(merge_trees(features, mask, segments, budget, threshold=threshold, official=official))
    return sort_merged(join_merged(parts)), selected


def prune_visual(attention: Tensor, share: float) -> Tensor:
    """Visual tokens that go on into the LLM's later layers (step 6).

    Parameters
    ----------
    attention : Tensor
        ``[V]`` attention of the last prompt token in the layer before, mean over heads.
    share : float
        ``ceil(V share)`` tokens stay.

    Returns
    -------
    Tensor
        Ascending ids, int64.
    """
    return top_indices(attention, keep_count(attention.numel(), share, "ceil"))


def _separated(merged: MergedTokens, per_frame: int, total: int, replace: bool) -> MergedTokens:
    """Give every output token a position of its own: drop the first of two, or move the second one."""
    again = torch.zeros_like(merged.source, dtype=torch.bool)
    again[1:] = merged.source[1:] == merged.source[:-1]
    crowded = bool((torch.bincount(torch.div(merged.source, per_frame, rounding_mode="floor")) > per_frame).any())
    if replace or crowded:
        stays = torch.ones_like(again)
        stays[:-1] = ~again[1:]
        place = stays.cumsum(0) - 1
        old = merged.merge_map
        kept = stays[old.target]
        merge_map = MergeMap(old.source[kept], place[old.target[kept]], old.weight[kept])
        return MergedTokens(merged.features[stays], merged.source[stays], merge_map)
    taken = torch.zeros(total, dtype=torch.bool, device=again.device)
    taken[merged.source] = True
    source = merged.source.clone()
    for row in again.nonzero()[:, 0].tolist():
        start = int(source[row]) // per_frame * per_frame
        source[row] = start + (~taken[start : start + per_frame]).nonzero()[0, 0]
        taken[source[row]] = True
    return merged._replace(source=source)


@register
@dataclass
class FlashVID(Method):
    """FlashVID with its parts in front of the LLM and inside it.

    Parameters
    ----------
    retention
        Visual tokens per layer, averaged over the layers of the LLM, as published. More enter the LLM (see
        ``expansion``) and fewer leave it.
    alpha
        Share of the tokens of a frame that is selected; the others are merged.
    selection
        See `attended_diverse`; None takes v2 on one position axis and v1 on three, as published.
    cut, segments
        Cosine of mean frames below which a segment ends, and the smallest number of segments; None takes 8 on one
        position axis and 4 on three.
    link
        Cosine above which a token is linked to one of the frame before.
    expansion
        Factor of the retention in front of the LLM. None takes what the cut inside makes up for, which is 1.25 in
        all published settings, and 1 without the inner part.
    inner
        Also cut inside the LLM.
    inner_layer
        Layer in front of which it cuts; None takes 20 of 28, 28 of 36 on models with DeepStack, or the same share of
        another depth.
    inner_share
        Share of the visual tokens that goes on; None takes 0.3, and 0.1 on models with DeepStack.
    official
        Count the members of a tree as the released code does, see `merge_trees`. Of two tokens at one position the
        merged one moves to a free patch of its frame on one position axis, and replaces the other on three.
    """

    alpha: float = ALPHA
    selection: Selection | None = None
    cut: float = CUT
    segments: int | None = None
    link: float = LINK
    expansion: float | None = None
    inner: bool = True
    inner_layer: int | None = None
    inner_share: float | None = None
    official: bool = False

    name: ClassVar[str] = "flashvid"
    title: ClassVar[str] = "FlashVID"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.08024"
    venue: ClassVar[str] = "ICLR 2026"
    code: ClassVar[str] = "https://github.com/Fanziyang-v/FlashVID"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = "trees are true means unless official=True"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection is not None and self.selection not in get_args(Selection):
            raise MethodError(f"selection '{self.selection}' is unknown; use one of {', '.join(get_args(Selection))}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise MethodError(f"alpha is {self.alpha}, but it is a share from 0 to 1; the published value is 0.7.")
        if self.inner_share is not None and not 0.0 < self.inner_share <= 1.0:
            raise MethodError(f"inner_share is {self.inner_share}, but it must be above 0 and at most 1; try 0.3.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention received in the last used tower layer."""
        return ("encoder.received_attention@feature",)

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """The layer of the inner part."""
        if not self.inner:
            return ()
        if self.inner_layer is not None:
            return (self.inner_layer,)
        share = 28 / 36 if facts.deepstack_layers else 20 / 28
        return (max(1, facts.deepstack_layers, round_half_even(facts.decoder_layers * share)),)

    def token_count(self, layout: Layout) -> int | None:
        """Rounding up per frame depends on how the video moves."""
        return None

    def _inner_share(self, facts: HostFacts | None) -> float:
        if self.inner_share is not None:
            return self.inner_share
        return 0.1 if facts is not None and facts.deepstack_layers else 0.3

    def _expansion(self, facts: HostFacts | None) -> float:
        if self.expansion is not None:
            return self.expansion
        if not self.inner:
            return 1.0
        if facts is None:
            return 1.25
        layer, layers = self.decoder_layers(facts)[0], facts.decoder_layers
        # The quotient is 1.25 up to float noise on published hosts; noise must not reach the rounding up.
        return round(layers / (layer + (layers - layer) * self._inner_share(facts)), 9)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Selection and merging on one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        attention = sample.signal("encoder.received_attention@feature").to(features.device)
        several_axes = sample.facts is not None and sample.facts.position_axes > 1
        minimum = self.segments or (4 if several_axes else 8)
        similarity = transition_similarity(as_float32(features).mean(dim=1))
        segments = segment_transitions(similarity, self.cut, minimum)
        merged, selected = flash_merge(
            features,
            attention.view(features.shape[:2]),
            frame_budget(features.shape[1], self.retention, self._expansion(sample.facts), self.alpha),
            segments,
            selection=self.selection or ("attended" if several_axes else "attended_event"),
            threshold=self.link,
            official=self.official,
        )
        if self.official:
            merged = _separated(merged, features.shape[1], features.shape[0] * features.shape[1], several_axes)
        info = {"segments": torch.tensor(segments), "selected": selected}
        # The released code runs LLaVA-Video with one newline behind every frame, empty ones too.
        rule: SeparatorRule = "per-frame" if sample.layout.kind == "video" else "occupied"
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, rule, info=info)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """The most attended share of the visual tokens of one prompt (step 6)."""
        return Plan(prune_visual(sample.attention, self._inner_share(sample.facts)), positions="original")
