"""VFlowOpt as a registered method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import DecoderSample, HostFacts, TokenSample
from tokensieve.core.signals import SignalRequest
from tokensieve.errors import MethodError
from tokensieve.methods.vflowopt.functions import (
    Strategy,
    grid_cells,
    last_ratio,
    nearest_strategy,
    prune_and_recycle,
    select_important,
    survivors,
)
from tokensieve.methods.vflowopt.strategy_file import StoredStrategy, check_strategy
from tokensieve.ops.select import top_indices

ENTROPY = "encoder.pixel_entropy"
COUNTED = "vflowopt.counted_separators"


@register
@dataclass
class VFlowOpt(Method):
    """VFlowOpt: one importance map for a cut with recycling in front of the LLM and two cuts inside.

    Parameters
    ----------
    retention
        Average share of the visual tokens over the layers of the LLM, as the paper counts. The released settings of
        50, 25 and 10 % are used as they are, and interpolated otherwise.
    threshold, alpha, grid
        t, alpha and a instead of those settings.
    first, second
        R1 and R2 instead of those settings; R3 follows from the average.
    strategy
        JSON file of a search over all of these (see `tokensieve.methods.vflowopt.search`); its average decides.
    """

    threshold: float | None = None
    alpha: float | None = None
    grid: float | None = None
    first: float | None = None
    second: float | None = None
    strategy: str | None = None

    name: ClassVar[str] = "vflowopt"
    title: ClassVar[str] = "VFlowOpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.05211"
    venue: ClassVar[str] = "ICCV 2025"
    code: ClassVar[str] = "https://github.com/sihany077/VFlowOpt"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens", "decoder")
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    fidelity: ClassVar[Fidelity] = "exact"
    fidelity_note: ClassVar[str] = (
        "released settings belong to LLaVA-OneVision-7B with cuts at a third and two thirds of the depth, other models "
        "and averages should be searched; the entropy is that of the true pixels, not of normalised ones that wrapped; "
        "newlines between the rows of video frames are not counted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stored: StoredStrategy | None = None
        given = (self.threshold, self.alpha, self.grid, self.first, self.second)
        if self.strategy is not None:
            if any(value is not None for value in given):
                raise MethodError("a strategy file names all parameters; leave threshold, alpha, grid and ratios out.")
            self._stored = StoredStrategy.load(self.strategy)
        defaults = (1.0, 0.0, 1.0, 1.0, 1.0)
        t, alpha, grid, first, second = (d if x is None else x for x, d in zip(given, defaults, strict=True))
        check_strategy(Strategy(t, alpha, grid, (first, second, 1.0)))

    def cuts(self, facts: HostFacts) -> tuple[int, int]:
        """(k1, k2): a third and two thirds of the depth, rounded down, behind DeepStack's layers."""
        if self._stored is not None:
            return self._stored.cuts
        third = facts.decoder_layers // 3
        first = max(third, facts.deepstack_layers, 1)
        return first, max(2 * third, first + 1)

    def settings(self, facts: HostFacts) -> Strategy:
        """All parameters for a host."""
        if self._stored is not None:
            if self._stored.layers != facts.decoder_layers:
                raise MethodError(
                    f"{self.strategy} was found for an LLM of {self._stored.layers} layers, but this one has "
                    f"{facts.decoder_layers}; search anew for this model."
                )
            return self._stored.strategy
        cuts, layers = self.cuts(facts), facts.decoder_layers
        known = nearest_strategy(self.retention, cuts, layers)
        first = known.ratios[0] if self.first is None else self.first
        second = known.ratios[1] if self.second is None else self.second
        third = known.ratios[2]
        if self.first is not None or self.second is not None:
            third = last_ratio(self.retention, first, second, cuts, layers)
        return Strategy(
            known.threshold if self.threshold is None else self.threshold,
            known.alpha if self.alpha is None else self.alpha,
            known.grid if self.grid is None else self.grid,
            (first, second, third),
        )

    def check_host(self, facts: HostFacts) -> None:
        """The layers must exist and leave room for the average."""
        super().check_host(facts)
        self.settings(facts)

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention from important patches at the projected layer; the entropy where it weighs something."""
        settings = self.settings(facts)
        return (self._focused(settings), ENTROPY) if settings.alpha else (self._focused(settings),)

    @staticmethod
    def _focused(settings: Strategy) -> str:
        return str(SignalRequest("encoder.focused_attention", "feature", float(settings.threshold)))

    def _importance(self, signals: Mapping[str, Tensor], settings: Strategy) -> Tensor:
        importance = signals[self._focused(settings)]
        return importance + settings.alpha * signals[ENTROPY] if settings.alpha else importance

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """Both cuts inside the LLM."""
        return self.cuts(facts)

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Nothing of the LLM."""
        return ()

    def token_count(self, layout: Layout) -> int | None:
        """Depends on the model's layers, and for tiled images on which cells lose patches."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Cut to R1; for images of several pictures one recycled token per cell stands for what was cut there."""
        assert sample.facts is not None
        settings, layout = self.settings(sample.facts), sample.layout
        importance = self._importance(sample.signals, settings)
        separators, first = layout.tokens - layout.patches, settings.ratios[0]
        if layout.kind == "video":
            # Newlines behind single rows would use up the share kept of small budgets.
            counted = int(((layout.view < 0) & ~layout.is_patch).sum())
            keep = select_important(importance, first, counted)
            return Plan(keep, positions=self.position_policy, info={COUNTED: counted})
        if len(layout.views) == 1:
            keep = select_important(importance, first)
            return Plan(keep, positions=self.position_policy, info={COUNTED: separators})
        places = layout.patch_tokens
        cell = grid_cells(layout.view[places], layout.row[places], layout.column[places], settings.grid)
        merged = prune_and_recycle(sample.features, importance, cell, first, settings.grid, separators)
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, info={COUNTED: separators})

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Drop the least important of what is left (step 3); positions stay."""
        assert sample.facts is not None
        settings = self.settings(sample.facts)
        share = settings.ratios[1 + self.cuts(sample.facts).index(sample.layer)]
        importance = self._importance(sample.tower, settings)
        counted = sum(int(info.get(COUNTED, 0)) for info in sample.infos)
        total = importance.numel() + counted
        count = max(1, importance.numel() - (total - survivors(total, share)))
        keep = top_indices(importance, count)
        return Plan(keep, positions=self.positions or "original")
