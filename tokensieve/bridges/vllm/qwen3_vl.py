"""Qwen3-VL of the engine with our methods; imported by the engine when one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as engine
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokensieve.bridges.vllm.choice import Choice, choice_of
from tokensieve.bridges.vllm.families import FAMILIES
from tokensieve.bridges.vllm.mrope import PrunedMRope
from tokensieve.bridges.vllm.positions import to_channels
from tokensieve.bridges.vllm.processing import PrunedProcessing
from tokensieve.bridges.vllm.pruning import grid_layout, kept_count, kept_tokens
from tokensieve.errors import MethodError

FAMILY = FAMILIES["Qwen3VLForConditionalGeneration"]


class PrunedQwen3VLProcessor(PrunedProcessing, engine.Qwen3VLMultiModalProcessor):
    """Sizes the placeholders of a video by its grid; how they spread over its steps is known later."""

    def placeholders(self, choice: Choice, index: int, items: Any, arguments: Mapping[str, Any], processed: Any) -> Any:
        """Timestamps and markers of all steps, and all video tokens in the first of them."""
        item, config = processed["video"][index], self.info.get_hf_config()
        grid = tuple(item["video_grid_thw"].data.tolist())
        count = kept_count(choice, grid_layout(grid, self.info.get_image_processor(**arguments).merge_size))
        return engine.Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[count] + [0] * (grid[0] - 1),
            timestamps=item["timestamps"].data,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=False,
        )


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor,
    info=engine.Qwen3VLProcessingInfo,
    dummy_inputs=engine.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(PrunedMRope, engine.Qwen3VLForConditionalGeneration):
    """The engine's model; without a choice of ours it behaves as always."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.choice = choice_of(self.multimodal_config)

    def unpruned(self, data: Any) -> list[int]:
        """Timestamps, markers and one video token for every merged patch."""
        grid = tuple(data["video_grid_thw"].data.tolist())
        return self._ids(data["timestamps"].data, self._step_tokens(grid))

    def _step_tokens(self, grid: Sequence[int]) -> list[int]:
        return grid_layout((grid[0], grid[1], grid[2]), self.visual.spatial_merge_size).patches_per_view.tolist()

    def _ids(self, timestamps: Any, counts: list[int]) -> list[int]:
        """Ids of a video with so many tokens in each step."""
        return list(
            engine.Qwen3VLMultiModalProcessor.get_video_repl(
                tokens_per_frame=counts,
                timestamps=timestamps,
                tokenizer=self._tokenizer,
                vision_start_token_id=self.config.vision_start_token_id,
                vision_end_token_id=self.config.vision_end_token_id,
                video_token_id=self.config.video_token_id,
            ).full
        )

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: tuple[Tensor, ...], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self.choice is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        out = []
        for index, (embeds, grid) in enumerate(
            zip(video_embeds_split, video_input["video_grid_thw"].tolist(), strict=True)
        ):
            layout = grid_layout(tuple(grid), self.visual.spatial_merge_size)
            # DeepStack planes stand behind the features that the first layer reads.
            kept = kept_tokens(self.choice, FAMILY, embeds[:, : self.visual_dim], layout)
            if bool((kept.diff() <= 0).any()):
                raise MethodError(
                    f"{self.choice.method.name} reorders tokens, which Qwen3-VL cannot take inside vLLM because "
                    "timestamps stand between them."
                )
            mask = torch.zeros(layout.tokens, dtype=torch.bool)
            mask[kept] = True
            out.append(
                self._create_final_video_embeddings(
                    video_embeddings=embeds[mask.to(embeds.device)],
                    num_tokens_per_frame=torch.bincount(layout.view[kept], minlength=len(layout.views)).tolist(),
                    timestamps=video_input.timestamps[index],
                    video_grid_thw=grid,
                    retention_mask=mask,
                )
            )
        return tuple(out)

    def _get_expanded_positions(self, **given: Any) -> Tensor:
        """Digits instead of the engine's five channels, called while the final embeddings are put together."""
        if self.choice is None:
            return super()._get_expanded_positions(**given)
        grid, timestamps, mask = given["video_grid_thw"], given["timestamps"], given["retention_mask"]
        ids = self._ids(timestamps, self._step_tokens(grid))
        whole = self.own_positions("video", {"video_grid_thw": torch.tensor(grid)}, ids)
        visual = torch.tensor(ids) == self.config.video_token_id
        stays = ~visual
        stays[visual] = mask
        # All video tokens of the prompt stand in the first step, behind its timestamp and its marker.
        lead = ids.index(self.config.video_token_id)
        like = torch.empty(0, dtype=torch.get_default_dtype(), device=given["device"])
        return to_channels(whole[:, stays], lead, like)

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: tuple[Tensor, ...], image_input: Any
    ) -> tuple[Tensor, ...]:
        if self.choice is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return self.images_with_positions(image_embeds_split, image_input["image_grid_thw"])
