"""DART: keep a few pivots and the visual tokens least like them, inside the LLM.

Based on "Stop Looking for 'Important Tokens' in Multimodal Language Models: Duplication Matters More" (arXiv
2502.11494, EMNLP 2025). Pivots are the visual and text tokens with the largest keys. Each pivot in turn adopts
the visual tokens that are least similar to it, so that duplicates of pivots are dropped. No attention weights
are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan, Positions
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import round_half_even
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, unit_vectors

KEYS = "decoder.keys"
NORMED = "decoder.normed_states"
STATES = "decoder.states"
PivotOrder = Literal["ascending", "cpython"]
EPSILON = 1e-8
"""Lower bound of either norm in the cosine."""


def key_pivots(keys: Tensor, visual: int, image_pivots: int = 4, text_pivots: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens with the largest L1 norm of their keys (step 2).

    Parameters
    ----------
    keys : Tensor
        ``[V + T, d]`` rotated keys, all key heads joined, of the visual tokens and of the text behind them.
    visual : int
        V.
    image_pivots, text_pivots : int
        Numbers of pivots among the visual and the text tokens, limited to what there is.

    Returns
    -------
    image, text : Tensor
        Ids into ``keys`` by falling norm, int64; the lowest id wins ties.
    """
    norms = as_float32(keys).abs().sum(dim=-1)
    image = top_indices(norms[:visual], image_pivots, order="rank")
    text = top_indices(norms[visual:], text_pivots, order="rank") + visual
    return image, text


def python_set_order(image: Sequence[int], text: Sequence[int], start: int = 0) -> list[int]:
    """The order in which the released code visits the pivots: that of a CPython set of their positions.

    Parameters
    ----------
    image, text : sequence of int
        Pivots by falling norm, counted from the first visual token.
    start : int
        Position of the first visual token in the sequence, which decides the order as well.

    Returns
    -------
    list of int
        The same pivots in another order.
    """
    places = [pivot + start for pivot in (*image, *text)]
    return [place - start for place in set(places)]


