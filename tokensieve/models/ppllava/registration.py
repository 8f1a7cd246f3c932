"""Making the Auto classes of transformers know PPLLaVA."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from tokensieve.models.ppllava.configuration import PPLlavaConfig
from tokensieve.models.ppllava.modeling import PPLlavaForConditionalGeneration, PPLlavaModel
from tokensieve.models.ppllava.processing import PPLlavaProcessor

__all__ = ["register"]


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText` and `AutoProcessor` know ``ppllava``.

    Call it once before these meet a checkpoint; calling it again changes nothing.
    """
    AutoConfig.register(PPLlavaConfig.model_type, PPLlavaConfig, exist_ok=True)
    AutoModel.register(PPLlavaConfig, PPLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(PPLlavaConfig, PPLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(PPLlavaConfig, PPLlavaProcessor, exist_ok=True)
