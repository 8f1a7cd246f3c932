"""The base of every compression method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan, Positions, join_views
from tokensieve.core.sample import DecoderSample, FrameSample, HostFacts, PromptSample, StepSample, TokenSample
from tokensieve.core.tower import Together, TowerProgram, TowerSample
from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.allocate import keep_count

Stage = Literal["frames", "encoder", "tokens", "decoder", "cache"]
Kind = Literal["prune", "merge", "replace", "none"]
Fidelity = Literal["exact", "mostly", "inferred", "control"]


@dataclass
class Method:
    """A published compression method: hyper-parameters as fields, facts about it as class attributes.

    A subclass overrides the stage functions it uses (`plan_frames`, `plan_tokens`, `plan_decoder`) and knows
    no model. The runtime calls them with one sample at a time and carries the plans out.

    Parameters
    ----------
    retention
        Share of the visual tokens to keep, in (0, 1]. For methods that act before the LLM: tokens that enter
        it. For methods that act inside: tokens that survive their last cut.
    budget
        Frame-budget module (``"vidcom2"``) that decides how many tokens each frame keeps, or None for the
        method's own rule.
    positions
        Overrides the position policy that the published code uses (``"original"`` or ``"renumber"``).

    Attributes
    ----------
    lowest_layer
        First decoder layer in front of which the method can cut; 0 for methods that need nothing of a layer before.
    needs_file
        Option that names trained weights without which the method cannot run; empty for most.
    may_be_empty
        Whether a plan inside the LLM may drop every visual token.
    cuts_separators
        Whether plans inside the LLM also decide on row separators, as grid cells of their own.
    """

    retention: float = 0.25
    budget: str | None = None
    positions: Positions | None = None

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    venue: ClassVar[str] = ""
    code: ClassVar[str] = ""
    stages: ClassVar[tuple[Stage, ...]] = ()
    kind: ClassVar[Kind] = "prune"
    causal: ClassVar[bool] = False
    exact_count: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "exact"
    fidelity_note: ClassVar[str] = ""
    uniform_views: ClassVar[bool] = False
    accepts_budget: ClassVar[bool] = False
    lowest_layer: ClassVar[int] = 1
    needs_file: ClassVar[str] = ""
    may_be_empty: ClassVar[bool] = False
    cuts_separators: ClassVar[bool] = False
    published_positions: ClassVar[Positions] = "renumber"

    def __post_init__(self) -> None:
        check_retention(self.retention)
        if self.budget is not None and not self.accepts_budget:
            raise MethodError(f"{self.name} takes no frame budget (asked for {self.budget!r}); leave it out.")
        if self.positions not in (None, "original", "renumber"):
            raise MethodError(f"positions must be 'original' or 'renumber', not {self.positions!r}.")

    @property
    def position_policy(self) -> Positions:
        """Positions of the survivors: the user's choice or that of the published code."""
        return self.positions or self.published_positions

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Requests for host signals (see `tokensieve.core.signals`), possibly depending on the host."""
        return ()

    def decoder_layers(self, facts: HostFacts) -> tuple[int, ...]:
        """Decoder layers (from zero) in front of which `plan_decoder` is called; () for none."""
        return ()

    def decoder_signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Decoder signals that `plan_decoder` reads."""
        return ("decoder.last_query_attention",)

    def decoder_cuts(self, facts: HostFacts) -> tuple[Cut, ...]:
        """Places at which `plan_decoder` is called: in front of the `decoder_layers`."""
        return tuple(Cut(layer) for layer in self.decoder_layers(facts))

    def acts(self, cut: Cut, memory: dict[str, Any]) -> bool:
        """Whether the method has something to do at a cut, by what it remembers of the row.

        Where it has not, no signal is computed and nothing moves.
        """
        return True

    def decoding_layer(self, facts: HostFacts) -> int | None:
        """Decoder layer from which on decoding steps see only what `plan_step` shows them; None for everything."""
        return None

    def plan_step(self, sample: StepSample) -> Tensor | None:
        """Visible visual entries [n] bool of one decoding step; None for all of them."""
        return None

    def read_prompt(self, sample: PromptSample) -> dict[str, Any]:
        """What `plan_decoder` wants to remember of a prompt; called in front of the first layer."""
        return {}

    def check_host(self, facts: HostFacts) -> None:
        """Raise MethodError when the options do not fit the host (for example a layer it does not have)."""
        lowest = max(self.lowest_layer, facts.deepstack_layers)
        for cut in self.decoder_cuts(facts):
            if not self.lowest_layer <= cut.layer < facts.decoder_layers:
                raise MethodError(
                    f"{self.name} is to cut {cut}, but this model has layers 0..{facts.decoder_layers - 1}; choose a "
                    f"layer between {lowest} and {facts.decoder_layers - 1}."
                )
            if cut.layer < facts.deepstack_layers:
                raise MethodError(
                    f"{self.name} cannot cut {cut}: the first {facts.deepstack_layers} layers of this model receive "
                    f"extra visual features; choose layer {facts.deepstack_layers} or later."
                )
        start = self.decoding_layer(facts)
        if start is not None and not 1 <= start < facts.decoder_layers:
            raise MethodError(
                f"{self.name} is to select cache entries from layer {start} on, but this model has layers "
                f"0..{facts.decoder_layers - 1}; choose a layer between 1 and {facts.decoder_layers - 1}."
            )

    def plan_frames(self, sample: FrameSample) -> Tensor:
        """Frames to encode, ascending int64 [M]; all by default."""
        return torch.arange(sample.frames)

    @property
    def tower_together(self) -> Together:
        """Which pictures a method inside the tower must see together; fewer are slower."""
        return "all"

    def tower_program(self, sample: TowerSample) -> TowerProgram:
        """What happens to the tokens of some pictures inside the vision tower."""
        raise MethodError(f"{self.name} does not act inside the vision tower.")

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Tokens that enter the LLM."""
        raise MethodError(f"{self.name} does not act on tokens in front of the LLM.")

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        """Tokens that go on behind the cut ``sample.cut`` (in front of the decoder layer ``sample.layer``)."""
        raise MethodError(f"{self.name} does not act inside the LLM.")

    def token_count(self, layout: Layout) -> int | None:
        """Number of patches kept of an item, from geometry alone; None when it depends on the data."""
        if not self.exact_count or self.budget is not None:
            return None
        return keep_count(layout.patches, self.retention)

    def run_tokens(self, sample: TokenSample) -> Plan:
        """`plan_tokens`, view by view where the method needs equal views and the item has none."""
        if not self.uniform_views or sample.layout.is_uniform:
            return self.plan_tokens(sample)
        if sample.layout.kind == "video":
            raise MethodError(
                f"{self.name} compares frames patch by patch and needs every frame in full, but this model's "
                "processor left tokens out; build the inputs with use_token_compression=False."
            )
        views = [sample.view(i) for i in range(sample.frames)]
        plans = [self.plan_tokens(view).checked(view.layout.patches, self.name) for view in views]
        return join_views(sample.layout, plans)

    def options(self) -> dict[str, object]:
        """Hyper-parameters as a plain dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.name


