"""Relevance prediction as a registered method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.core.method import Fidelity, Selector, Stage
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.methods.explainability_compression.mapper import RelevanceMapper
from tokensieve.ops.select import top_indices

ATTENTION = "tokens.first_attention"


@register
@dataclass
class ExplainabilityCompression(Selector):
    """Tokens by the relevance that a trained mapper predicts from the first layer's attention.

    Parameters
    ----------
    weights
        Folder of a mapper that was trained for this model (``config.json`` and ``model.safetensors``).
    image_weights
        Another one for images; by default ``weights`` serves both, if it was trained for both.
    """

    weights: str | None = None
    image_weights: str | None = None

    name: ClassVar[str] = "explainability-compression"
    title: ClassVar[str] = "Explainability Compression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.01097"
    venue: ClassVar[str] = "ICLR 2026"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    accepts_budget: ClassVar[bool] = False
    needs_file: ClassVar[str] = "weights"
    fidelity: ClassVar[Fidelity] = "inferred"
    fidelity_note: ClassVar[str] = (
        "no code is public; labels, input, layers and loss follow the paper, while kernel, norm, activation, learning "
        "rate and rounding are ours; each visual item of a prompt keeps its own share"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mapper = RelevanceMapper.load(self.weights) if self.weights else None
        self._for_images = RelevanceMapper.load(self.image_weights) if self.image_weights else self._mapper

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention of the instruction in the first layer of the LLM."""
        return (ATTENTION,)

    def check_host(self, facts: HostFacts) -> None:
        """A mapper must be there and belong to this family and depth."""
        super().check_host(facts)
        if self._mapper is None and self._for_images is None:
            raise MethodError(
                f"{self.name} needs a mapper that was trained for this model; train one and pass its folder as "
                "weights=... (see tokensieve.methods.explainability_compression.training)."
            )
        for mapper in (self._mapper, self._for_images):
            if mapper is None:
                continue
            config = mapper.config
            if config.host not in ("", facts.family) or config.decoder_layers not in (0, facts.decoder_layers):
                raise MethodError(
                    f"the mapper was trained for {config.host or 'any family'} with {config.decoder_layers} layers, "
                    f"but this model is {facts.family} with {facts.decoder_layers}; train one for it."
                )

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """The most relevant tokens (step 9)."""
        kind = sample.layout.kind
        mapper = self._for_images if kind == "image" else self._mapper
        if mapper is None or mapper.config.modality not in ("any", kind):
            known = "none" if mapper is None else mapper.config.modality
            raise MethodError(
                f"{self.name} has no mapper for {kind}s (only for: {known}); pass one as "
                f"{'image_weights' if kind == 'image' else 'weights'}=..."
            )
        return top_indices(mapper.score(sample.signal(ATTENTION)), count)
