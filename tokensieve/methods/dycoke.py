"""DyCoke: patches that repeat a frame of the same window leave, and decoding looks at a changing part of the rest.

Based on "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (arXiv 2411.15024, CVPR 2025).
Temporal token merging (which drops tokens, in spite of its name) acts in front of the LLM on windows of four frames.
Dynamic pruning hides keys of the cache while decoding and loses nothing for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Method, Stage
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, StepSample, TokenSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.methods.controls import middles
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import UNIT_EPSILON, as_float32

WINDOW = 4
UPDATE = 0.9

Order = Literal["raster", "similarity"]


def pruned_frames(frames: int, official: bool = False) -> Tensor:
    """Frames that lose patches: all but the first one of every window of four.

    Parameters
    ----------
    frames : int
        F.
    official : bool
        Bounds of the released loops: the third frame of a last full window stays whole.

    Returns
    -------
    Tensor
        ``[F]`` bool.
    """
    pruned = torch.arange(frames) % WINDOW != 0
    if official and frames % WINDOW == 0:
        pruned[frames - 2] = False
    return pruned


def frame_counts(frames: int, tokens: int, removed: float, official: bool = False) -> Tensor:
    """Tokens that every frame keeps for a published share K (stage 1, steps 1 and 2).

    Parameters
    ----------
    frames, tokens : int
        F and N.
    removed : float
        K in [0, 1]; a pruned frame keeps ``int((1 - K) N)`` tokens.
    official : bool
        Bounds of the released loops: an odd last frame goes entirely, see also `pruned_frames`.

    Returns
    -------
    Tensor
        ``[F]`` int64.

    Raises
    ------
    MethodError
        If K is outside [0, 1], or the released loops fail on so few frames.
    """
    if not 0.0 <= removed <= 1.0:
        raise MethodError(f"the removed share is {removed}, but it lies between 0 and 1; the published value is 0.7.")
    if official and frames <= WINDOW:
        raise MethodError(f"the released loops need more than {WINDOW} frames, but there are {frames}.")
    counts = torch.full((frames,), tokens)
    counts[pruned_frames(frames, official)] = int((1 - removed) * tokens)
    if official and frames % 2:
        counts[-1] = 0
    return counts


def counts_for_budget(frames: int, tokens: int, total: int) -> tuple[Tensor, Tensor]:
    """Frames to use and tokens per frame that add up to a total (ours).

    The first frame of every window is whole, so that a quarter of the tokens is the least the method can keep. For
    fewer, evenly spaced frames are taken first.

    Parameters
    ----------
    frames, tokens : int
        F and N.
    total : int
        Tokens to keep; at least one whole frame is kept.

    Returns
    -------
    chosen : Tensor
        ``[M]`` int64 frames, ascending.
    counts : Tensor
        ``[M]`` int64 tokens of each.
    """
    whole = total // tokens
    used = frames if whole >= -(-frames // WINDOW) else max(1, whole * WINDOW)
    pruned = pruned_frames(used)
    places, rest = int(pruned.sum()), max(0, total - int((~pruned).sum()) * tokens)
    counts = torch.full((used,), tokens)
    if places:
        base, extra = divmod(rest, places)
        counts[pruned] = base + (torch.arange(places) < extra).long()
    return middles(frames, used), counts


def temporal_pruning(features: Tensor, counts: Tensor, order: Order = "raster") -> Tensor:
    """Patches of every frame that differ most from the frame they are compared with (stage 1).

    The second and fourth frame of a window are compared with the frame before, the third one with the first.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    counts : Tensor
        ``[F]`` int64 tokens to keep of every frame.
    order : {"raster", "similarity"}
        Order of the tokens inside a frame that loses some; the released code leaves them in the order of rising
        similarity.

    Returns
    -------
    Tensor
        ``[M]`` int64 ``frame * N + patch``, frame by frame.

    Raises
    ------
    MethodError
        If the order is unknown.
    """
    if order not in ("raster", "similarity"):
        raise MethodError(f"order '{order}' is unknown; use 'raster' or 'similarity'.")
    frames, tokens, _ = features.shape
    similarity = torch.zeros(frames, tokens, device=features.device)
    before = torch.tensor([0, 1, 2, 1])[torch.arange(frames) % WINDOW]
    for frame in ((before > 0) & (counts < tokens).cpu()).nonzero()[:, 0].tolist():
        here, there = as_float32(features[frame]), as_float32(features[frame - int(before[frame])])
        lengths = here.norm(dim=-1) * there.norm(dim=-1)
        similarity[frame] = (torch.linalg.vecdot(here, there) / lengths.clamp_min(UNIT_EPSILON)).float()
    ranked = similarity.sort(dim=1, stable=True).indices
    inside = torch.arange(tokens, device=features.device) < counts.to(features.device).unsqueeze(1)
    flat = ranked + torch.arange(frames, device=features.device).unsqueeze(1) * tokens
    kept = flat[inside]
    return kept if order == "similarity" else kept.sort().values


@dataclass
class DynamicPruning:
    """Which keys the later layers see while one answer is decoded (stage 2).

    Parameters
    ----------
    start, length : int
        The visual block of the cache.
    hidden_share : float
        P: ``int(length (1 - P))`` visual keys are visible.
    reuse : bool
        Go on with the earlier choice while the attention hardly changes. The released code shows the whole cache in
        such steps (False).
    update : float
        The choice is renewed when the cosine of the attention with that of the step before is below this.

    Attributes
    ----------
    similarity : float
        Cosine of the last two steps; 0 in the first one.
    """

    start: int
    length: int
    hidden_share: float = 0.7
    reuse: bool = True
    update: float = UPDATE

    def __post_init__(self) -> None:
        if not 0.0 <= self.hidden_share < 1.0:
            raise MethodError(f"hidden_share is {self.hidden_share}, but it must be at least 0 and below 1; try 0.7.")
        self.similarity = 0.0
        self._before: Tensor | None = None
        self._chosen: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of visible visual keys."""
        return int(self.length * (1 - self.hidden_share))

    def step(self, attention: Tensor, keys: int) -> Tensor:
        """Visible keys of one decoding step (steps 2 to 4).

        Parameters
        ----------
        attention : Tensor
            ``[length]`` attention of the token being decoded to the visual block, in the layer in front of the pruned
            ones, mean over heads.
        keys : int
            Keys in the cache, with the one of this token.

        Returns
        -------
        Tensor
            ``[keys]`` bool.
        """
        self.similarity = 0.0
        if self._before is not None:
            self.similarity = float(torch.cosine_similarity(attention, self._before, dim=0))
        self._before = attention
        visible = torch.ones(keys, dtype=torch.bool, device=attention.device)
        if self.similarity < self.update:
            self._chosen = self.start + top_indices(attention, self.count)
        elif not self.reuse:
            return visible
        assert self._chosen is not None
        visible[self.start : self.start + self.length] = False
        visible[self._chosen] = True
        return visible


