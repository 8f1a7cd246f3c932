"""Recoverable Compression: as many tokens as stand out, to the eye or to the question, and the rest in a few.

Based on "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information" (arXiv
2409.01179, AAAI 2025). There is no fixed budget: the share of statistical outliers among the scores says how many
tokens are kept, how many are recovered for the question, and around how many centres the rest is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokensieve.core.guided import GuidedMethod
from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Stage
from tokensieve.core.plan import Plan, join_views
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.merge import MergeMap
from tokensieve.ops.outliers import outlier_ratio
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, unit_vectors

FILTER_NEIGHBOURS = 20
CENTRE_NEIGHBOURS = 10
MERGED_NEIGHBOURS = 32
TEXT_WEIGHT = 50.0
STATES = "encoder.states@feature"
KEYS = "encoder.joined_keys@last"
ATTENTION = "encoder.joined_class_attention@last"
PROJECTED = "encoder.projected@last"
QUESTION = "prompt.question_last_state"


class Selection(NamedTuple):
    """What the dynamic scale filters chose, as patch ids.

    Attributes
    ----------
    visual : Tensor
        ``[n_v]`` int64, ascending, by attention of the class token.
    text : Tensor
        ``[n_t]`` int64, ascending, by similarity to the question among the others.
    rest : Tensor
        ``[m]`` int64, ascending, all others.
    similarity : Tensor
        ``[N]`` with the visual tokens set to the smallest value, as later steps use it.
    """

    visual: Tensor
    text: Tensor
    rest: Tensor
    similarity: Tensor

    @property
    def kept(self) -> Tensor:
        """Tokens that stay as they are, ascending."""
        return torch.cat((self.visual, self.text)).sort().values


class Recovered(NamedTuple):
    """Tokens of one picture after compression.

    Attributes
    ----------
    features : Tensor
        ``[M, D]``: kept tokens in raster order, centres by falling attention, one token for the remainder.
    kept, centres : Tensor
        int64 patch ids of the first two parts.
    has_extra : bool
        Whether the last token stands for the remainder.
    merge_map : MergeMap
        Weight of every patch in every token.
    """

    features: Tensor
    kept: Tensor
    centres: Tensor
    has_extra: bool
    merge_map: MergeMap


def text_similarity(last_hidden: Tensor, visual_projection: Tensor, text: Tensor) -> Tensor:
    """Similarity of every patch to the question in the shared space of a CLIP model (step 1).

    Parameters
    ----------
    last_hidden : Tensor
        ``[B, N+1, D]`` output of the last encoder layer, class token first, in front of the final norm.
    visual_projection : Tensor
        ``[P, D]`` weight of the visual projection.
    text : Tensor
        ``[B, P]`` projected state at the last position of the padded question.

    Returns
    -------
    Tensor
        ``[B, 1, N]`` cosine divided by the root of P.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    width = visual_projection.shape[0]
    if text.shape[-1] != width or last_hidden.shape[-1] != visual_projection.shape[1]:
        raise MethodError(
            f"states {tuple(last_hidden.shape)}, projection {tuple(visual_projection.shape)} and text "
            f"{tuple(text.shape)} do not fit together; pass [B, N+1, D], [P, D] and [B, P]."
        )
    projected = as_float32(last_hidden)[:, 1:] @ as_float32(visual_projection).T
    return scaled_cosine(projected, text)


def scaled_cosine(projected: Tensor, text: Tensor) -> Tensor:
    """Cosine of projected patches ``[B, N, P]`` and texts ``[B, P]`` over the root of P, ``[B, 1, N]``."""
    return (unit_vectors(text).unsqueeze(1) @ unit_vectors(projected).transpose(1, 2)) * projected.shape[-1] ** -0.5


