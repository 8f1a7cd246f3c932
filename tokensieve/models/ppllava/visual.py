"""The visual half of the PPLLaVA model: from pixels and questions to the visual tokens of every placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import HostError
from tokensieve.models.ppllava.encoding import Encoded, VisualOutput, join, pool_clip, slots_of
from tokensieve.models.ppllava.views import pack_views, tile_shape, view_count

__all__ = ["VisualTokens"]


class VisualTokens:
    """Part of `PPLlavaModel`: tower, projector, comparison with the question, pooling."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    prompt_alignment: Any
    image_newline: Any

    def encode(self, clips: Sequence[Tensor], together: bool) -> list[Encoded]:
        """Run tower and projector.

        Parameters
        ----------
        clips : sequence of Tensor
            ``[T, 3, S, S]`` each.
        together : bool
            Whether the frames of a clip belong together, which matters to the temporal branch only.

        Returns
        -------
        list of Encoded
            One per clip.
        """
        layer, config = self.config.vision_feature_layer, self.config
        dtype = next(self.vision_tower.parameters()).dtype
        pixels = torch.cat([clip.to(dtype) for clip in clips])
        sizes = [clip.shape[0] for clip in clips]
        if config.bt_adapter_depth:
            frames = sizes if together else [1] * pixels.shape[0]
            states = self.vision_tower(pixels, sizes=frames).hidden_states[layer]
        else:
            states = self.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        projected = self.multi_modal_projector(states)
        pairs = zip(states.split(sizes), projected.split(sizes), strict=True)
        return [Encoded(features, tokens) for features, tokens in pairs]

    def embed_questions(self, question_ids: Tensor | None, question_mask: Tensor | None) -> Tensor | None:
        """Questions ``[B, L]`` in the joint space ``[B, Dc]``; None where the model averages.

        Raises
        ------
        HostError
            If the model needs questions and there are none.
        """
        if self.config.weighting == "average":
            return None
        if question_ids is None:
            raise HostError(
                "PPLLaVA pools by the question, but question_ids are missing; pass on everything that its processor "
                "returned, or set config.weighting to 'average'."
            )
        return self.prompt_alignment.embed_text(question_ids, question_mask)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> VisualOutput:
        """Visual tokens of images.

        The only image of a prompt is cut into views; several are pooled together as one view each.

        Parameters
        ----------
        pixel_values : Tensor
            ``[I, P, 3, S, S]``, padded behind the views of each image.
        image_sizes : Tensor
            ``[I, 2]``: height and width before processing.
        question_ids, question_mask : Tensor
            ``[B, L]``: question of every prompt, tokenised for the text tower.
        batch_num_images : Tensor, optional
            ``[B]``: images of every prompt; one each by default.
        image_index : Tensor, optional
            ``[sum(batch_num_images)]``: which image each placeholder shows; each its own by default.
        **kwargs
            Unused options of the caller.

        Returns
        -------
        VisualOutput
            One entry per placeholder.
        """
        text = self.embed_questions(question_ids, question_mask)
        rows = None if text is None else text.shape[0]
        slots = slots_of(batch_num_images, image_index, pixel_values.shape[0], rows, "image")
        config, side = self.config, self.config.vision_config.image_size
        single = {row[0] for row in slots if len(row) == 1}
        pinpoints = config.image_grid_pinpoints
        counts = [
            view_count(size.tolist(), pinpoints, side) if entry in single else 1
            for entry, size in enumerate(image_sizes)
        ]
        encoded = self.encode([image[:count] for image, count in zip(pixel_values, counts, strict=True)], False)
        found, maps = [], []
        for number, row in enumerate(slots):
            if not row:
                continue
            question = None if text is None else text[number]
            clip = encoded[row[0]] if len(row) == 1 else join([encoded[entry] for entry in row])
            tokens, cosine = pool_clip(self.prompt_alignment, config, clip, question, config.image_kernel)
            maps.append(cosine)
            if len(row) == 1:
                size = image_sizes[row[0]].tolist()
                found.append(pack_views(tokens, size, tile_shape(size, pinpoints, side), self.image_newline))
            else:
                found.extend(tokens.flatten(1, 2).unbind(0))
        return VisualOutput(pooler_output=found, cosines=maps)

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        video_frames: Tensor | None = None,
        batch_num_videos: Tensor | None = None,
        video_index: Tensor | None = None,
        **kwargs: Any,
    ) -> VisualOutput:
        """Visual tokens of videos; a clip that several prompts ask about is encoded once.

        Parameters
        ----------
        pixel_values_videos : Tensor
            ``[V, T, 3, S, S]``, padded behind the frames of each clip.
        question_ids, question_mask : Tensor
            ``[B, L]``: question of every prompt, tokenised for the text tower.
        video_frames : Tensor, optional
            ``[V]``: frames of every clip; T by default.
        batch_num_videos : Tensor, optional
            ``[B]``: videos of every prompt; one each by default.
        video_index : Tensor, optional
            ``[sum(batch_num_videos)]``: which clip each placeholder shows; each its own by default.
        **kwargs
            Unused options of the caller.

        Returns
        -------
        VisualOutput
            One entry per placeholder.
        """
        text = self.embed_questions(question_ids, question_mask)
        rows = None if text is None else text.shape[0]
        slots = slots_of(batch_num_videos, video_index, pixel_values_videos.shape[0], rows, "video")
        clips = list(pixel_values_videos)
        if video_frames is not None:
            clips = [clip[: int(count)] for clip, count in zip(clips, video_frames, strict=True)]
        encoded = self.encode(clips, True)
        found, maps = [], []
        for number, row in enumerate(slots):
            question = None if text is None else text[number]
            for entry in row:
                kernel = self.config.video_kernel
                tokens, cosine = pool_clip(self.prompt_alignment, self.config, encoded[entry], question, kernel)
                found.append(tokens.flatten(0, 2))
                maps.append(cosine)
        return VisualOutput(pooler_output=found, cosines=maps)