@register
@dataclass
class DyCokeTemporal(Method):
    """Temporal token merging of DyCoke, which most comparisons call DyCoke.

    Pictures stay whole. At retentions below a quarter (the least that whole first frames of the windows allow) evenly
    spaced frames are taken first.

    Parameters
    ----------
    removed
        K, the share of its patches that a pruned frame loses, in place of the retention; the main published value is
        0.7 (47.5 % of the tokens).
    order
        Order of the tokens inside a frame, see `temporal_pruning`. None takes the released order by similarity on hosts
        that number positions anew, and raster order on hosts with three position axes or row separators.
    official
        Bounds of the released loops, see `frame_counts`.
    """

    removed: float | None = None
    order: Order | None = None
    official: bool = False

    name: ClassVar[str] = "dycoke-ttm"
    title: ClassVar[str] = "DyCoke (TTM)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.15024"
    venue: ClassVar[str] = "CVPR 2025"
    code: ClassVar[str] = "https://github.com/KD-TAO/DyCoke"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "the first of two stages; retentions below 25 % and hosts other than LLaVA-OneVision are inferred"
    )
    uniform_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (None, "raster", "similarity"):
            raise MethodError(f"order '{self.order}' is unknown; use 'raster' or 'similarity'.")
        if self.removed is None and self.official and self.retention < 0.25:
            raise RetentionError(
                f"retention is {self.retention}, but the released loops keep more than a quarter of the tokens; "
                "use official=False."
            )

    def _counts(self, frames: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Frames used and tokens of each."""
        if self.removed is None and not self.official:
            return counts_for_budget(frames, tokens, keep_count(frames * tokens, self.retention))
        removed = self.removed if self.removed is not None else (1 - self.retention) * 4 / 3
        counts = frame_counts(frames, tokens, removed, self.official)
        return torch.arange(frames), counts

    def token_count(self, layout: Layout) -> int:
        """Follows from the numbers of frames and patches."""
        if layout.kind == "image":
            return layout.patches
        rows, columns = layout.views[0]
        return int(self._counts(len(layout.views), rows * columns)[1].sum())

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """The windows of one video."""
        if sample.layout.kind == "image":
            return keep_all(sample.layout.patches, self.position_policy)
        features = sample.by_frame
        frames, tokens = features.shape[:2]
        chosen, counts = self._counts(frames, tokens)
        several_axes = sample.facts is not None and sample.facts.position_axes > 1
        default: Order = "raster" if several_axes or sample.layout.has_row_separators else "similarity"
        local = temporal_pruning(features[chosen.to(features.device)], counts, self.order or default)
        place = torch.div(local, tokens, rounding_mode="floor")
        keep = chosen.to(local.device)[place] * tokens + local % tokens
        views = chosen[counts > 0] if bool((counts == 0).any()) or chosen.numel() < frames else None
        return Plan(keep, positions=self.position_policy, separators="after-frame", views=views)


@register
@dataclass
class DyCoke(DyCokeTemporal):
    """DyCoke as a whole: temporal token merging, and dynamic pruning of the cache while decoding.

    Parameters
    ----------
    hidden_share
        P: this share of the visual keys is hidden in every decoding step. 0.7 is published.
    layer
        First decoder layer (from zero) that sees less; the attention of the layer before it chooses.
    update
        The choice is renewed when the cosine of that attention with the one of the step before is below this.
    reuse
        Otherwise go on with the earlier choice, as the paper says. The released code shows all keys then.
    official
        Bounds of the released loops, no reuse, and a last visual key that is never hidden. Unlike in the released
        code, the first step of an answer is not compared with the answer before.
    """

    hidden_share: float = 0.7
    layer: int = 3
    update: float = UPDATE
    reuse: bool = True

    name: ClassVar[str] = "dycoke"
    title: ClassVar[str] = "DyCoke"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "cache")
    fidelity_note: ClassVar[str] = (
        "retentions below 25 % and hosts other than LLaVA-OneVision are inferred, as is the paper's rule for steps "
        "that keep the earlier choice"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        DynamicPruning(0, 1, self.hidden_share)
        if not -1.0 <= self.update <= 1.0:
            raise MethodError(f"update is {self.update}, but it is a cosine from -1 to 1; the published value is 0.9.")

    def decoding_layer(self, facts: HostFacts) -> int:
        """The first layer that sees less."""
        return self.layer

    def plan_step(self, sample: StepSample) -> Tensor | None:
        """The rule on this step's attention; what it remembers belongs to one answer."""
        always = int(self.official)
        block = sample.attention[: sample.attention.numel() - always]
        rule = sample.memory.get("rule")
        if rule is None or rule.length != block.numel():
            reuse = self.reuse and not self.official
            rule = sample.memory["rule"] = DynamicPruning(0, block.numel(), self.hidden_share, reuse, self.update)
        return rule.step(block, sample.attention.numel()) if block.numel() else None
