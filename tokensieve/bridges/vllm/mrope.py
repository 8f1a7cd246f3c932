"""What the Qwen families share inside the engine: positions on three axes that survive pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from tokensieve.bridges.vllm.choice import Choice
from tokensieve.bridges.vllm.positions import CHANNELS, fill_positions, prompt_positions, to_channels


class PrunedMRope:
    """In front of a Qwen model of the engine."""

    choice: Choice | None = None
    config: Any
    visual: Any

    def unpruned(self, data: Any) -> list[int]:
        """Ids that a video would have without pruning."""
        raise NotImplementedError

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt; see `prompt_positions`."""
        whole = super().get_mrope_input_positions  # type: ignore[misc]
        if self.choice is None:
            found: tuple[Tensor, int] = whole(input_tokens, mm_features)
            return found

        def unpruned(feature: Any) -> list[int] | None:
            return self.unpruned(feature.data) if feature.modality == "video" else None

        return prompt_positions(whole, list(input_tokens), mm_features, unpruned)

    def own_positions(self, modality: str, fields: Mapping[str, Tensor], ids: list[int]) -> Tensor:
        """Positions [3, n] of one unpruned item, counted from its own beginning."""
        field = MultiModalFieldConfig.batched(modality).field
        data = {name: MultiModalFieldElem(data=value, field=field) for name, value in fields.items()}
        feature = MultiModalFeatureSpec(
            data=MultiModalKwargsItem(data),
            modality=modality,
            identifier="tokensieve",
            mm_position=PlaceholderRange(offset=0, length=len(ids)),
        )
        positions: Tensor = super().get_mrope_input_positions(ids, [feature])[0]  # type: ignore[misc]
        return positions

    def with_positions(self, embeds: Tensor, positions: Tensor, lead: int = 0) -> Tensor:
        """Embeddings with the digits of their positions behind them [n, D + CHANNELS]."""
        return torch.cat((embeds, to_channels(positions, lead, embeds)), dim=1)

    def images_with_positions(self, embeds: Sequence[Tensor], grids: Tensor) -> tuple[Tensor, ...]:
        """Images stay whole but carry positions like videos."""
        token = self.config.image_token_id
        return tuple(
            self.with_positions(
                part, self.own_positions("image", {"image_grid_thw": torch.tensor(grid)}, [token] * part.shape[0])
            )
            for part, grid in zip(embeds, grids.tolist(), strict=True)
        )

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the digits off the embeddings and put them into the positions."""
        if self.choice is None:
            found: tuple[Sequence[Tensor], Tensor, int] = super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids=input_ids,
                multimodal_embeddings=multimodal_embeddings,
                mrope_positions=mrope_positions,
                num_computed_tokens=num_computed_tokens,
            )
            return found
        with gpu_sync_allowed():
            positions = mrope_positions
            if len(multimodal_embeddings):
                prompt = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
                chunks = [part[:, -CHANNELS:] for part in multimodal_embeddings]
                placeholders = (self.config.image_token_id, self.config.video_token_id)
                positions = fill_positions(prompt, chunks, positions, num_computed_tokens, placeholders)
            delta = int(positions.max()) + 1 - len(input_ids)
        return [part[:, :-CHANNELS] for part in multimodal_embeddings], positions, delta
