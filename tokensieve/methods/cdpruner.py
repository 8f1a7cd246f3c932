"""CDPruner: the subset of visual tokens that is diverse and relevant to the question, by its determinant.

Based on "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
2506.10967, NeurIPS 2025). Tokens of a picture form a determinantal point process whose kernel is their cosine
similarity, scaled by the relevance of each token to the question; a greedy choice maximises the determinant.

The functions take embeddings of the question, which the runtime does not hand to methods, so there is no
registered method of this name.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.determinant import greedy_determinant
from tokensieve.ops.similarity import as_float32, unit_vectors

RELEVANCE_EPSILON = 1e-6
TEXT_LENGTH = 77
Norm = Literal["joint", "frame"]


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
