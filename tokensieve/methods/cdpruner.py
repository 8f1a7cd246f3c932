"""CDPruner: the subset of visual tokens that is diverse and relevant to the question, by its determinant.

Based on "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
2506.10967, NeurIPS 2025). Tokens of a picture form a determinantal point process whose kernel is their cosine
similarity, scaled by the relevance of each token to the question; a greedy choice maximises the determinant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.guided import GuidedMethod
from tokensieve.core.layout import Layout
from tokensieve.core.method import Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.determinant import greedy_determinant
from tokensieve.ops.similarity import as_float32, unit_vectors

RELEVANCE_EPSILON = 1e-6
TEXT_LENGTH = 77
ALIGNED = "encoder.aligned@feature"
SEGMENTS = "prompt.question_segments"
WORDS = "prompt.question_words"
Norm = Literal["joint", "frame"]
Relevance = Literal["auto", "pair", "words", "none"]
Scope = Literal["frame", "video"]


def text_segments(ids: Tensor, length: int = TEXT_LENGTH) -> Tensor:
    """Token ids of a question as rows that a text tower can take (step 2).

    Parameters
    ----------
    ids : Tensor
        ``[L]`` int64, without system prompt and image placeholder, L at least 1.
    length : int
        Longest input of the text tower, 77 for CLIP.

    Returns
    -------
    Tensor
        ``[M, length]`` for more than ``length`` ids, filled up with zeros; ``[1, L]`` otherwise.

    Raises
    ------
    MethodError
        If there are no ids.
    """
    if ids.dim() != 1 or ids.numel() == 0:
        raise MethodError(f"a question needs at least one token id in one row, but the shape is {tuple(ids.shape)}.")
    if ids.numel() <= length:
        return ids.unsqueeze(0)
    padded = ids.new_zeros(-(-ids.numel() // length) * length)
    padded[: ids.numel()] = ids
    return padded.view(-1, length)


def question_similarity(image_embeds: Tensor, text_embeds: Tensor, negative: bool = True) -> Tensor:
    """Mean cosine of every token to the question, by default with its sign turned (step 4).

    Parameters
    ----------
    image_embeds : Tensor
        ``[B, N, C]`` tokens in the space of the text: patches of the feature layer through the head of a CLIP
        tower, or projected tokens against the LLM's input embeddings.
    text_embeds : Tensor
        ``[M, C]`` segments (or tokens) of the question.
    negative : bool
        True for CLIP, whose patches are the less like the text the more they show of it; False where both are
        input embeddings of an LLM.

    Returns
    -------
    Tensor
        ``[B, N]`` float32.

    Raises
    ------
    MethodError
        If the two do not share a space.
    """
    if image_embeds.dim() != 3 or text_embeds.dim() != 2 or image_embeds.shape[2] != text_embeds.shape[1]:
        raise MethodError(
            f"relevance needs tokens [B, N, C] and text [M, C] in one space, but the shapes are "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    cosine = (unit_vectors(image_embeds) @ unit_vectors(text_embeds).T).mean(dim=2)
    return -cosine if negative else cosine


def normalise_relevance(similarity: Tensor, norm: Norm = "joint") -> Tensor:
    """Relevance r between about 0 and 1 (step 4).

    Parameters
    ----------
    similarity : Tensor
        ``[B, N]`` from `question_similarity`.
    norm : {"joint", "frame"}
        Smallest and largest value over all tiles or frames together (released code), or of each alone.

    Returns
    -------
    Tensor
        ``[B, N]``, ``(s - min + 1e-6) / (max - min)``; ones where all values are equal.

    Raises
    ------
    MethodError
        If the norm is unknown.
    """
    if norm not in get_args(Norm):
        raise MethodError(f"relevance norm '{norm}' is unknown; use 'joint' or 'frame'.")
    axes = (0, 1) if norm == "joint" else (1,)
    low, high = similarity.amin(dim=axes, keepdim=True), similarity.amax(dim=axes, keepdim=True)
    return torch.where(high > low, (similarity - low + RELEVANCE_EPSILON) / (high - low), 1.0)


def weigh_relevance(relevance: Tensor, weight: float = 1.0) -> Tensor:
    """Relevance under the optional weight w ("Relevance weight").

    Parameters
    ----------
    relevance : Tensor
        ``[B, N]`` from `normalise_relevance`.
    weight : float
        1 leaves it as it is (the method), 0 makes all ones (diversity alone), values between give
        ``exp(w / (2 (1 - w)) * r)``.

    Returns
    -------
    Tensor
        ``[B, N]``, above 0.

    Raises
    ------
    MethodError
        If the weight is outside 0..1.
    """
    if not 0.0 <= weight <= 1.0:
        raise MethodError(f"relevance weight is {weight}, but it is a share from 0 to 1; the published value is 1.")
    if weight == 1.0:
        return relevance
    return torch.exp(relevance * (weight / (2 * (1 - weight))))


def relevance_to_question(
    image_embeds: Tensor,
    text_embeds: Tensor,
    *,
    negative: bool = True,
    norm: Norm = "joint",
    weight: float = 1.0,
) -> Tensor:
    """Relevance ``[B, N]`` of every token to the question (step 4); see the functions it is made of."""
    similarity = question_similarity(image_embeds, text_embeds, negative)
    return weigh_relevance(normalise_relevance(similarity, norm), weight)


def select_conditional(features: Tensor, count: int, relevance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Diverse and relevant tokens of every picture (steps 3 and 5 to 7).

    Parameters
    ----------
    features : Tensor
        ``[B, N, D]`` projected tokens. Every tile or frame is a set of its own; pass ``[1, F * N, D]`` to
        choose over a whole video.
    count : int
        K, tokens kept per set, from 1 to N.
    relevance : Tensor, optional
        ``[B, N]``; None chooses for diversity alone.

    Returns
    -------
    keep : Tensor
        ``[B, K]`` int64, ascending.
    order : Tensor
        ``[B, K]`` the same ids in the order of the choice.

    Raises
    ------
    MethodError
        If the shapes do not match or K is out of range.
    """
    if features.dim() != 3 or not 1 <= count <= features.shape[1]:
        raise MethodError(
            f"cannot keep {count} tokens per set of features with shape {tuple(features.shape)}; pass [B, N, D] and "
            "a count from 1 to N."
        )
    quality = None if relevance is None else as_float32(relevance)
    order, _ = greedy_determinant(features, count, quality)
    return order.sort(dim=1).values, order


