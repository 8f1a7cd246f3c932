"""CATP: pictures of a prompt with examples pruned by coverage and their own text, then by the question.

Based on "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning" (arXiv
2508.07871, AAAI 2026). One half of the tokens goes in front of the LLM, picture by picture, by a submodular
objective. The other half goes inside it: first from all example pictures together, by growth of the attention from
the last token and likeness to the query; one layer later from the query picture, by likeness to what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.facility import greedy_cover
from tokensieve.ops.graph import cosine_matrix
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, stores_pairs, unit_vectors

ALIGNMENT_WEIGHT = 0.7
LIKENESS_WEIGHT = 0.6
LAYER = 6
LAST, EARLIER_LAST = "decoder.last_query_attention", "decoder.earlier_last_query_attention"
TEXT_STATES = "decoder.text_states"
Pairing = Literal["behind", "before"]
_ROUNDING = 1e-9
"""Added before cutting off fractions, so that 10 tokens at a ratio of 0.9 leave one in spite of float64 rounding."""


class StageCounts(NamedTuple):
    """Tokens that remain.

    Attributes
    ----------
    pictures : list of int
        Of every picture behind the first stage, the query's last.
    examples : int
        Of all example pictures together behind the second stage.
    query : int
        Of the query picture behind the second stage.
    """

    pictures: list[int]
    examples: int
    query: int


def stage_counts(sizes: list[int], ratio: float) -> StageCounts:
    """Tokens that remain behind every stage (steps 2, 7 and 8).

    Parameters
    ----------
    sizes : list of int
        Tokens of every picture, the query's last.
    ratio : float
        R, share of all picture tokens to prune, in [0, 1); each stage prunes half of it.

    Returns
    -------
    StageCounts
        Fractions cut off. A single picture has no examples.

    Raises
    ------
    MethodError
        If there is no picture or R is out of range.
    """
    if not sizes or min(sizes) < 1 or not 0.0 <= ratio < 1.0:
        raise MethodError(f"cannot prune a share of {ratio} of pictures with {sizes} tokens; use a share in [0, 1).")

    def left(size: int, share: float) -> int:
        return math.floor(size * (1 - share) + _ROUNDING)

    return StageCounts([left(size, ratio / 2) for size in sizes], left(sum(sizes[:-1]), ratio), left(sizes[-1], ratio))


def rescaled_cosine(first: Tensor, second: Tensor) -> Tensor:
    """``(1 + cos) / 2`` of every row of ``[n, D]`` with every row of ``[m, D]`` (step 1), float32 ``[n, m]``."""
    return ((1 + unit_vectors(first) @ unit_vectors(second).T) / 2).clamp_(0, 1)


def select_covering(
    features: Tensor, count: int, text: Tensor | None = None, weight: float = ALIGNMENT_WEIGHT
) -> tuple[Tensor, Tensor]:
    """Tokens of one picture that cover it and agree with its text (stage 1, steps 1 to 4).

    Parameters
    ----------
    features : Tensor
        ``[S, D]`` projected tokens of the picture.
    count : int
        k, from 1 to S.
    text : Tensor, optional
        ``[T, D]`` input embeddings of the paired text; without it coverage alone decides.
    weight : float
        lambda1 of the agreement with the mean of the text.

    Returns
    -------
    keep : Tensor
        ``[k]`` int64, ascending.
    order : Tensor
        ``[k]`` the same ids in the order of the choice; lowest id on ties.

    Raises
    ------
    MethodError
        If shapes do not match or k is out of range.
    """
    if features.dim() != 2 or not 1 <= count <= features.shape[0]:
        raise MethodError(f"cannot keep {count} tokens of features {tuple(features.shape)}; pass [S, D] and 1 to S.")
    if text is not None and (text.dim() != 2 or text.numel() == 0 or text.shape[1] != features.shape[1]):
        raise MethodError(
            f"text must be embeddings [T, D] of the width of the features, but the shapes are {tuple(text.shape)} and "
            f"{tuple(features.shape)}."
        )
    bonus = None
    if text is not None:
        mean = as_float32(text).mean(dim=0, keepdim=True)
        bonus = weight * rescaled_cosine(features, mean)[:, 0]
    # Gains in cosines are twice those in rescaled ones.
    cosines, nothing = _cosines(features), torch.full(features.shape[:1], -1.0, device=features.device)
    order, _ = greedy_cover(cosines, cosines, nothing, count, None if bonus is None else 2 * bonus)
    return order.sort().values, order


def _cosines(features: Tensor) -> Callable[[Tensor], Tensor]:
    """Cosines of some tokens, by their ids, with all; stored where they do not take too much."""
    units = unit_vectors(features).float()
    if stores_pairs(*units.shape):
        return cosine_matrix(units).__getitem__
    return lambda ids: units[ids] @ units.T


def example_scores(
    attention: Tensor,
    attention_before: Tensor,
    hidden: Tensor,
    query_mean: Tensor,
    weight: float = LIKENESS_WEIGHT,
) -> Tensor:
    """Scores of the example tokens inside the LLM (stage 2a, steps 5 and 6).

    Parameters
    ----------
    attention, attention_before : Tensor
        ``[n]`` attention of the last token to them in layer K and in the layer before, mean over heads.
    hidden : Tensor
        ``[n, D]`` their states behind layer K.
    query_mean : Tensor
        ``[D]`` mean state of all tokens of the query sample behind layer K.
    weight : float
        lambda2 of the plain cosine to the query.

    Returns
    -------
    Tensor
        ``[n]`` float32, growth of attention (0 where it fell) plus weighted cosine.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if attention.shape != attention_before.shape or attention.shape != hidden.shape[:1]:
        raise MethodError(
            f"scores need two attention rows [n] and states [n, D], but the shapes are {tuple(attention.shape)}, "
            f"{tuple(attention_before.shape)} and {tuple(hidden.shape)}."
        )
    growth = (as_float32(attention) - as_float32(attention_before)).clamp_min(0)
    return growth + weight * query_scores(hidden, query_mean)


