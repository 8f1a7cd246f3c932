"""Task-related token compression from an explainability perspective: a small network predicts which tokens matter.

Based on "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective" (arXiv
2506.01097; ICLR 2026 as "Task-Related Token Compression ..."). Labels are relevances of visual tokens for the model's
own answer, by attention rollout weighted with gradients. A convolutional network of some 0.18 M parameters learns them
from the attention that the instruction pays to the visual tokens in the first layer of the LLM. With it, only that
layer's norm and projections run before the tokens are chosen.

`labels` makes the labels, `dataset` keeps them on disk, `training` trains the network, `mapper` is the network.
"""

from tokensieve.methods.explainability_compression.mapper import (
    MapperConfig,
    RelevanceMapper,
    relevance_loss,
    relevance_target,
)
from tokensieve.methods.explainability_compression.method import ExplainabilityCompression

__all__ = [
    "ExplainabilityCompression",
    "MapperConfig",
    "RelevanceMapper",
    "relevance_loss",
    "relevance_target",
]
