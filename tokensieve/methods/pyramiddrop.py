"""PyramidDrop: drop visual tokens in stages, the deeper the more, by what the last prompt token would attend to.

Based on "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
(arXiv 2410.17247, CVPR 2025). At the end of every stage of the LLM the visual tokens are ranked by the attention
that the last token of the prompt would pay to them in the next layer, and a fixed share goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.ops.depth import Numbers, geometric_factor, numbers, spread_layers, stated_shares
from tokensieve.ops.select import top_indices

NEXT = "decoder.next_last_query_attention"
STAGES = 4
"""Stages of equal depth in the published setting, with a factor of 0.5 between them."""


def stage_count(entered: int, ratio: float) -> int:
    """Visual tokens of a stage: the share of those that entered, truncated, at least one.

    Parameters
    ----------
    entered : int
        Visual tokens V that entered the LLM.
    ratio : float
        Share of V; the product is taken in float64, as the released code does.

    Returns
    -------
    int
        ``max(1, int(V * ratio))``.
    """
    return max(1, int(entered * ratio))


def stage_survivors(attention: Tensor, count: int) -> Tensor:
    """Tokens that go on into the next stage (steps 3 and 4).

    Parameters
    ----------
    attention : Tensor
        ``[v]`` attention of the last prompt token in the next layer to the visual tokens still alive.
    count : int
        Number to keep, at most v.

    Returns
    -------
    Tensor
        ``[count]`` int64, ascending; the lowest index wins ties.
    """
    return top_indices(attention, count)


def stage_layers(layers: int, first: int = 1, retention: float | None = None) -> tuple[int, ...]:
    """Layers in front of which PyramidDrop cuts.

    Parameters
    ----------
    layers : int
        Number of layers of the LLM.
    first : int
        First layer in front of which a cut is allowed.
    retention : float, optional
        A wanted layer average. Below what four equal stages reach with the published factor (0.469) all cuts
        move to the front in proportion, so that the factor stays near 0.5; the published video tables at 25 %
        and 15 % must have done something of the kind, but do not say what.

    Returns
    -------
    tuple of int
        Up to three layers; 8, 16, 24 of 32.
    """
    quarters = [i / STAGES for i in range(1, STAGES)]
    shares = [0.5**i for i in range(STAGES)]
    spread = sum(share - shares[-1] for share in shares[:-1]) / STAGES
    scale = 1.0 if retention is None else min(1.0, max(0.0, (retention - shares[-1]) / spread))
    return spread_layers([layers * quarter * scale for quarter in quarters], layers, first)


@register
@dataclass
class PyramidDrop(Method):
    """PyramidDrop: several cuts inside the LLM, each by the attention of the last prompt token in the next layer.

    Parameters
    ----------
    retention
        Share of the visual tokens that survives the last cut. The stages before follow with equal factors, so
        that the default is the published 0.5, 0.25, 0.125, which is 46.9 % per layer on average.
    average
        ``retention`` is the average over all layers instead; below 0.469 the cuts also move to the front (the
        lists of the published video tables are not known).
    layers
        Layers in front of which to cut, for example ``[8, 16, 24]`` or ``"8/16/24"``; None takes every quarter
        of the depth.
    ratios
        Share of the entered tokens behind every cut, for example ``[0.5, 0.25, 0.125]`` or ``"0.5/0.25/0.125"``;
        decides instead of ``retention``.
    positions
        ``"renumber"`` (published) counts the positions anew at every cut; ``"original"`` keeps them, which also
        selects other tokens from the second cut on. Models with several position axes keep them.
    """

    retention: float = 0.125
    average: bool = False
    layers: Numbers = None
    ratios: Numbers = None

    name: ClassVar[str] = "pyramiddrop"
    title: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    venue: ClassVar[str] = "CVPR 2025"
    code: ClassVar[str] = "https://github.com/Cooperx521/PyramidDrop"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    fidelity_note: ClassVar[str] = (
        "grouped keys and left padding work, which the released code refuses; newline embeddings are kept and never "
        "ranked"
    )

    def __post_init__(self) -> None:
        if self.ratios is not None:
            shares = numbers(self.ratios, "ratios")
            if self.average:
                raise MethodError("ratios and average=True contradict each other; give one of them.")
            if not all(0.0 < share <= 1.0 for share in shares) or list(shares) != sorted(shares, reverse=True):
                raise MethodError(f"ratios must fall and lie above 0 and up to 1, not {self.ratios!r}.")
            self.retention = float(shares[-1])
        if self.layers is not None:
            cuts = numbers(self.layers, "layers")
            if list(cuts) != sorted(set(cuts)) or not all(isinstance(cut, int) for cut in cuts):
                raise MethodError(f"layers must be whole and ascending, not {self.layers!r}; for example 8/16/24.")
        super().__post_init__()

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """The layers behind the stages."""
        if self.layers is not None:
            return tuple(int(layer) for layer in numbers(self.layers, "layers"))
        wanted = self.retention if self.average else None
        cuts = stage_layers(facts.decoder_layers, max(1, facts.deepstack_layers), wanted)
        return cuts if self.ratios is None else cuts[: len(numbers(self.ratios, "ratios"))]

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention of the last prompt token by the projections of the next layer."""
        return (NEXT,)

    def check_host(self, facts: HostFacts) -> None:
        """Layers must exist, be as many as the ratios, and reach a wanted average."""
        super().check_host(facts)
        self.shares(facts)

    def shares(self, facts: HostFacts) -> tuple[float, ...]:
        """Share of the entered tokens behind every cut."""
        cuts = self.decoder_layers(facts)
        if self.ratios is not None:
            return stated_shares(self.ratios, cuts, self.name)
        if self.average:
            factor = geometric_factor(self.retention, cuts, facts.decoder_layers)
        else:
            factor = self.retention ** (1 / len(cuts))
        before = tuple(factor**i for i in range(1, len(cuts)))
        return (*before, factor ** len(cuts) if self.average else self.retention)

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM; the cuts come later."""
        return layout.patches

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Rank all visual tokens of the prompt together."""
        assert sample.facts is not None
        stage = self.decoder_layers(sample.facts).index(sample.layer)
        count = stage_count(sample.entered, self.shares(sample.facts)[stage])
        keep = stage_survivors(sample.signal(NEXT), min(count, sample.hidden.shape[0]))
        return Plan(keep, positions=self.position_policy)