def query_scores(hidden: Tensor, context_mean: Tensor) -> Tensor:
    """Cosine ``[n]`` of states ``[n, D]`` to a mean state ``[D]`` (stage 2b, step 8).

    For the query picture one layer later, the mean is over example tokens that remain and the examples' text.
    """
    return unit_vectors(hidden) @ unit_vectors(context_mean)


def select_best(scores: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` best of ``[n]`` scores, ascending (steps 7 and 8); lowest id on ties.

    Example pictures are ranked together, so that one of them may lose all of its tokens.
    """
    return top_indices(scores, count)


def layer_flops(tokens: int, width: int, inner: int) -> int:
    """Operations of one decoder layer on the picture tokens, ``4 n d^2 + 2 n^2 d + 3 n d m``, as the paper counts."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * inner


def default_layer(layers: int, deepstack: int = 0) -> int:
    """K where none is given: 6, or 10 from 40 layers on as published; the same share of LLMs below 20 layers (ours)."""
    layer = 10 if layers >= 40 else LAYER if layers >= 20 else round(layers * LAYER / 32)
    return max(1, deepstack - 1, min(layer, layers - 3))


@register
@dataclass
class CATP(Method):
    """CATP: for prompts with several pictures or videos and their texts, of which the last pair is the query.

    A single picture or video is a query without examples: its tokens are compared with the text behind it.

    Parameters
    ----------
    retention
        1 - R: share of the tokens left behind all stages; R is published as 66.7, 77.8 and 89.9 %. Half of the others
        leave in front of the LLM.
    layer
        K, counted from zero: example tokens leave behind layer K, query tokens behind the next one; None takes 6 (10
        from 40 layers on).
    pairing
        Whether the text that belongs to a picture stands ``"behind"`` or ``"before"`` it. Text behind the last picture
        always belongs to the query.
    alignment_weight, likeness_weight
        lambda1 and lambda2.
    """

    retention: float = 0.222
    layer: int | None = None
    pairing: Pairing = "behind"
    alignment_weight: float = ALIGNMENT_WEIGHT
    likeness_weight: float = LIKENESS_WEIGHT

    name: ClassVar[str] = "catp"
    title: ClassVar[str] = "CATP"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.07871"
    venue: ClassVar[str] = "AAAI 2026"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "every equation and constant is from the paper, without released code; rounding inside the LLM, layers counted "
        "from zero, positions, the tokens behind the mean of the context, reading order and use for videos are inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairing not in get_args(Pairing):
            raise MethodError(f"pairing must be one of {', '.join(get_args(Pairing))}, not {self.pairing!r}.")
        if self.layer is not None and self.layer < 1:
            raise MethodError(f"layer is {self.layer}, but catp compares it with the layer before; use 1 or more.")

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """In front of the two layers behind K."""
        layer = default_layer(facts.decoder_layers, facts.deepstack_layers) if self.layer is None else self.layer
        return layer + 1, layer + 2

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention of the last token in two layers, and the states of the text."""
        return LAST, EARLIER_LAST, TEXT_STATES

    def token_count(self, layout: Layout) -> int:
        """What the first stage leaves."""
        return max(1, stage_counts([layout.patches], 1 - self.retention).pictures[0])

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Coverage and agreement with the text paired with the item."""
        text = sample.text if self.pairing == "behind" else sample.text_before
        if text is not None and text.numel() == 0:
            text = None
        keep, _ = select_covering(sample.features, self.token_count(sample.layout), text, self.alignment_weight)
        return Plan(keep, positions=self.position_policy, separators="occupied")

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Examples at the first cut, the query at the second."""
        assert sample.facts is not None and sample.uncompressed is not None and sample.text_item is not None
        query = sample.uncompressed.numel() - 1
        owner = sample.text_item if self.pairing == "behind" else (sample.text_item + 1).clamp(max=query)
        counts = stage_counts(sample.uncompressed.tolist(), 1 - self.retention)
        of_query = sample.item == query
        if sample.layer == self.decoder_layers(sample.facts)[0]:
            ranked, scores, count = ~of_query, self._examples(sample, of_query, owner == query), counts.examples
        else:
            ranked, scores = of_query, self._query(sample, of_query, owner, query)
            count = max(1, counts.query)
        keep = ~ranked
        keep[ranked.nonzero().flatten()[select_best(scores, count).cpu()]] = True
        return Plan(keep.nonzero().flatten(), positions="original")

    def _examples(self, sample: DecoderSample, of_query: Tensor, text: Tensor) -> Tensor:
        """Scores of all example tokens."""
        examples, device = (~of_query).nonzero().flatten().to(sample.hidden.device), sample.hidden.device
        if examples.numel() == 0:
            return sample.hidden.new_zeros(0)
        now, before = sample.signal(LAST), sample.signal(EARLIER_LAST)
        if now.shape != before.shape:
            raise MethodError(
                f"catp compares the attention of layers {sample.layer - 2} and {sample.layer - 1}, but another method "
                "cuts in between; give that one another layer."
            )
        states = torch.cat((sample.hidden[of_query.to(device)], sample.signal(TEXT_STATES)[text.to(device)]))
        mean = as_float32(states).mean(dim=0)
        return example_scores(now[examples], before[examples], sample.hidden[examples], mean, self.likeness_weight)

    @staticmethod
    def _query(sample: DecoderSample, of_query: Tensor, owner: Tensor, query: int) -> Tensor:
        """Scores of the query's tokens."""
        device = sample.hidden.device
        # A query without examples is compared with its own text.
        text = (owner >= 0) & (owner < query) if query else owner == 0
        context = torch.cat((sample.hidden[(~of_query).to(device)], sample.signal(TEXT_STATES)[text.to(device)]))
        mean = as_float32(context).sum(dim=0) / max(1, context.shape[0])
        return query_scores(sample.hidden[of_query.to(device)], mean)
