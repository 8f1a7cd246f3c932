"""Qwen2.5-VL of the engine with our methods; imported by the engine when one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokensieve.bridges.vllm.choice import Choice, choice_of
from tokensieve.bridges.vllm.families import FAMILIES
from tokensieve.bridges.vllm.mrope import PrunedMRope
from tokensieve.bridges.vllm.processing import PrunedProcessing
from tokensieve.bridges.vllm.pruning import grid_layout, kept_count, kept_tokens

FAMILY = FAMILIES["Qwen2_5_VLForConditionalGeneration"]


class PrunedQwen25VLProcessor(PrunedProcessing, engine.Qwen2_5_VLMultiModalProcessor):
    """Sizes the placeholders of a video by its grid."""

    def placeholders(
        self, choice: Choice, index: int, items: Any, arguments: Mapping[str, Any], processed: Any
    ) -> list[int]:
        """As many video tokens as are kept."""
        grid = tuple(processed["video"][index]["video_grid_thw"].data.tolist())
        merge = self.info.get_image_processor(**arguments).merge_size
        token = self.info.get_tokenizer().get_vocab()[self.info.get_hf_processor(**arguments).video_token]
        return [token] * kept_count(choice, grid_layout(grid, merge))


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25VLProcessor,
    info=engine.Qwen2_5_VLProcessingInfo,
    dummy_inputs=engine.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen25VL(PrunedMRope, engine.Qwen2_5_VLForConditionalGeneration):
    """The engine's model; without a choice of ours it behaves as always."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.choice = choice_of(self.multimodal_config)

    def unpruned(self, data: Any) -> list[int]:
        """One video token for every merged patch."""
        grid = tuple(data["video_grid_thw"].data.tolist())
        return [self.config.video_token_id] * grid_layout(grid, self.visual.spatial_merge_size).tokens

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: tuple[Tensor, ...], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self.choice is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        seconds = video_input.get("second_per_grid_ts")
        out = []
        for index, (embeds, grid) in enumerate(
            zip(video_embeds_split, video_input["video_grid_thw"].tolist(), strict=True)
        ):
            layout = grid_layout(tuple(grid), self.visual.spatial_merge_size)
            kept = kept_tokens(self.choice, FAMILY, embeds, layout)
            fields = {"video_grid_thw": torch.tensor(grid)}
            if seconds is not None:
                fields["second_per_grid_ts"] = torch.as_tensor(seconds)[index].cpu()
            ids = [self.config.video_token_id] * layout.tokens
            positions = self.own_positions("video", fields, ids)[:, kept]
            out.append(self.with_positions(embeds[kept.to(embeds.device)], positions))
        return tuple(out)

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: tuple[Tensor, ...], image_input: Any
    ) -> Sequence[Tensor]:
        if self.choice is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return self.images_with_positions(image_embeds_split, image_input["image_grid_thw"])