def undivided_class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention ``[B, N]`` of the class token to the patches with heads not split (step 2).

    Parameters
    ----------
    q, k : Tensor
        ``[B, N+1, C]`` outputs of the query and key projections of the last encoder layer, class token first.
    """
    logits = as_float32(q)[:, :1] @ as_float32(k).transpose(1, 2) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1)[:, 0, 1:]


def select_outliers(attention: Tensor, similarity: Tensor, neighbours: int = FILTER_NEIGHBOURS) -> Selection:
    """Tokens that stand out, and tokens recovered for the question (steps 3 and 4).

    Parameters
    ----------
    attention, similarity : Tensor
        ``[N]`` of `undivided_class_attention` and `text_similarity`.
    neighbours : int
        k of both outlier tests.

    Returns
    -------
    Selection
        Outliers to either side are counted, but the largest values are taken.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if attention.dim() != 1 or attention.shape != similarity.shape or attention.numel() == 0:
        raise MethodError(
            f"attention and similarity must be two rows of one length, but the shapes are {tuple(attention.shape)} and "
            f"{tuple(similarity.shape)}."
        )
    total = attention.numel()
    # The count goes through a share and back, as released, which can lose one to float64 rounding.
    visual = top_indices(attention, int(total * outlier_ratio(attention, neighbours)))
    similarity = as_float32(similarity).clone()
    similarity[visual] = similarity.min()
    recovered = int((total - visual.numel()) * outlier_ratio(similarity, neighbours))
    text = top_indices(similarity, recovered)
    # With nearly all tokens kept the overwritten ones may come again.
    text = text[~torch.isin(text, visual)]
    left = torch.ones(total, dtype=torch.bool, device=attention.device)
    left[visual] = False
    left[text] = False
    return Selection(visual, text, left.nonzero().flatten(), similarity)


