"""The model families that can be pruned inside the engine, and which methods can do it there."""

from __future__ import annotations

from dataclasses import dataclass

from tokensieve.core.layout import Layout, Separators
from tokensieve.core.method import Method
from tokensieve.core.registry import build, list_methods, method_class, option_names
from tokensieve.core.sample import HostFacts
from tokensieve.errors import MethodError, TokensieveError

AVAILABLE_SIGNALS = ("tokens.features", "frames.count")
"""What a method may ask for inside the engine."""

PROBE_STEPS, PROBE_ROWS, PROBE_COLUMNS = 6, 5, 7


@dataclass(frozen=True)
class Family:
    """One model family inside the engine.

    Attributes
    ----------
    architecture
        Name of the model class in the configuration of a checkpoint.
    target
        Our class for it, as ``module:class``.
    slug, title
        Of the host.
    axes
        Number of position axes of the language model.
    separators
        Separators of a video.
    """

    architecture: str
    target: str
    slug: str
    title: str
    axes: int
    separators: Separators = "none"

    def facts(self, decoder_layers: int = 28, tower_layers: int = 27) -> HostFacts:
        """What methods may read about the model."""
        return HostFacts(
            family=self.slug,
            decoder_layers=decoder_layers,
            tower_layers=tower_layers,
            feature_layer=tower_layers - 1,
            has_class_token=False,
            position_axes=self.axes,
            window_attention=self.slug == "qwen2_5_vl",
            video_separators=self.separators,
        )


_HERE = "tokensieve.bridges.vllm"

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "Qwen2_5_VLForConditionalGeneration",
            f"{_HERE}.qwen2_5_vl:PrunedQwen25VL",
            "qwen2_5_vl",
            "Qwen2.5-VL",
            axes=3,
        ),
        Family("Qwen3VLForConditionalGeneration", f"{_HERE}.qwen3_vl:PrunedQwen3VL", "qwen3_vl", "Qwen3-VL", axes=3),
        Family(
            "LlavaOnevisionForConditionalGeneration",
            f"{_HERE}.llava_onevision:PrunedLlavaOnevision",
            "llava_onevision",
            "LLaVA-OneVision",
            axes=1,
            separators="end",
        ),
    )
}
"""Every family by the name of its architecture."""


def family_of(architecture: str) -> Family:
    """The family of an architecture, or a MethodError that names those that can be pruned."""
    if architecture not in FAMILIES:
        known = ", ".join(family.title for family in FAMILIES.values())
        raise MethodError(
            f"tokensieve cannot prune {architecture} inside vLLM; it prunes {known}. Leave --video-pruning-method out, "
            "or run the model on transformers."
        )
    return FAMILIES[architecture]


def why_not(method: Method, family: Family) -> str | None:
    """Why a method cannot prune a family inside the engine, as a clause; None when it can."""
    if method.kind != "prune":
        return f"it is of kind {method.kind!r}, and the engine can only leave tokens out"
    if method.stages not in (("tokens",), ("frames",)):
        return f"it acts at the stages {', '.join(method.stages)}, and the engine cuts only in front of the LLM"
    if method.needs_file:
        return f"it needs the file {method.needs_file!r}, whose signals come from inside the LLM"
    missing = [text for text in method.signals(family.facts()) if text.partition("@")[0] not in AVAILABLE_SIGNALS]
    if missing:
        return f"it needs {missing[0]}, which the engine does not give"
    if method.position_policy == "original" and family.axes == 1:
        return "it keeps the original positions, and the engine numbers the tokens of this model anew"
    layout = Layout.regular("video", PROBE_STEPS, PROBE_ROWS, PROBE_COLUMNS, family.separators)
    if method.token_count(layout) is None:
        exact = "exact_total" in option_names(type(method))
        advice = "; set exact_total=true" if exact else ""
        return f"its number of tokens depends on what the video shows, and the engine must know it before{advice}"
    return None


def checked(method: Method, family: Family) -> Method:
    """The method itself, or a MethodError that says why it cannot run here and what can."""
    reason = why_not(method, family)
    if reason is not None:
        raise MethodError(
            f"{method.name} cannot prune {family.title} inside vLLM: {reason}; methods that work here: "
            f"{', '.join(qualifying_methods(family))}."
        )
    return method


def qualifying_methods(family: Family) -> list[str]:
    """Names of the methods that can prune a family inside the engine with their default options."""
    names = []
    for name in list_methods():
        options = {"exact_total": True} if "exact_total" in option_names(method_class(name)) else {}
        try:
            method = build(name, options)
        except TokensieveError:
            # A method that cannot be built without options of its own does not run by its name alone.
            continue
        if why_not(method, family) is None:
            names.append(name)
    return names
