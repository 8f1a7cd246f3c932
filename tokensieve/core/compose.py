"""Which methods act together: the rules, in one place, from what classes declare.

- At the stages *frames*, *encoder* and *tokens* only one method may act, and only one may select cache entries while an
  answer is decoded.
- Methods that only act in front of the LLM go with all that only act inside.
- Two methods that both act inside the LLM go together while they cut at different layers, and while none of them
  brings tokens back that the other has cut meanwhile.
- A frame budget goes with every method whose class says ``accepts_budget``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from tokensieve.core.budget import list_budgets
from tokensieve.core.cuts import Cut
from tokensieve.core.method import Method, Stage
from tokensieve.core.registry import list_methods, method_class
from tokensieve.core.sample import HostFacts
from tokensieve.errors import MethodError

__all__ = ["REFERENCE", "Composition", "check_composition", "list_compositions", "refusal"]

STAGES = get_args(Stage)
ALONE = ("frames", "encoder", "tokens")
"""Stages that one method has for itself."""
REFERENCE = HostFacts("llava_onevision", 28, 26, 25, has_class_token=False, video_separators="end")
"""A model to judge by where none is given: LLaVA-OneVision-7B."""


@dataclass(frozen=True)
class Composition:
    """Two methods, or a frame budget and a method.

    Attributes
    ----------
    first, second
        Names; ``first`` is a frame-budget module where ``budget`` is set.
    budget
        Whether this is a frame budget and a method.
    reason
        Why it is refused; empty where it is allowed.
    """

    first: str
    second: str
    budget: bool = False
    reason: str = ""

    @property
    def allowed(self) -> bool:
        """Whether the two act together."""
        return not self.reason

    @property
    def notation(self) -> str:
        """As `tokensieve.compress` and the command line take it."""
        return f"{self.second}:budget={self.first}" if self.budget else f"{self.first}+{self.second}"


def refusal(methods: Sequence[Method], facts: HostFacts | None = None) -> str:
    """Why some methods cannot act together, with their options; empty where they can.

    Parameters
    ----------
    methods
        Any number of them.
    facts : HostFacts, optional
        The model; without it only the stages are looked at, not the layers.

    Returns
    -------
    str
        A sentence that says what to do instead.
    """
    for stage in ALONE:
        acting = [method.name for method in methods if stage in method.stages]
        if len(acting) > 1:
            return (
                f"Only one method may act at the {stage} stage, not {' and '.join(acting)}; compose methods of "
                "different stages, or give a selector a frame budget (budget='vidcom2')."
            )
    if facts is None:
        return ""
    acting_methods = [method for method in methods if method.retention < 1.0]
    selecting = [method.name for method in acting_methods if method.decoding_layer(facts) is not None]
    if len(selecting) > 1:
        return f"Only one method may select cache entries while decoding, not {' and '.join(selecting)}."
    return _clash([method for method in acting_methods if "decoder" in method.stages], facts)


def _clash(methods: Sequence[Method], facts: HostFacts) -> str:
    """Why the cuts of some methods inside the LLM do not go together; empty where they do."""
    owners: dict[int, Method] = {}
    cuts: list[tuple[Cut, Method]] = []
    for method in methods:
        for cut in method.decoder_cuts(facts):
            other = owners.setdefault(cut.first, method)
            if other is not method:
                return (
                    f"{method.name} and {other.name} both cut in front of layer {cut.first}; give one of them another "
                    "layer."
                )
            cuts.append((cut, method))
    for cut, method in cuts:
        between = [m.name for other, m in cuts if cut.restore and other.first < cut.first and m is not method]
        if between:
            return (
                f"{method.name} brings tokens back in front of layer {cut.layer}, but {between[0]} cuts before; give "
                "that one a later layer."
            )
    return ""


def check_composition(methods: Sequence[Method], facts: HostFacts | None = None) -> None:
    """Raise MethodError with the reason of `refusal` where there is one."""
    reason = refusal(methods, facts)
    if reason:
        raise MethodError(reason)


def list_compositions(facts: HostFacts | None = None) -> list[Composition]:
    """Every frame budget with every method, and every pair of methods, with default options.

    Of a pair the one that acts earlier stands first. Controls that leave all tokens as they are (``none``) are left
    out.

    Parameters
    ----------
    facts : HostFacts, optional
        The model to judge by; `REFERENCE` by default. Which layers methods cut at depends on its depth.

    Returns
    -------
    list of Composition
        Frame budgets first.
    """
    facts = REFERENCE if facts is None else facts
    classes = [method_class(name) for name in list_methods() if method_class(name).kind != "none"]
    found = [
        Composition(budget, cls.name, True, "" if cls.accepts_budget else _no_budget(cls.name, budget))
        for budget in list_budgets()
        for cls in classes
    ]
    methods = sorted((cls() for cls in classes), key=_order)
    for first, second in itertools.combinations(methods, 2):
        found.append(Composition(first.name, second.name, False, refusal((first, second), facts)))
    return found


def _no_budget(name: str, budget: str) -> str:
    return f"{name} takes no frame budget (asked for {budget!r}); leave it out."


def _order(method: Method) -> tuple[int, bool, str]:
    """Sorts by the first stage, methods that go on acting inside the LLM behind the others."""
    first = min(STAGES.index(stage) for stage in method.stages)
    return first, first < STAGES.index("decoder") and bool({"decoder", "cache"} & set(method.stages)), method.name