@register
@dataclass
class CDPruner(GuidedMethod):
    """CDPruner: in every frame (or picture) the tokens that are most diverse and most relevant together.

    Parameters
    ----------
    relevance
        Where the relevance of a token comes from. ``"pair"`` compares patches and question in the space of the CLIP
        model that the tower was taken from (the published method). ``"words"`` compares tokens with the LLM's input
        embeddings of the question, as a second implementation does on hosts without text tower. ``"none"`` chooses
        for diversity alone. ``"auto"`` is ``"pair"`` on CLIP towers of a known pair and wherever ``text_tower`` is
        given, ``"words"`` elsewhere; the plan's information names what was used.
    scope
        ``"frame"`` gives every frame its own set of ``round(N * retention)`` tokens, ``"video"`` chooses from all
        frames at once.
    relevance_norm
        Smallest and largest relevance over all frames (``"joint"``, released code) or of each frame; None takes
        ``"joint"`` for a pair and ``"frame"`` for words.
    weight
        See `weigh_relevance`.
    negative
        Whether likeness to the question counts against a token; None is yes for CLIP alone.
    question, text_tower, tokenizer
        See `GuidedMethod`.
    """

    relevance: Relevance = "auto"
    scope: Scope = "frame"
    relevance_norm: Norm | None = None
    weight: float = 1.0
    negative: bool | None = None

    name: ClassVar[str] = "cdpruner"
    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    venue: ClassVar[str] = "NeurIPS 2025"
    code: ClassVar[str] = "https://github.com/Theia-4869/CDPruner"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    accepts_budget: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "exact with CLIP towers of a known pair; elsewhere relevance is that of a second implementation (the LLM's "
        "embeddings of the question), and the tiles of an any-resolution image form one set"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("relevance", Relevance), ("scope", Scope)):
            if getattr(self, option) not in get_args(known):
                raise MethodError(
                    f"{option} must be one of {', '.join(get_args(known))}, not {getattr(self, option)!r}."
                )
        if self.relevance_norm is not None and self.relevance_norm not in get_args(Norm):
            raise MethodError(f"relevance norm '{self.relevance_norm}' is unknown; use 'joint' or 'frame'.")
        weigh_relevance(torch.ones(1, 1), self.weight)

    def source(self, facts: HostFacts | None) -> Relevance:
        """What relevance is made of on a host."""
        if self.relevance != "auto":
            return self.relevance
        clip = facts is not None and facts.tower_pair == "clip" and facts.text_tower is not None
        return "pair" if clip or self.text_tower is not None else "words"

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Patches and question in the space of a pair, the words of the question, or nothing."""
        wanted: dict[Relevance, tuple[str, ...]] = {"pair": (ALIGNED, SEGMENTS), "words": (WORDS,)}
        return wanted.get(self.source(facts), ())

    def token_count(self, layout: Layout) -> int | None:
        """A fixed number per frame."""
        if self.budget is not None or self.scope == "video":
            return super().token_count(layout)
        return sum(keep_count(n, self.retention) for n in layout.patches_per_view.tolist() if n)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """One set per frame, or one for the video."""
        source = self.source(sample.facts)
        quality = self._quality(sample, source)
        sizes = [n for n in sample.layout.patches_per_view.tolist() if n]
        if self.scope == "video" and sample.budget is None:
            sizes = [sample.layout.patches]
        counts = [keep_count(n, self.retention) for n in sizes]
        if sample.budget is not None:
            given = sample.budget[sample.layout.patches_per_view.to(sample.budget.device) > 0].tolist()
            counts = [min(n, int(count)) for n, count in zip(sizes, given, strict=True)]
        keep = self._choose(sample.features, quality, sizes, counts)
        info = {"relevance": source} | ({} if quality is None else {"question_relevance": quality})
        return Plan(keep, positions=self.position_policy, info=info)

    def _quality(self, sample: TokenSample, source: Relevance) -> Tensor | None:
        """Relevance of every patch [n], min-max over the item or over each of its views."""
        if source == "none":
            return None
        clip = sample.facts is None or sample.facts.tower_pair == "clip"
        negative = (source == "pair" and clip) if self.negative is None else self.negative
        if source == "pair":
            tokens, text = sample.signal(ALIGNED), sample.signal(SEGMENTS)
        else:
            tokens, text = sample.features, sample.signal(WORDS)
        found = question_similarity(tokens.unsqueeze(0), text.to(tokens.device), negative)
        norm = self.relevance_norm or ("joint" if source == "pair" else "frame")
        whole = norm == "joint" or self.scope == "video"
        parts = [found] if whole else found.split(sample.layout.patches_per_view.tolist(), dim=1)
        normed = [normalise_relevance(part) for part in parts if part.shape[1]]
        return weigh_relevance(torch.cat(normed, dim=1), self.weight)[0]

    @staticmethod
    def _choose(features: Tensor, quality: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Ascending ids of the choice from sets that follow each other; equal sets are chosen from at once."""
        if len(set(sizes)) == 1 and len(set(counts)) == 1:
            rows = None if quality is None else quality.view(len(sizes), -1)
            keep, _ = select_conditional(features.view(len(sizes), sizes[0], -1), counts[0], rows)
            starts = torch.arange(len(sizes), device=keep.device).unsqueeze(1) * sizes[0]
            return (keep + starts).flatten()
        kept, start = [], 0
        for size, count in zip(sizes, counts, strict=True):
            part = slice(start, start + size)
            if count:
                row = None if quality is None else quality[None, part]
                kept.append(select_conditional(features[None, part], count, row)[0][0] + start)
            start += size
        return torch.cat(kept)
