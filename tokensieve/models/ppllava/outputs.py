"""What the forward passes of PPLLaVA return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

__all__ = ["PPLlavaCausalLMOutput", "PPLlavaModelOutput"]


@dataclass
class PPLlavaModelOutput(BaseModelOutputWithPast):
    """Output of `PPLlavaModel`; ``visual_attention`` holds the cosine maps of images, then of videos."""

    visual_attention: Any = None


@dataclass
class PPLlavaCausalLMOutput(CausalLMOutputWithPast):
    """Output of `PPLlavaForConditionalGeneration`.

    Attributes
    ----------
    visual_attention : list of Tensor, optional
        With ``output_visual_attention=True``: ``[1, T, h, w]`` cosines of patches and question, images first.
    """

    visual_attention: Any = None