def merge_rest(
    features: Tensor,
    keys: Tensor,
    attention: Tensor,
    selection: Selection,
    *,
    neighbours: int = CENTRE_NEIGHBOURS,
    merged: int = MERGED_NEIGHBOURS,
    text_weight: float = TEXT_WEIGHT,
    official: bool = False,
) -> Recovered:
    """Centres among the rest, each with what resembles it, and one token for what is left (steps 5 to 8).

    Parameters
    ----------
    features : Tensor
        ``[N, D]`` patches of the penultimate layer.
    keys : Tensor
        ``[N, C]`` keys of the patches.
    attention : Tensor
        ``[N]``.
    selection : Selection
        From `select_outliers`.
    neighbours : int
        k of the outlier test that gives the number of centres.
    merged : int
        Tokens added to each centre, at most all others.
    text_weight : float
        Factor of the text similarity beside the cosine of keys.
    official : bool
        Reproduce the released code, which multiplies the share of centres by the feature width and takes keys by
        their place among the rest, and may return no token at all.

    Returns
    -------
    Recovered
        At least one token unless ``official``.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if features.shape[0] != attention.numel() or keys.shape[0] != attention.numel():
        raise MethodError(
            f"features {tuple(features.shape)}, keys {tuple(keys.shape)} and attention {tuple(attention.shape)} must "
            "have one row per patch, without class token."
        )
    rest, kept = selection.rest, selection.kept
    values, size = as_float32(features)[rest], rest.numel()
    weight, text = as_float32(attention)[rest], text_weight * selection.similarity[rest]
    base = features.shape[1] if official else size
    count = min(int(base * outlier_ratio(weight, neighbours)), size)
    centres = top_indices(weight, count, order="rank")
    others = torch.ones(size, dtype=torch.bool, device=rest.device)
    others[centres] = False
    # Rows of weights over the rest: one per centre, and one for what is left.
    rows = []
    if count:
        units = unit_vectors(keys[:size] if official else keys[rest])
        affinity = units[centres] @ units.T + text
        affinity.scatter_(1, centres.unsqueeze(1), float("-inf"))
        near = top_indices(affinity, min(merged, size - 1))
        shares = torch.zeros_like(affinity).scatter_(1, near, weight[near])
        rows.append(shares.scatter_(1, centres.unsqueeze(1), 1.0))
    extra = bool(others.any()) and (count > 0 or (kept.numel() == 0 and not official))
    if extra:
        rows.append((weight * others).unsqueeze(0))
    mixing = torch.cat(rows) if rows else values.new_zeros(0, size)
    target, source = mixing.nonzero().unbind(1)
    places = torch.arange(kept.numel(), device=kept.device)
    merge_map = MergeMap(
        torch.cat((kept, rest[source])),
        torch.cat((places, kept.numel() + target)),
        torch.cat((mixing.new_ones(kept.numel()), mixing[target, source])).float(),
    )
    found = torch.cat((features[kept], (mixing @ values).to(features.dtype)))
    return Recovered(found, kept, rest[centres], extra, merge_map)


def compress(hidden: Tensor, q: Tensor, k: Tensor, similarity: Tensor, official: bool = False) -> Recovered:
    """All steps for one picture, from the states of its encoder.

    Parameters
    ----------
    hidden : Tensor
        ``[N+1, D]`` states of the penultimate layer, class token first.
    q, k : Tensor
        ``[N+1, C]`` projections of the last layer.
    similarity : Tensor
        ``[N]`` from `text_similarity`.
    official : bool
        See `merge_rest`.

    Returns
    -------
    Recovered
        Tokens for the projector.
    """
    attention = undivided_class_attention(q[None], k[None])[0]
    selection = select_outliers(attention, similarity)
    return merge_rest(hidden[1:], k[1:], attention, selection, official=official)


@register
@dataclass
class RecoverableCompression(GuidedMethod):
    """Recoverable Compression, frame by frame; the number of tokens follows from the picture and the question.

    Parameters
    ----------
    retention
        1 switches the method off; any other value changes nothing, as outlier tests decide (about 10 % remain).
    filter_neighbours, centre_neighbours
        k of the outlier tests for kept tokens and for centres.
    merged
        Tokens added to each centre.
    text_weight
        Weight of the likeness to the question beside that of keys in the choice of these tokens.
    official
        Reproduce the released code, see `merge_rest`.
    question, text_tower, tokenizer
        See `GuidedMethod`; the question is cut at its first line break.
    """

    retention: float = 0.1
    filter_neighbours: int = FILTER_NEIGHBOURS
    centre_neighbours: int = CENTRE_NEIGHBOURS
    merged: int = MERGED_NEIGHBOURS
    text_weight: float = TEXT_WEIGHT
    official: bool = False

    name: ClassVar[str] = "recoverable-compression"
    title: ClassVar[str] = "Recoverable Compression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.01179"
    venue: ClassVar[str] = "AAAI 2025"
    code: ClassVar[str] = "https://github.com/banjiuyufen/Recoverable-Compression"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    fidelity_note: ClassVar[str] = (
        "two slips of the released code are put right unless official=True; the text is the first line of the "
        "question; use on pooled frames and on mosaics of tiles (without their newlines) is inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("filter_neighbours", "centre_neighbours", "merged"):
            if getattr(self, option) < 1:
                raise MethodError(f"{option} is {getattr(self, option)}, but it must be at least 1.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """States in front of the projector, keys and class attention of the last layer, and both sides of CLIP."""
        return STATES, KEYS, ATTENTION, PROJECTED, QUESTION

    def token_count(self, layout: Layout) -> int | None:
        """Depends on how much stands out."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Every view on its own."""
        if sample.frames == 1:
            return self._plan_view(sample)
        return join_views(sample.layout, [self._plan_view(sample.view(i)) for i in range(sample.frames)])

    def _plan_view(self, sample: TokenSample) -> Plan:
        """Tokens of one picture: kept ones as they are, merged ones through the projector."""
        if sample.project is None:
            raise MethodError(f"{self.name} merges tokens in front of the projector, which the sample does not give.")
        attention = sample.signal(ATTENTION)
        text = sample.signal(QUESTION).to(attention.device)
        similarity = scaled_cosine(sample.signal(PROJECTED)[None], text[None])[0, 0]
        selection = select_outliers(attention, similarity, self.filter_neighbours)
        found = merge_rest(
            sample.signal(STATES),
            sample.signal(KEYS),
            attention,
            selection,
            neighbours=self.centre_neighbours,
            merged=self.merged,
            text_weight=self.text_weight,
            official=self.official,
        )
        kept = found.kept
        tokens = sample.project(found.features[kept.numel() :]).to(sample.features)
        features = torch.cat((sample.features[kept.to(tokens.device)], tokens))
        keep = torch.cat((kept, found.centres))
        if found.has_extra:
            # The token of the remainder stands at its most attended patch.
            loose = selection.rest[~torch.isin(selection.rest, found.centres)]
            keep = torch.cat((keep, loose[attention[loose].argmax()][None]))
        info = {"question_similarity": similarity, "visual": selection.visual, "recovered": selection.text}
        return Plan(keep, features, found.merge_map, self.position_policy, "drop", info=info)