@dataclass
class Selector(Method):
    """A method that keeps unmodified tokens: subclasses answer `select` and inherit budgets and rounding."""

    accepts_budget: ClassVar[bool] = True

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """Ascending patch ids [count] of the tokens to keep."""
        raise MethodError(f"{self.name} does not select tokens.")

    def count(self, sample: TokenSample) -> int:
        """Number of tokens to keep of a sample when no frame budget is given."""
        return keep_count(sample.layout.patches, self.retention)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Select over the whole item, or frame by frame when a budget module has allocated."""
        if sample.budget is None:
            keep = self.select(sample, self.count(sample))
            return Plan(keep, positions=self.position_policy)
        keeps, start = [], 0
        for index, patches in enumerate(sample.layout.patches_per_view.tolist()):
            part = sample.view(index)
            keeps.append(self.select(part, min(patches, int(sample.budget[index]))).cpu() + start)
            start += patches
        return Plan(torch.cat(keeps), positions=self.position_policy, info={"frame_budget": sample.budget})


def check_retention(retention: float) -> float:
    """The retention itself, or a RetentionError when it is no number in (0, 1]."""
    valid = isinstance(retention, (int, float)) and not isinstance(retention, bool)
    if not valid or not 0.0 < retention <= 1.0:
        raise RetentionError(f"Retention must lie in (0, 1], got {retention!r}; 0.25 keeps a quarter of the tokens.")
    return float(retention)
