"""TransPrune: keep the visual tokens that the LLM rewrites most, and that the question attends to.

Based on "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model" (arXiv 2507.20630, CVPR
2026). The change that attention and MLP make to a token is added up over the middle layers; at three layers the
visual tokens are ranked by it together with the attention of the text behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokensieve.core.layout import Layout
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.errors import MethodError
from tokensieve.ops.depth import Numbers, average_shares, interpolated_shares, numbers, spread_layers, stated_shares
from tokensieve.ops.select import top_indices
from tokensieve.ops.token_transition import transition_score

NEXT_TEXT = "decoder.next_text_attention"
TRANSITION = "decoder.transition"
DEPTH, LAYERS = 32, (7, 9, 12)
"""Layers of the published model, and the number of layers in front of each cut."""
RATIOS = ((0.5, 0.25, 0.0625), (0.875, 0.625, 0.125))
"""Settings Low (its list is inferred from the published FLOPs) and High."""


@register
@dataclass
class TransPrune(Method):
    """TransPrune: three cuts inside the LLM, by accumulated transitions and the attention of the text.

    Parameters
    ----------
    retention
        Share of the visual tokens that survives the last cut. The cuts before it follow the published settings,
        interpolated; the default is "High" with 0.875, 0.625, 0.125, and 0.0625 is "Low".
    average
        ``retention`` is the average over all layers instead.
    layers
        Layers in front of which to cut, from zero, for example ``"7/9/12"``; None takes the same share of the depth,
        behind the DeepStack layers.
    ratios
        Share of the entered tokens behind every cut, for example ``"0.875/0.625/0.125"``; decides instead of
        ``retention``.
    accumulate
        Layers (from zero) whose transitions count; None takes those from the one in front of the first cut to the
        one in front of the last.
    alpha
        Weight of the transitions against the attention.
    positions
        ``"renumber"`` (published) counts the positions anew at every cut; ``"original"`` keeps them.
    """

    retention: float = 0.125
    average: bool = False
    layers: Numbers = None
    ratios: Numbers = None
    accumulate: Numbers = None
    alpha: float = 0.5

    name: ClassVar[str] = "transprune"
    title: ClassVar[str] = "TransPrune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.20630"
    venue: ClassVar[str] = "CVPR 2026"
    code: ClassVar[str] = "https://github.com/liaolea/TransPrune"
    stages: ClassVar[tuple[Stage, ...]] = ("decoder",)
    fidelity_note: ClassVar[str] = "newline embeddings are kept and never ranked"

    def __post_init__(self) -> None:
        if self.ratios is not None:
            shares = numbers(self.ratios, "ratios")
            if self.average:
                raise MethodError("ratios and average=True contradict each other; give one of them.")
            if not all(0.0 < share <= 1.0 for share in shares) or list(shares) != sorted(shares, reverse=True):
                raise MethodError(f"ratios must fall and lie above 0 and up to 1, not {self.ratios!r}.")
            self.retention = float(shares[-1])
        for option in ("layers", "accumulate"):
            value = getattr(self, option)
            listed = () if value is None else numbers(value, option)
            if list(listed) != sorted(set(listed)) or not all(isinstance(layer, int) for layer in listed):
                raise MethodError(f"{option} must be whole and ascending, not {value!r}; for example 7/9/12.")
        if not 0.0 <= self.alpha <= 1.0:
            raise MethodError(f"alpha is {self.alpha}, but it is a weight from 0 to 1; the published value is 0.5.")
        super().__post_init__()

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """The layers behind the cuts."""
        if self.layers is not None:
            return tuple(int(layer) for layer in numbers(self.layers, "layers"))
        wanted = [layer * facts.decoder_layers / DEPTH for layer in LAYERS]
        cuts = spread_layers(wanted, facts.decoder_layers, max(1, facts.deepstack_layers))
        return cuts if self.ratios is None else cuts[: len(numbers(self.ratios, "ratios"))]

    def transition_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """Layers in front of the last cut whose transitions count."""
        cuts = self.decoder_layers(facts)
        if self.accumulate is None:
            return tuple(range(cuts[0] - 1, cuts[-1]))
        return tuple(int(layer) for layer in numbers(self.accumulate, "accumulate") if layer < cuts[-1])

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Transitions of the accumulated layers, and attention of the text by the next layer's projections."""
        return (NEXT_TEXT, *(f"{TRANSITION}@{layer}" for layer in self.transition_layers(facts)))

    def check_host(self, facts: HostFacts) -> None:
        """Layers must exist, be as many as the ratios, and reach a wanted average."""
        super().check_host(facts)
        self.shares(facts)

    def shares(self, facts: HostFacts) -> tuple[float, ...]:
        """Share of the entered tokens behind every cut."""
        cuts = self.decoder_layers(facts)
        if self.ratios is not None:
            return stated_shares(self.ratios, cuts, self.name)
        if len(cuts) > len(LAYERS):
            raise MethodError(f"transprune knows shares for three cuts, not {len(cuts)}; give ratios as well.")
        if self.average:
            return average_shares(self.retention, cuts, facts.decoder_layers, RATIOS)
        return (*interpolated_shares(self.retention, RATIOS)[-len(cuts) : -1], self.retention)

    def token_count(self, layout: Layout) -> int:
        """All tokens enter the LLM; the cuts come later."""
        return layout.patches

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Add up the transitions since the last cut, rank, and carry the sums of the survivors on."""
        assert sample.facts is not None
        cuts = self.decoder_layers(sample.facts)
        stage = cuts.index(sample.layer)
        first = cuts[stage - 1] if stage else 0
        attention = sample.signal(NEXT_TEXT)
        moved = sample.memory.get("transitions", torch.zeros_like(attention[:0].sum(0)))
        fresh = [f"{TRANSITION}@{i}" for i in self.transition_layers(sample.facts) if first <= i < sample.layer]
        if moved.numel() != attention.shape[1] or not set(fresh) <= set(sample.signals):
            raise MethodError(
                "transprune adds transitions up from cut to cut, but another method cuts in between; give that one a "
                "layer in front of or behind all layers that transprune uses."
            )
        for name in fresh:
            moved = moved + sample.signal(name).to(moved)
        scores = transition_score(moved, attention, self.alpha)
        count = max(1, int(sample.entered * self.shares(sample.facts)[stage]))
        keep = top_indices(scores, count)
        sample.memory["transitions"] = moved[keep]
        return Plan(keep, positions=self.position_policy, info={"scores": scores})
