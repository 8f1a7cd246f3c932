"""Recipes of the families with Qwen-like prompts: Qwen-VL, InternVL and VideoLLaMA3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from tokensieve.hosts.tiny.recipe import (
    ASSISTANT,
    HALF,
    Overrides,
    Recipe,
    config_of,
    mrope,
    square_pixels,
    text_config,
    tower_config,
)
from tokensieve.hosts.tiny.templates import chatml
from tokensieve.hosts.tiny.vocabulary import qwen_tokenizer

__all__ = ["RECIPES"]

_QWEN_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _uncapped(processor_class: type) -> dict[str, Any]:
    """Choose the pixel rule explicitly where a release of transformers warns unless one is chosen."""
    return {"cap_pixels_per_frame": False} if hasattr(processor_class, "cap_pixels_per_frame") else {}


def _qwen_pixels(vision: Mapping[str, Any], merge: int = 2) -> dict[str, Any]:
    """Processor arguments of a Qwen tower: at most 36 merged tokens per image or step of a video."""
    unit = (vision["patch_size"] * merge) ** 2
    return {
        "size": {"shortest_edge": 4 * unit, "longest_edge": 36 * unit},
        "patch_size": vision["patch_size"],
        "merge_size": merge,
    }


def _qwen_vl(
    kind: str,
    processor_class: type[ProcessorMixin],
    vision: dict[str, Any],
    text: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    overrides: Overrides,
    *,
    video_processor: ProcessorMixin | None = None,
    system: str = ASSISTANT,
) -> Recipe:
    config = config_of(
        kind,
        overrides,
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    pixels = _qwen_pixels(vision)
    if video_processor is None:
        video_processor = Qwen2VLVideoProcessor(
            **{**pixels, **_uncapped(Qwen2VLVideoProcessor), **overrides.video_processor}
        )
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**{**pixels, **overrides.image_processor}),
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=chatml(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|><|video_pad|><|vision_end|>",
            system=system,
        ),
    )
    return Recipe(config, processor)


def qwen2_vl(overrides: Overrides) -> Recipe:
    """Qwen2-VL: any frame size, two frames per step, 2 x 2 merging, three-axis rotary positions."""
    tokenizer = qwen_tokenizer(_QWEN_MARKERS)
    text = text_config(overrides, tokenizer, rope_parameters=mrope(overrides, interleaved=False))
    vision = {"depth": 4, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    vision = {**vision, "hidden_size": text["hidden_size"], **overrides.vision}
    return _qwen_vl("qwen2_vl", Qwen2VLProcessor, vision, text, tokenizer, overrides)


def qwen2_5_vl(overrides: Overrides) -> Recipe:
    """Qwen2.5-VL: as Qwen2-VL with windowed vision attention (2 x 2 merged tokens) and time in seconds."""
    tokenizer = qwen_tokenizer(_QWEN_MARKERS)
    text = text_config(overrides, tokenizer, rope_parameters=mrope(overrides, interleaved=False))
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "out_hidden_size": text["hidden_size"],
        **overrides.vision,
    }
    return _qwen_vl("qwen2_5_vl", Qwen2_5_VLProcessor, vision, text, tokenizer, overrides)


def qwen3_vl(overrides: Overrides) -> Recipe:
    """Qwen3-VL: timestamps before every step, interleaved rotary positions, two DeepStack levels."""
    tokenizer = qwen_tokenizer(_QWEN_MARKERS)
    text = text_config(overrides, tokenizer, rope_parameters=mrope(overrides, interleaved=True))
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
        "out_hidden_size": text["hidden_size"],
        **overrides.vision,
    }
    pixels = _qwen_pixels(vision)
    # The limits of this processor hold for a whole clip, not for a frame.
    pixels["size"] = {edge: 16 * pixel_count for edge, pixel_count in pixels["size"].items()}
    pixels |= {"image_mean": HALF, "image_std": HALF, **_uncapped(Qwen3VLVideoProcessor)}
    video_processor = Qwen3VLVideoProcessor(**{**pixels, **overrides.video_processor})
    return _qwen_vl(
        "qwen3_vl",
        Qwen3VLProcessor,
        vision,
        text,
        tokenizer,
        overrides,
        video_processor=video_processor,
        system="",
    )


def internvl(overrides: Overrides) -> Recipe:
    """InternVL3: tiles with a thumbnail, pixel unshuffle 2 x 2, a caption line per frame, Qwen2."""
    markers = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = qwen_tokenizer(markers, named=named)
    vision = tower_config("internvl_vision", 112, overrides, attention_bias=True)
    tokens_per_tile = (vision["image_size"] // vision["patch_size"] // 2) ** 2
    config = config_of(
        "internvl",
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens_per_tile,
    )
    pixels = square_pixels(vision["image_size"])
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            **{**pixels, "crop_to_patches": True, "max_patches": 4, **overrides.image_processor}
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**{**pixels, **overrides.video_processor}),
        image_seq_length=tokens_per_tile,
        chat_template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
    )
    return Recipe(config, processor)


def video_llama_3(overrides: Overrides) -> Recipe:
    """VideoLLaMA3: any frame size, frame times in the prompt, the processor drops unchanged patches."""
    tokenizer = qwen_tokenizer(_QWEN_MARKERS)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": 14,
        **overrides.vision,
    }
    config = config_of(
        "video_llama_3",
        overrides,
        vision_config=vision,
        text_config=text_config(overrides, tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    frame_pixels = _qwen_pixels(vision)
    # The limit of this processor is shared out among the frames of a clip.
    frame_pixels["size"]["longest_edge"] *= 8
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessor(**{**_qwen_pixels(vision, merge=1), **overrides.image_processor}),
        tokenizer=tokenizer,
        video_processor=VideoLlama3VideoProcessor(
            **{**frame_pixels, "use_token_compression": True, **overrides.video_processor}
        ),
        chat_template=chatml("<|image_pad|>\n", "<|video_pad|>\n"),
    )
    return Recipe(config, processor)


RECIPES: dict[str, Callable[[Overrides], Recipe]] = {
    recipe.__name__: recipe for recipe in (qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, video_llama_3)
}
"""Recipe of every family of this module by its slug."""
