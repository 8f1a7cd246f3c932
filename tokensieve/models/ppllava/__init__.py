"""PPLLaVA (arXiv 2411.02327): visual tokens pooled under the guidance of the question.

The package offers the parts of the model as functions and modules that work on their own:

- :mod:`.pooling`, the parameter-free operator that turns a clip into few tokens,
- :mod:`.alignment` and :mod:`.relevance`, relevance maps from the CLIP or SigLIP pair that the host's vision tower
  belongs to,
- :mod:`.context`, text towers that read longer questions,
- :mod:`.bt_adapter`, the temporal branch in the vision tower of the published Vicuna models.

For a clip ``features`` of the vision tower and its ``projected`` tokens::

    align = ClipAlignment.from_clip(extend_context(clip))
    found = align(features, input_ids, attention_mask, grid=(24, 24))
    tokens = prompt_guided_pool(projected, found.relevance, grid=(24, 24)).flatten(0, 2)

and the whole model in the class layout of transformers (loaded on first use):

- :class:`PPLlavaConfig`, :class:`PPLlavaForConditionalGeneration`, :class:`PPLlavaProcessor`; :func:`register` makes
  the Auto classes know them,
- :func:`assemble` and :func:`assemble_processor` build them from a contrastive pair and a language model or a LLaVA
  model, :func:`load_official` reads the published checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokensieve.models.ppllava.alignment import ClipAlignment, SiglipAlignment
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
from tokensieve.models.ppllava.relevance import Alignment, cosine_map, relevance_map, resize_relevance

if TYPE_CHECKING:
    from tokensieve.models.ppllava.assembly import assemble, assemble_processor
    from tokensieve.models.ppllava.bt_adapter import BTAdapterVisionModel
    from tokensieve.models.ppllava.configuration import PPLlavaConfig
    from tokensieve.models.ppllava.modeling import PPLlavaForConditionalGeneration, PPLlavaModel
    from tokensieve.models.ppllava.official import LoadReport, load_official
    from tokensieve.models.ppllava.processing import PPLlavaProcessor
    from tokensieve.models.ppllava.registration import register

_LATER = {
    "BTAdapterVisionModel": "bt_adapter",
    "LoadReport": "official",
    "PPLlavaConfig": "configuration",
    "PPLlavaForConditionalGeneration": "modeling",
    "PPLlavaModel": "modeling",
    "PPLlavaProcessor": "processing",
    "assemble": "assembly",
    "assemble_processor": "assembly",
    "load_official": "official",
    "register": "registration",
}
"""Names that need transformers, and the module of each."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


__all__ = [
    "IMAGE_KERNEL",
    "VIDEO_KERNEL",
    "Alignment",
    "BTAdapterVisionModel",
    "ClipAlignment",
    "ExtendedTextEmbeddings",
    "LoadReport",
    "PPLlavaConfig",
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaProcessor",
    "SiglipAlignment",
    "Window",
    "assemble",
    "assemble_processor",
    "cosine_map",
    "extend_context",
    "extend_positions",
    "load_official",
    "merge_tables",
    "prompt_guided_pool",
    "register",
    "relevance_map",
    "resize_relevance",
    "resolve_window",
    "split_tables",
    "window_weights",
]
