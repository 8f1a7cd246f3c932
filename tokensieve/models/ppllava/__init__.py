"""PPLLaVA (arXiv 2411.02327): visual tokens pooled under the guidance of the question.

The package offers the parts of the model as functions and modules that work on their own:

- :mod:`.pooling`, the parameter-free operator that turns a clip into few tokens,
- :mod:`.alignment`, relevance maps from the CLIP or SigLIP pair that the host's vision tower belongs to,
- :mod:`.context`, text towers that read longer questions,
- :mod:`.bt_adapter`, the temporal branch in the vision tower of the published Vicuna models.

For a clip ``features`` of the vision tower and its ``projected`` tokens::

    align = ClipAlignment.from_clip(extend_context(clip))
    found = align(features, input_ids, attention_mask, grid=(24, 24))
    tokens = prompt_guided_pool(projected, found.relevance, grid=(24, 24)).flatten(0, 2)
"""

from tokensieve.models.ppllava.alignment import (
    Alignment,
    ClipAlignment,
    SiglipAlignment,
    cosine_map,
    relevance_map,
    resize_relevance,
)
from tokensieve.models.ppllava.bt_adapter import BTAdapterVisionModel
from tokensieve.models.ppllava.context import (
    ExtendedTextEmbeddings,
    extend_context,
    extend_positions,
    merge_tables,
    split_tables,
)
from tokensieve.models.ppllava.pooling import (
    IMAGE_KERNEL,
    VIDEO_KERNEL,
    Window,
    prompt_guided_pool,
    resolve_window,
    window_weights,
)

__all__ = [
    "IMAGE_KERNEL",
    "VIDEO_KERNEL",
    "Alignment",
    "BTAdapterVisionModel",
    "ClipAlignment",
    "ExtendedTextEmbeddings",
    "SiglipAlignment",
    "Window",
    "cosine_map",
    "extend_context",
    "extend_positions",
    "merge_tables",
    "prompt_guided_pool",
    "relevance_map",
    "resize_relevance",
    "resolve_window",
    "split_tables",
    "window_weights",
]
