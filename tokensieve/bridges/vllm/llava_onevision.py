"""LLaVA-OneVision of the engine with our methods; imported by the engine when one is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision as engine
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import VideoProcessorItems

from tokensieve.bridges.vllm.choice import Choice, choice_of
from tokensieve.bridges.vllm.families import FAMILIES
from tokensieve.bridges.vllm.processing import PrunedProcessing
from tokensieve.bridges.vllm.pruning import kept_count, kept_tokens
from tokensieve.core.layout import Layout
from tokensieve.errors import MethodError

FAMILY = FAMILIES["LlavaOnevisionForConditionalGeneration"]

TOWER_PARTS = ("embeddings", "encoder", "post_layernorm", "head")


def video_layout(config: Any, frames: int) -> Layout:
    """Pooled frames and one newline behind them."""
    vision = config.vision_config
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    return Layout.regular("video", frames, side, side, FAMILY.separators)


class PrunedLlavaOnevisionProcessor(PrunedProcessing, engine.LlavaOnevisionMultiModalProcessor):
    """Sizes the placeholders of a video by its number of frames."""

    def placeholders(
        self, choice: Choice, index: int, items: Any, arguments: Mapping[str, Any], processed: Any
    ) -> list[int]:
        """As many video tokens as are kept, the newline included."""
        videos = items["video"]
        if not isinstance(videos, VideoProcessorItems):
            raise MethodError(
                "Precomputed video embeddings of LLaVA-OneVision cannot be pruned, since their grid is not known; "
                "send frames."
            )
        config = self.info.get_hf_config()
        layout = video_layout(config, videos.get_num_frames(index))
        return [config.video_token_index] * kept_count(choice, layout)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=engine.LlavaOnevisionProcessingInfo,
    dummy_inputs=engine.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(engine.LlavaOnevisionForConditionalGeneration):
    """The engine's model; without a choice of ours it behaves as always."""

    supports_multimodal_pruning: ClassVar[bool] = True
    # transformers 5 saves the tower of this family without the level that earlier releases had.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            **engine.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix,
            **{f"vision_tower.{part}.": f"vision_tower.vision_model.{part}." for part in TOWER_PARTS},
        }
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.choice = choice_of(self.multimodal_config)

    def _process_video_pixels(self, inputs: Any) -> Any:
        videos = super()._process_video_pixels(inputs)
        if self.choice is None:
            return videos
        # Videos of different lengths come as [1, T, D] each.
        return [self._pruned(self.choice, video.flatten(0, -2)) for video in videos]

    def _pruned(self, choice: Choice, embeds: Tensor) -> Tensor:
        """The tokens [m, D] of one video that stay, out of [n, D]."""
        per_frame = video_layout(self.config, 1).patches
        layout = video_layout(self.config, (embeds.shape[0] - 1) // per_frame)
        kept = kept_tokens(choice, FAMILY, embeds[layout.patch_tokens.to(embeds.device)], layout)
        return torch.index_select(embeds, 0, kept.to(embeds.device))
