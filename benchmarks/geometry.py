"""Models of real sizes with random weights, and prompts for them without tokenizer or processor.

Nothing is downloaded: speed and memory do not depend on what the weights say. What a method keeps does depend
on its input, so the pixels show a scene (a still ground, moving blobs, one cut) and not noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tokensieve.models import llava_video

__all__ = ["GEOMETRIES", "QWEN2_7B", "SIGLIP", "Geometry", "build", "prompt", "scene", "smoke"]

QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN25_TOWER: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_MARKERS = {"image": 0, "video": 1, "start": 2, "end": 3}
"""Token ids of the placeholders and of the vision markers; any ids will do without a tokenizer."""

_TEXT = (14, 46)
"""Text tokens in front of and behind the video."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model and of the clip it is shown.

    Attributes
    ----------
    name, family
        Name for tables, and model type.
    frames
        Frames of the clip.
    text, vision
        Fields of the language model's and the tower's configuration.
    size
        Height and width of a frame in pixels.
    """

    name: str
    family: str
    frames: int
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    size: tuple[int, int] = (384, 384)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def video_tokens(self) -> int:
        """Placeholders of one clip."""
        if self.family == "qwen2_5_vl":
            steps, rows, columns = self.grid
            return steps * rows * columns // 4
        side = self.vision["image_size"] // self.vision["patch_size"]
        if self.family == "llava_video":
            return self.frames * llava_video.tokens_per_frame(side)
        return self.frames * (-(-side // 2)) ** 2 + 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of patches (packed towers)."""
        patch = self.vision["patch_size"]
        return self.frames // 2, self.size[0] // patch, self.size[1] // patch


_QWEN25_TEXT = {
    **{key: value for key, value in QWEN2_7B.items() if key != "model_type"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}

GEOMETRIES: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry("llava-onevision-7b", "llava_onevision", 32, QWEN2_7B, SIGLIP),
        Geometry("llava-video-7b", "llava_video", 64, QWEN2_7B, SIGLIP),
        Geometry("qwen2.5-vl-7b", "qwen2_5_vl", 32, _QWEN25_TEXT, QWEN25_TOWER, size=(364, 644)),
        Geometry(
            "llava-onevision-0.5b-narrow-tower",
            "llava_onevision",
            32,
            {
                **QWEN2_7B,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 1024,
            },
            {**SIGLIP, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 2},
        ),
    )
}
"""Geometries by name. The last has the language model of LLaVA-OneVision-0.5B and its grid of 27 x 27 patches a
frame, but a narrow tower, so that a CPU spends its time in the part that compression shortens."""


def smoke(geometry: Geometry) -> Geometry:
    """The same family in miniature, to see on any machine that a benchmark runs."""
    text = {
        **geometry.text,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    if geometry.family == "qwen2_5_vl":
        text["rope_parameters"] = {**geometry.text["rope_parameters"], "mrope_section": [2, 3, 3]}
        small = {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
        vision = {**geometry.vision, **small, "window_size": 56, "fullatt_block_indexes": [1, 3]}
        return replace(geometry, frames=4, text=text, vision=vision, size=(56, 84))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {**geometry.vision, **small, "image_size": 70}
    return replace(geometry, frames=4, text=text, vision=vision, size=(70, 70))


def build(
    geometry: Geometry, device: torch.device | str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0
) -> Any:
    """A model with random weights, made on its device in its dtype; answers have a fixed length."""
    llava_video.register()
    torch.manual_seed(seed)
    markers = {
        "image_token_id": _MARKERS["image"],
        "video_token_id": _MARKERS["video"],
        "vision_start_token_id": _MARKERS["start"],
        "vision_end_token_id": _MARKERS["end"],
    }
    if geometry.family != "qwen2_5_vl":
        markers = {"image_token_index": _MARKERS["image"], "video_token_index": _MARKERS["video"]}
    config = AutoConfig.for_model(
        geometry.family,
        text_config=dict(geometry.text),
        vision_config=dict(geometry.vision),
        tie_word_embeddings=False,
        **markers,
        **geometry.config,
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def prompt(geometry: Geometry, model: nn.Module, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``generate``: in every row one clip between text tokens, on the model's device."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, geometry.text["vocab_size"], (batch, sum(_TEXT)), generator=generator)
    video = torch.full((batch, geometry.video_tokens), _MARKERS["video"])
    ids = torch.cat((words[:, : _TEXT[0]], video, words[:, _TEXT[0] :]), 1)
    clips = torch.stack([scene(geometry.frames, geometry.size, seed=seed + row) for row in range(batch)])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if geometry.family == "qwen2_5_vl":
        inputs["input_ids"][:, _TEXT[0] - 1] = _MARKERS["start"]
        inputs["input_ids"][:, -_TEXT[1]] = _MARKERS["end"]
        inputs["pixel_values_videos"] = torch.cat([_packed(clip, geometry) for clip in clips])
        inputs["video_grid_thw"] = torch.tensor([geometry.grid] * batch)
        inputs["second_per_grid_ts"] = torch.ones(batch)
        inputs["mm_token_type_ids"] = 2 * (ids == _MARKERS["video"]).int()
    else:
        inputs["pixel_values_videos"] = clips
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(parameter.dtype)
    return {name: value.to(parameter.device) for name, value in inputs.items()}


def _packed(clip: Tensor, geometry: Geometry) -> Tensor:
    """Frames [F, 3, H, W] as the rows of patches that the Qwen towers take, merge group by merge group."""
    steps, rows, columns = geometry.grid
    patch = geometry.vision["patch_size"]
    parts = clip.view(steps, 2, 3, rows // 2, 2, patch, columns // 2, 2, patch)
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, -1)


def scene(frames: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """A clip [F, 3, H, W] in [-1, 1]: smooth ground, three moving blobs, a cut after three fifths."""
    generator = torch.Generator().manual_seed(seed)
    grounds = nn.functional.interpolate(torch.randn(2, 3, 9, 9, generator=generator), size=size, mode="bilinear")
    start = torch.rand(3, 2, generator=generator)
    step = (torch.rand(3, 2, generator=generator) - 0.5) * 0.2
    colour = torch.rand(3, 3, 1, 1, generator=generator) * 2 - 1
    down = torch.linspace(0, 1, size[0])[:, None]
    across = torch.linspace(0, 1, size[1])[None]
    clip = grounds[(torch.arange(frames) >= frames * 3 // 5).long()].clone()
    for blob in range(3):
        for frame in range(frames):
            y, x = ((start[blob] + frame * step[blob]) % 1).tolist()
            inside = ((down - y) ** 2 + (across - x) ** 2) < 0.02
            clip[frame] = torch.where(inside, colour[blob], clip[frame])
    return (clip + 0.02 * torch.randn(clip.shape, generator=generator)).clamp(-1, 1)
