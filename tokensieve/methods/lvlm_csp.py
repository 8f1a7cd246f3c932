"""LVLM_CSP: few tokens in the first layers, all of them in the middle, the attended ones at the end.

Based on "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning
Segmentation" (arXiv 2504.10854). The first LLM layers see one representative per cluster of the token grid, then all
tokens are active again, and the last layers keep those that the segmentation token attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Method, Stage, check_retention
from tokensieve.core.plan import Plan, Positions
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.depth import Numbers, numbers
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32


class LayerSplit(NamedTuple):
    """Layers of the three stages and the tokens that the first and the last stage see.

    Attributes
    ----------
    clustering, scattering, pruning : int
        Numbers of consecutive layers.
    representatives, survivors : int
        N_c and N_p.
    """

    clustering: int
    scattering: int
    pruning: int
    representatives: int
    survivors: int


CLASS_ATTENTION = "encoder.class_attention@last"
Clustering = Literal["uniform", "random", "cls"]
Scatter = Literal["raw", "delta"]
_PRESETS = {65: (8 / 32, 8 / 32), 70: (9 / 32, 6 / 32)}


def _check_count(tokens: int, count: int) -> None:
    if not 1 <= count <= tokens:
        raise MethodError(f"cannot choose {count} representatives of {tokens} tokens; choose at least 1, at most all.")


def uniform_set(tokens: int, count: int) -> Tensor:
    """Representatives at a regular stride (step 1, "uniform").

    Parameters
    ----------
    tokens : int
        N.
    count : int
        N_c, from 1 to N.

    Returns
    -------
    Tensor
        ``[N_c]`` int64, ``i * (N // N_c)`` as published: the end of the grid stays unseen where N_c does not divide N.

    Raises
    ------
    MethodError
        If N_c is out of range.
    """
    _check_count(tokens, count)
    return torch.arange(count) * (tokens // count)


def random_set(tokens: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct tokens, ascending (step 1, "random"); MethodError if there are not as many."""
    _check_count(tokens, count)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def class_set(attention: Tensor, count: int) -> Tensor:
    """Tokens with the largest attention of the class token ``[N]``, ascending (step 1, "cls"); lowest id on ties."""
    _check_count(attention.numel(), count)
    return top_indices(as_float32(attention), count)


def object_quotas(areas: Tensor, count: int) -> Tensor:
    """Representatives of every object, ``max(1, floor(N_c * area / all areas))`` (step 1, "seg-first").

    Parameters
    ----------
    areas : Tensor
        ``[O]`` tokens of every object, at least 1 each.
    count : int
        N_c.

    Returns
    -------
    Tensor
        ``[O]`` int64; their sum can be below or, with many small objects, above N_c.

    Raises
    ------
    MethodError
        If an object is empty.
    """
    areas = areas.long()
    if areas.numel() == 0 or int(areas.min()) < 1:
        raise MethodError(f"quotas need objects of at least one token each, but the areas are {areas.tolist()}.")
    return (areas * count).div(areas.sum(), rounding_mode="floor").clamp_min(1)


def object_set(masks: Tensor, count: int) -> Tensor:
    """Representatives inside the objects of a segmenter (step 1, "seg-first").

    Parameters
    ----------
    masks : Tensor
        ``[O, N]`` bool on the token grid; they may overlap, and empty ones are left out.
    count : int
        N_c, from 1 to N.

    Returns
    -------
    Tensor
        ``[N_c]`` int64, ascending. Objects are sampled at a regular stride. Too many are taken back one by one from
        the object with most (of these the smallest); what is missing comes at a regular stride from all other tokens.

    Raises
    ------
    MethodError
        If the masks have another shape or N_c is out of range.
    """
    if masks.dim() != 2:
        raise MethodError(f"object masks must be [O, N], but the shape is {tuple(masks.shape)}.")
    tokens = masks.shape[1]
    _check_count(tokens, count)
    masks = masks.bool()
    masks = masks[masks.any(dim=1)]
    chosen = torch.zeros(tokens, dtype=torch.bool, device=masks.device)
    if masks.shape[0]:
        areas = masks.sum(dim=1).cpu()
        quotas = object_quotas(areas, count)
        while int(quotas.sum()) > count:
            most = (quotas == quotas.max()).nonzero().flatten()
            quotas[most[areas[most].argmin()]] -= 1
        for mask, quota in zip(masks, quotas.tolist(), strict=True):
            members = mask.nonzero().flatten()
            if quota:
                chosen[members[uniform_set(members.numel(), quota).to(members.device)]] = True
    others = (~chosen).nonzero().flatten()
    missing = count - int(chosen.sum())
    if missing:
        chosen[others[uniform_set(others.numel(), missing).to(others.device)]] = True
    return chosen.nonzero().flatten()


def attended_set(attention: Tensor, count: int) -> Tensor:
    """Tokens that the last stage keeps (step 4).

    Parameters
    ----------
    attention : Tensor
        ``[H, V]`` attention of the segmentation token, or of the last prompt token where there is none, to all visual
        tokens in the last layer of the middle stage.
    count : int
        N_p, from 1 to V.

    Returns
    -------
    Tensor
        ``[N_p]`` int64, ascending; lowest id on ties.

    Raises
    ------
    MethodError
        If N_p is out of range.
    """
    _check_count(attention.shape[-1], count)
    return top_indices(as_float32(attention).mean(dim=0), count)


def preset(layers: int, tokens: int, reduction: int = 65) -> LayerSplit:
    """A split that saves about 65 or 70 % of the tokens per layer (our choice; the published split is unknown).

    Parameters
    ----------
    layers : int
        L, at least 3. For 32 layers the stages have 8, 8, 16 or 9, 6, 17 layers.
    tokens : int
        N. A quarter of them represent, a sixteenth survive, at least one each.
    reduction : {65, 70}
        In percent.

    Returns
    -------
    LayerSplit

    Raises
    ------
    MethodError
        If there is no such preset or the model is too shallow.
    """
    if reduction not in _PRESETS or layers < 3:
        raise MethodError(
            f"no preset has {reduction} % fewer tokens in {layers} layers; use 65 or 70 % and 3 layers at least."
        )
    first, second = (max(1, round(layers * share)) for share in _PRESETS[reduction])
    return LayerSplit(first, second, layers - first - second, max(1, tokens // 4), max(1, tokens // 16))


def tokens_per_layer(split: LayerSplit, tokens: int) -> list[int]:
    """Visual tokens in every layer, which is also what its key-value cache holds of them."""
    return [split.representatives] * split.clustering + [tokens] * split.scattering + [split.survivors] * split.pruning


def average_share(split: LayerSplit, tokens: int) -> float:
    """Mean number of visual tokens per layer as a share of all; the reduction is what is missing to 1."""
    counts = tokens_per_layer(split, tokens)
    return sum(counts) / len(counts) / tokens


def nearest_representative(group: Tensor, chosen: Tensor) -> Tensor:
    """Representative of every token: the nearest in reading order inside its group, the first of two.

    Parameters
    ----------
    group : Tensor
        ``[N]`` int64, for example the frame of every token.
    chosen : Tensor
        ``[N_c]`` int64 representatives, at least one in every group.

    Returns
    -------
    Tensor
        ``[N]`` int64 places in ``chosen``.
    """
    nearest = torch.zeros_like(group)
    for number in group.unique().tolist():
        members = (group == number).nonzero().flatten()
        mine = (group[chosen] == number).nonzero().flatten()
        distance = (members[:, None] - chosen[mine][None]).abs()
        nearest[members] = mine[distance.argmin(dim=1)]
    return nearest


@register
@dataclass
class LVLMCSP(Method):
    """LVLM_CSP: clustering, scattering and pruning stages of the LLM, which see different sets of visual tokens.

    Parameters
    ----------
    retention
        N_p: share of the tokens that enter the LLM which the last stage keeps, by the attention of the last prompt
        token (published: of the segmentation token).
    representatives
        N_c: share of every frame that the first stage sees.
    reduction
        65 or 70, in percent: which preset splits the layers.
    layers
        First layers of the second and of the third stage, for example ``"8/16"``, instead of the preset.
    clustering
        Representatives: ``"uniform"`` at a regular stride in every frame, ``"random"``, or ``"cls"`` by the attention
        of the tower's class token.
    scatter
        States with which the other tokens come back: ``"raw"`` as they were, ``"delta"`` with the change that the
        nearest representative went through.
    seed
        Seed of random representatives; frame ``i`` of a prompt uses ``seed + i``.
    """

    retention: float = 1 / 16
    representatives: float = 1 / 4
    reduction: int = 65
    layers: Numbers = None
    clustering: Clustering = "uniform"
    scatter: Scatter = "raw"
    seed: int = 0

    name: ClassVar[str] = "lvlm-csp"
    title: ClassVar[str] = "LVLM_CSP"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.10854"
    venue: ClassVar[str] = "arXiv 2025"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    lowest_layer: ClassVar[int] = 0
    published_positions: ClassVar[Positions] = "original"
    fidelity: ClassVar[Fidelity] = "inferred"
    fidelity_note: ClassVar[str] = (
        "from the abstract and reviews, without released code: the split of the layers, both shares, the states of "
        "tokens that come back and the layer of the attention are inferred; without the design that needs a segmenter"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_retention(self.representatives)
        for option, known in (("clustering", Clustering), ("scatter", Scatter)):
            if getattr(self, option) not in get_args(known):
                raise MethodError(
                    f"{option} must be one of {', '.join(get_args(known))}, not {getattr(self, option)!r}."
                )
        preset(3, 1, self.reduction)
        if self.layers is not None:
            stated = numbers(self.layers, "layers")
            if len(stated) != 2 or not all(isinstance(layer, int) for layer in stated) or not 0 < stated[0] < stated[1]:
                raise MethodError(f"layers must be two whole, rising numbers like 8/16, not {self.layers!r}.")

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """First layers of the three stages; on DeepStack models the first begins behind the layers with features."""
        first = facts.deepstack_layers
        if self.layers is not None:
            second, third = (int(layer) for layer in numbers(self.layers, "layers"))
            return first, second, third
        split = preset(facts.decoder_layers, 1, self.reduction)
        second = max(split.clustering, first + 1)
        return first, second, max(split.clustering + split.scattering, second + 1)

    def decoder_cuts(self, facts: HostFacts) -> tuple[Cut, ...]:
        """Put aside, restore, prune."""
        first, second, third = self.decoder_layers(facts)
        return Cut(first), Cut(second, restore=True), Cut(third)

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Class-token attention, where it chooses the representatives."""
        return (CLASS_ATTENTION,) if self.clustering == "cls" else ()

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM."""
        return layout.patches

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """The set of the stage that begins."""
        assert sample.facts is not None
        stage = self.decoder_layers(sample.facts).index(sample.layer)
        if stage == 2:
            keep = top_indices(sample.attention, keep_count(sample.hidden.shape[0], self.retention))
            return Plan(keep, positions=self.position_policy)
        if stage == 1:
            return Plan(torch.arange(sample.hidden.shape[0]), self._scattered(sample), positions=self.position_policy)
        chosen = self._representatives(sample)
        sample.memory.update(chosen=chosen, before=sample.hidden[chosen.to(sample.hidden.device)])
        return Plan(chosen, positions=self.position_policy, fate="aside")

    def _representatives(self, sample: DecoderSample) -> Tensor:
        """Tokens of the first stage, frame by frame."""
        parts = []
        for frame in sample.view.unique().tolist():
            members = (sample.view == frame).nonzero().flatten()
            count = keep_count(members.numel(), self.representatives)
            if self.clustering == "cls":
                scores = sample.tower[CLASS_ATTENTION]
                picked = class_set(scores[members.to(scores.device)], count).cpu()
            elif self.clustering == "random":
                generator = torch.Generator().manual_seed(self.seed + frame)
                picked = random_set(members.numel(), count, generator)
            else:
                picked = uniform_set(members.numel(), count)
            parts.append(members[picked])
        return torch.cat(parts).sort().values

    def _scattered(self, sample: DecoderSample) -> Tensor | None:
        """New states of the tokens that come back; None leaves them as they are."""
        if self.scatter == "raw":
            return None
        chosen = sample.memory["chosen"]
        nearest = nearest_representative(sample.view, chosen).to(sample.hidden.device)
        place = chosen.to(sample.hidden.device)
        change = as_float32(sample.hidden[place]) - as_float32(sample.memory.pop("before"))
        moved = as_float32(sample.hidden) + change[nearest]
        moved[place] = as_float32(sample.hidden[place])
        return moved.to(sample.hidden.dtype)