def adoption_quotas(
    visual: int, retention: float, image_pivots: int, pivots: int, *, tokens: int | None = None, exact: bool = False
) -> list[int]:
    """How many tokens every pivot adopts (step 3).

    Parameters
    ----------
    visual : int
        Visual tokens V.
    retention : float
        Share R to keep; every pivot adopts ``int(V R / pivots)``. The pivots among the visual tokens come on top,
        so that the share reached differs a little.
    image_pivots, pivots : int
        Pivots among the visual tokens, and all pivots.
    tokens : int, optional
        A number of tokens instead of the share (LLaVA version of the released code): every pivot adopts
        ``tokens // pivots``, with ``tokens`` limited to the visual tokens that are no pivots.
    exact : bool
        Reach ``round(V R)`` (or ``tokens``) exactly, pivots included, with the remainder on the first pivots.

    Returns
    -------
    list of int
        One number per pivot, not negative.
    """
    if exact:
        wanted = round_half_even(visual * retention) if tokens is None else tokens
        each, rest = divmod(max(0, min(wanted, visual) - image_pivots), pivots)
        return [each + (index < rest) for index in range(pivots)]
    if tokens is not None:
        return [min(tokens, visual - image_pivots) // pivots] * pivots
    return [int(visual * retention / pivots)] * pivots


def adopt(states: Tensor, visual: int, pivots: Sequence[int], quotas: Sequence[int]) -> list[Tensor]:
    """Visual tokens that each pivot adopts: the least similar of those that are left (step 4).

    Parameters
    ----------
    states : Tensor
        ``[V + T, D]`` states behind the model's final norm.
    visual : int
        V.
    pivots : sequence of int
        Ids into ``states`` in the order of their turns; those below V are no candidates.
    quotas : sequence of int
        How many each adopts, limited to what is left.

    Returns
    -------
    list of Tensor
        Ascending ids below V for every pivot; the lowest id wins ties.
    """
    turns = torch.tensor(list(pivots), dtype=torch.long, device=states.device)
    directions = unit_vectors(states, EPSILON)
    cosine = directions[turns] @ directions[:visual].T
    cosine[:, turns[turns < visual]] = float("inf")
    left = visual - int((turns < visual).sum())
    groups = []
    for turn, quota in enumerate(quotas):
        group = top_indices(cosine[turn], min(quota, left), largest=False)
        cosine[:, group] = float("inf")
        left -= group.numel()
        groups.append(group)
    return groups


@register
@dataclass
class DART(Method):
    """DART: one cut in front of decoder layer K, against duplicates of pivot tokens.

    In front of the first layer there are no keys, and the input embeddings stand for keys and states alike.

    Parameters
    ----------
    retention
        Share of the visual tokens that goes on into layer K, up to the rounding of `adoption_quotas`; the published
        reduction ratio 0.778 is 1 minus it. Everything is kept of items with fewer visual tokens than twice the
        pivots.
    layer
        K, counted from zero; None takes 2, or the first layer behind the DeepStack layers. 0 cuts in front of the LLM.
    image_pivots, text_pivots
        Numbers of pivots. Text pivots come from all tokens behind the last visual one.
    tokens
        A number of tokens instead of the share, as in the LLaVA version of the released code.
    exact_total
        Keep exactly the share (or number) asked for, pivots included.
    pivot_order
        Order in which pivots take their turns: visual ones then text ones, each ``"ascending"``, or ``"cpython"``, the
        released code's order of a Python set of their positions.
    """

    retention: float = 0.222
    layer: int | None = None
    image_pivots: int = 4
    text_pivots: int = 4
    tokens: int | None = None
    exact_total: bool = False
    pivot_order: PivotOrder = "ascending"

    name: ClassVar[str] = "dart"
    title: ClassVar[str] = "DART"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    venue: ClassVar[str] = "EMNLP 2025"
    code: ClassVar[str] = "https://github.com/ZichenWen1/DART"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    lowest_layer: ClassVar[int] = 0
    published_positions: ClassVar[Positions] = "original"
    fidelity_note: ClassVar[str] = (
        "pivots take their turns in ascending order by default; newline embeddings are kept and never compared"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise MethodError(
                f"dart got {self.image_pivots} image and {self.text_pivots} text pivots; it needs at least 1 and 0, "
                "published are 4 and 4."
            )
        if self.tokens is not None and self.tokens < 1:
            raise MethodError(f"tokens is {self.tokens}, but at least one must stay; for example 128.")
        if self.pivot_order not in get_args(PivotOrder):
            raise MethodError(
                f"pivot_order must be one of {', '.join(get_args(PivotOrder))}, not {self.pivot_order!r}."
            )

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """K."""
        return (self.layer if self.layer is not None else max(2, facts.deepstack_layers),)

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Keys of the layer before, and its output behind the final norm; input embeddings in front of the LLM."""
        return (STATES,) if self.decoder_layers(facts) == (0,) else (KEYS, NORMED)

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM; the cut comes later."""
        return layout.patches

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Choose pivots over all visual items of the prompt and let them adopt."""
        keys, states = (sample.signal(name) for name in ((STATES, STATES) if sample.layer == 0 else (KEYS, NORMED)))
        visual = sample.hidden.shape[0]
        image, text = key_pivots(keys, visual, self.image_pivots, self.text_pivots)
        if visual < 2 * (self.image_pivots + self.text_pivots):
            return Plan(torch.arange(visual), positions=self.position_policy)
        turns = [*sorted(image.tolist()), *sorted(text.tolist())]
        if self.pivot_order == "cpython":
            start = 0 if sample.text_item is None else int((sample.text_item < 0).sum())
            turns = python_set_order(image.tolist(), text.tolist(), start)
        quotas = adoption_quotas(
            visual, self.retention, image.numel(), len(turns), tokens=self.tokens, exact=self.exact_total
        )
        groups = adopt(states, visual, turns, quotas)
        keep = torch.cat((image, *(group.to(image.device) for group in groups))).sort().values
        return Plan(keep, positions=self.position_policy, info={"pivots": torch.tensor(turns)})
