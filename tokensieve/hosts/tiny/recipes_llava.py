"""Recipes of the LLaVA families: CLIP or SigLIP towers over square images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
)

from tokensieve.hosts.tiny.recipe import (
    ASSISTANT,
    HALF,
    Overrides,
    Recipe,
    config_of,
    square_pixels,
    text_config,
    tower_config,
)
from tokensieve.hosts.tiny.templates import MISTRAL, VICUNA, chatml
from tokensieve.hosts.tiny.vocabulary import llama_tokenizer, qwen_tokenizer
from tokensieve.models import llava_video as llava_video_classes

__all__ = ["RECIPES"]


def _clip(overrides: Overrides) -> dict[str, Any]:
    return tower_config("clip_vision_model", 112, overrides, projection_dim=32)


def _siglip(overrides: Overrides) -> dict[str, Any]:
    return tower_config("siglip_vision_model", 126, overrides, vision_use_head=False)


def _clip_pixels(vision: Mapping[str, Any]) -> dict[str, Any]:
    side = vision["image_size"]
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


_NEXT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles that LLaVA-NeXT may cut an image into."""


def _tiles(vision: Mapping[str, Any], shapes: tuple[tuple[int, int], ...]) -> list[list[int]]:
    return [[rows * vision["image_size"], columns * vision["image_size"]] for rows, columns in shapes]


def llava(overrides: Overrides) -> Recipe:
    """LLaVA-1.5: one CLIP grid per image without its class token, second to last layer, Llama."""
    tokenizer = llama_tokenizer(["<image>", "<pad>"], named={"image_token": "<image>"})
    vision = _clip(overrides)
    config = config_of(
        "llava",
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(**{**_clip_pixels(vision), **overrides.image_processor}),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return Recipe(config, processor)


def llava_next(overrides: Overrides) -> Recipe:
    """LLaVA-NeXT: a base view and two to four tiles per image, newline after every row of tiles, Mistral."""
    tokenizer = llama_tokenizer(["<image>", "<pad>"], named={"image_token": "<image>"})
    vision = _clip(overrides)
    tiles = _tiles(vision, _NEXT_TILES)
    config = config_of(
        "llava_next",
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="mistral", sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tiles,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    pixels = {**_clip_pixels(vision), "image_grid_pinpoints": tiles, **overrides.image_processor}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(**pixels),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
    )
    return Recipe(config, processor)


def llava_next_video(overrides: Overrides) -> Recipe:
    """LLaVA-NeXT-Video: images as LLaVA-NeXT, frames pooled 2 x 2 without any newline, Llama."""
    tokenizer = llama_tokenizer(
        ["<video>", "<image>", "<pad>"], named={"image_token": "<image>", "video_token": "<video>"}
    )
    vision = _clip(overrides)
    tiles = _tiles(vision, _NEXT_TILES)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    config = config_of(
        "llava_next_video",
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
        image_seq_length=patches,
        video_seq_length=patches // 4,
    )
    pixels = {**_clip_pixels(vision), "image_grid_pinpoints": tiles, **overrides.image_processor}
    frame_pixels = {**_clip_pixels(vision), "do_center_crop": True, **overrides.video_processor}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**frame_pixels),
        image_processor=LlavaNextImageProcessor(**pixels),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return Recipe(config, processor)


def _siglip_qwen(
    kind: str, processor_class: type[LlavaOnevisionProcessor], template: str, overrides: Overrides
) -> Recipe:
    tokenizer = qwen_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        named={"image_token": "<image>", "video_token": "<video>"},
    )
    vision = _siglip(overrides)
    tiles = _tiles(vision, tuple((rows, columns) for rows in range(1, 5) for columns in range(1, 5)))
    config = config_of(
        kind,
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
    )
    pixels = {**square_pixels(vision["image_size"]), "image_mean": HALF, "image_std": HALF}
    processor = processor_class(
        image_processor=LlavaOnevisionImageProcessor(
            **{**pixels, "image_grid_pinpoints": tiles, **overrides.image_processor}
        ),
        video_processor=LlavaOnevisionVideoProcessor(**{**pixels, **overrides.video_processor}),
        tokenizer=tokenizer,
        num_image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return Recipe(config, processor)


def llava_onevision(overrides: Overrides) -> Recipe:
    """LLaVA-OneVision: odd SigLIP grid, frames interpolated to half (rounded up), a newline per video."""
    return _siglip_qwen("llava_onevision", LlavaOnevisionProcessor, chatml(in_order=False), overrides)


def llava_video(overrides: Overrides) -> Recipe:
    """LLaVA-Video: odd SigLIP grid, frames pooled to half (rounded down), a newline per row."""
    llava_video_classes.register()
    template = chatml("<image>\n", "<video>\n", system=ASSISTANT)
    return _siglip_qwen("llava_video", llava_video_classes.LlavaVideoProcessor, template, overrides)


RECIPES: dict[str, Callable[[Overrides], Recipe]] = {
    recipe.__name__: recipe for recipe in (llava, llava_next, llava_next_video, llava_onevision, llava_video)
}
"""Recipe of every family of this module by its slug."""
