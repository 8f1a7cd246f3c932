"""Parts that the recipes of all families share: overrides, language model and tower configurations.

What the recipes keep from the published checkpoints: the classes, the position schemes, odd and even patch
grids (SigLIP 27 x 27 becomes 9 x 9, CLIP 24 x 24 becomes 8 x 8), the class token, any-resolution tiling,
windowed vision attention, DeepStack, timestamps in the prompt, the placeholders and their markers. What
shrinks: widths, depths, pixels, the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from tokensieve.errors import HostError

__all__ = [
    "ASSISTANT",
    "HALF",
    "Overrides",
    "Recipe",
    "config_of",
    "mrope",
    "square_pixels",
    "text_config",
    "tower_config",
]

ASSISTANT = "You are a helpful assistant."
"""System prompt that some templates write of their own accord."""

HALF = [0.5, 0.5, 0.5]
"""Pixel mean and deviation of the SigLIP and Qwen3-VL processors."""


@dataclass(frozen=True)
class Overrides:
    """Settings that replace those of the tiny recipe.

    Attributes
    ----------
    text, vision : mapping
        Fields of the language model's and the vision tower's configuration, by their own names.
    config : mapping
        Fields of the outer configuration.
    image_processor, video_processor : mapping
        Arguments of the two processors (pixel limits of the Qwen family, for example). Sizes that follow from
        the tower's `image_size` need not be given.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    video_processor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint directory is made from, apart from its weights."""

    config: PreTrainedConfig
    processor: ProcessorMixin


def text_config(overrides: Overrides, tokenizer: PreTrainedTokenizerBase, **family: Any) -> dict[str, Any]:
    """Language model configuration: five layers of width 64, grouped-query attention, the tokenizer's ids."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **family,
        **overrides.text,
    }
    if config["vocab_size"] < len(tokenizer):
        raise HostError(f"vocab_size {config['vocab_size']} is below the tokenizer's; give at least {len(tokenizer)}.")
    return config


def mrope(overrides: Overrides, *, interleaved: bool) -> dict[str, Any]:
    """Rotary parameters with a section per axis, in proportion as Qwen2-VL or (interleaved) Qwen3-VL."""
    hidden, heads = overrides.text.get("hidden_size", 64), overrides.text.get("num_attention_heads", 4)
    half = overrides.text.get("head_dim", hidden // heads) // 2
    spatial = half * 5 // 16 if interleaved else half * 3 // 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5_000_000.0 if interleaved else 1_000_000.0}
    rope["mrope_section"] = [half - 2 * spatial, spatial, spatial]
    if interleaved:
        rope["mrope_interleaved"] = True
    return rope


def tower_config(kind: str, image_size: int, overrides: Overrides, **family: Any) -> dict[str, Any]:
    """CLIP-like tower configuration: four layers of width 32 over square images."""
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 14,
        **family,
        **overrides.vision,
    }


def square_pixels(side: int) -> dict[str, Any]:
    """Processor arguments for frames that are stretched to a square of `side` pixels."""
    return {"size": {"height": side, "width": side}}


def config_of(kind: str, overrides: Overrides, **fields: Any) -> PreTrainedConfig:
    """Outer configuration of a model type from its fields and the caller's overrides of them."""
    return AutoConfig.for_model(kind, **{"tie_word_embeddings": False, **fields, **overrides.config})
