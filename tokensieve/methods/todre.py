"""ToDRE: visual tokens that resemble each other least in sum, and none of them where the text looks away.

Based on "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757). In front
of the LLM a greedy choice starts from one pivot and adds the token with the smallest summed cosine to those chosen
so far. At a late LLM layer all visual tokens go if text and visual tokens hardly attend to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.method import Fidelity, Selector, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.maxsum import greedy_max_sum
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, unit_vectors

Pivot = Literal["auto", "class", "farthest", "center", "random"]
THRESHOLD = 0.1
CHECK_DEPTH = 7 / 8
SHARES = "decoder.attention_shares"
CLASS_ATTENTION = "encoder.class_attention@last"


def select_dissimilar(features: Tensor, count: int, pivot: int) -> tuple[Tensor, Tensor]:
    """Choose mutually dissimilar tokens from a pivot on (stage 1, steps 2 to 4).

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` visual tokens as they enter the LLM, all frames or tiles together.
    count : int
        k, from 1 to n.
    pivot : int
        The first token.

    Returns
    -------
    keep : Tensor
        ``[k]`` int64, ascending.
    order : Tensor
        ``[k]`` the same ids in the order of the choice.

    Raises
    ------
    MethodError
        If k or the pivot is out of range.
    """
    if not 1 <= count <= features.shape[0]:
        raise MethodError(f"cannot keep {count} of {features.shape[0]} visual tokens; keep at least 1, at most all.")
    order, _ = greedy_max_sum(features, count, pivot)
    return order.sort().values, order


def central_token(features: Tensor, farthest: bool = True) -> int:
    """Token of ``[n, D]`` with the smallest (or largest) cosine to the mean feature (step 1, without class token)."""
    values = as_float32(features)
    cosine = unit_vectors(values) @ unit_vectors(values.mean(dim=0))
    return int(top_indices(cosine, 1, largest=not farthest))


def check_layers(layers: int, depths: tuple[float, ...] = (CHECK_DEPTH,)) -> tuple[int, ...]:
    """Decoder layers, counted from zero, behind which the relevance is checked (stage 2).

    Parameters
    ----------
    layers : int
        L.
    depths : tuple of float
        Shares of the depth, published (7/8,).

    Returns
    -------
    tuple of int
        ``int(depth * L)``, ascending.

    Raises
    ------
    MethodError
        If a depth is outside [0, 1).
    """
    if not all(0.0 <= depth < 1.0 for depth in depths):
        raise MethodError(f"check depths are {depths}, but they are shares of the depth from 0 to below 1.")
    return tuple(sorted({int(depth * layers) for depth in depths}))


def attention_share(rows: Tensor, columns: Tensor) -> float:
    """Share of the attention of some tokens that goes to others (step 5, eq. 8).

    Parameters
    ----------
    rows : Tensor
        ``[H, Q, L]`` softmax attention of the asking tokens (text tokens, or visual tokens) of one layer.
    columns : Tensor
        ``[L]`` bool, the tokens asked about (visual tokens, or text tokens).

    Returns
    -------
    float
        From 0 to 1; 0 where nobody asks.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if rows.dim() != 3 or columns.shape != rows.shape[2:]:
        raise MethodError(
            f"an attention share needs rows [H, Q, L] and columns [L], but the shapes are {tuple(rows.shape)} and "
            f"{tuple(columns.shape)}."
        )
    if rows.shape[1] == 0:
        return 0.0
    mean = as_float32(rows).mean(dim=0)
    return float(mean[:, columns].sum() / mean.sum())


def all_visual_dropped(text_to_visual: float, visual_to_text: float, threshold: float = THRESHOLD) -> bool:
    """Whether every visual token is removed behind this layer: both shares below the threshold (step 6).

    With the video in front of the question no visual token sees text, and the first share decides.
    """
    return text_to_visual < threshold and visual_to_text < threshold


@register
@dataclass
class ToDRE(Selector):
    """ToDRE: greedy max-sum diversity over all patches of an item, then all or nothing at a late LLM layer.

    Parameters
    ----------
    retention
        Share of the tokens that enters the LLM; 25 % and 10 % are published.
    threshold
        tau: all visual tokens go where the attention between text and visual tokens is below this share in both
        directions; 0 leaves this stage out.
    depth
        Share of the LLM's depth behind which that is decided: layer ``int(depth * L)`` from zero, and at the latest
        the one before the last.
    pivot
        First token: ``"class"`` has the largest attention of the class token in the last tower layer (of images cut
        into tiles: of the base picture), ``"farthest"`` and ``"center"`` the smallest and largest cosine to the
        mean feature, ``"random"`` is drawn. ``"auto"`` is ``"class"`` where the tower has a class token and
        ``"farthest"`` elsewhere; the paper finds nearly the same accuracy for all four.
    seed
        Seed of the random pivot; item ``i`` of a prompt uses ``seed + i``.
    """

    threshold: float = THRESHOLD
    depth: float = CHECK_DEPTH
    pivot: Pivot = "auto"
    seed: int = 0

    name: ClassVar[str] = "todre"
    title: ClassVar[str] = "ToDRE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.18757"
    venue: ClassVar[str] = "arXiv 2025"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    may_be_empty: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "from the paper's Algorithm 1 and equation 8 without released code; reading order of the kept tokens, leaving "
        "out newlines, the pivot without class token, and layers counted from zero are inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivot not in get_args(Pivot):
            raise MethodError(f"pivot must be one of {', '.join(get_args(Pivot))}, not {self.pivot!r}.")
        if self.threshold < 0:
            raise MethodError(f"threshold is {self.threshold}, but it is a share of the attention; published is 0.1.")
        check_layers(1, (self.depth,))
        if self.threshold == 0:
            vars(self)["stages"] = ("tokens",)

    def _rule(self, facts: HostFacts | None) -> Pivot:
        if self.pivot != "auto":
            return self.pivot
        return "class" if facts is not None and facts.has_class_token else "farthest"

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Class-token attention of the last tower layer, where the pivot needs it."""
        return (CLASS_ATTENTION,) if self._rule(facts) == "class" else ()

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """In front of the layer behind the one that decides."""
        if self.threshold == 0:
            return ()
        (decides,) = check_layers(facts.decoder_layers, (self.depth,))
        return (max(1, facts.deepstack_layers, min(decides + 1, facts.decoder_layers - 1)),)

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention between text and visual tokens in the layer that decides."""
        return (SHARES,)

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """All visual tokens and their newlines, or none."""
        text_to_visual, visual_to_text = sample.signal(SHARES).tolist()
        dropped = all_visual_dropped(text_to_visual, visual_to_text, self.threshold)
        keep = torch.arange(0 if dropped else sample.hidden.shape[0])
        return Plan(keep, positions="original", separators="occupied")

    def first_token(self, sample: TokenSample) -> int:
        """The pivot of an item."""
        rule = self._rule(sample.facts)
        if rule == "class":
            scores = sample.signal(CLASS_ATTENTION)
            if sample.layout.kind == "image":
                # The first view of an image cut into tiles is its base picture.
                scores = scores[sample.layout.patch_view.to(scores.device) == 0]
            return int(top_indices(scores, 1))
        if rule == "random":
            generator = torch.Generator().manual_seed(self.seed + sample.index)
            return int(torch.randint(sample.layout.patches, (1,), generator=generator))
        return central_token(sample.features, farthest=rule == "farthest")

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """Greedy choice from the pivot on."""
        return select_dissimilar(sample.features, count, self.first_token(sample))[0]

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """As every selector; newlines are dropped."""
        if sample.budget is not None:
            plan = super().plan_tokens(sample)
            plan.separators = "drop"
            return plan
        pivot = self.first_token(sample)
        keep = select_dissimilar(sample.features, self.count(sample), pivot)[0]
        return Plan(keep, positions=self.position_policy, separators="drop", info={"pivot": pivot})
