"""LLaVA-Video in the class layout of transformers, which has no class of its own for it.

LLaVA-Video (Zhang et al. 2024, arXiv 2410.02713) is LLaVA-OneVision with another treatment of video frames:
the projected patch grid of each frame is average-pooled with stride 2 (27 x 27 becomes 13 x 13, the odd row
and column are dropped) and an `image_newline` embedding closes *every row of every frame* (the "grid" newline
position of the published checkpoints), so that a frame takes 13 * 14 = 182 tokens. LLaVA-OneVision
interpolates to 14 x 14 and adds one newline per video. Images are treated alike by both.

Call :func:`register` once before the Auto classes meet a checkpoint of type ``llava_video``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.utils import can_return_tuple

__all__ = [
    "POOL_STRIDE",
    "LlavaVideoConfig",
    "LlavaVideoForConditionalGeneration",
    "LlavaVideoModel",
    "LlavaVideoProcessor",
    "register",
    "tokens_per_frame",
]

POOL_STRIDE = 2
"""Stride and window of the average pooling over the patch grid of a video frame."""


def tokens_per_frame(side: int) -> int:
    """Number of tokens that one video frame gives, row newlines included.

    Parameters
    ----------
    side : int
        Side of the square patch grid of the vision tower (27 for SigLIP at 384 pixels).

    Returns
    -------
    int
        ``rows * (rows + 1)`` with ``rows = side // 2``: 182 for a side of 27.
    """
    rows = side // POOL_STRIDE
    return rows * (rows + 1)


class LlavaVideoConfig(LlavaOnevisionConfig):
    """Configuration of LLaVA-Video: the fields and defaults of LLaVA-OneVision under its own model type."""

    model_type = "llava_video"


class LlavaVideoModel(LlavaOnevisionModel):
    """LLaVA-OneVision without head, whose video frames are pooled to rows that each end in a newline."""

    config_class = LlavaVideoConfig

    def apply_pooling(self, image_features: torch.Tensor) -> torch.Tensor:
        """Average-pool the patch grid of each frame and close every row with the newline embedding.

        Parameters
        ----------
        image_features : torch.Tensor
            Projected patch features, ``[frames, side * side, hidden]``.

        Returns
        -------
        torch.Tensor
            ``[frames, (side // 2) * (side // 2 + 1), hidden]``, row by row, the newline last in each row.
        """
        frames, patches, hidden = image_features.shape
        side = math.isqrt(patches)
        grid = image_features.view(frames, side, side, hidden).permute(0, 3, 1, 2)
        pooled = nn.functional.avg_pool2d(grid, POOL_STRIDE).permute(0, 2, 3, 1)
        newlines = self.image_newline.to(pooled).expand(frames, pooled.shape[1], 1, hidden)
        return torch.cat((pooled, newlines), dim=2).flatten(1, 2)

    @can_return_tuple
    @functools.wraps(LlavaOnevisionModel.get_video_features)
    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """Encode, project and pool videos.

        The arguments are those of ``LlavaOnevisionModel.get_video_features``; ``pooler_output`` holds the
        tokens of the videos, ``[videos, frames * tokens_per_frame, hidden]`` (one less where the calling
        `forward` adds the last newline itself, as in transformers 5.17).
        """
        outputs = super().get_video_features(*args, **{**kwargs, "return_dict": True})
        # LLaVA-OneVision closes a video with one newline of its own, either here or in `forward`, depending
        # on the release of transformers. The pooled rows end in a newline already, so the last token goes
        # either way: where it was added here it is one too many, where `forward` adds it later it takes the
        # place of the one dropped.
        outputs.pooler_output = outputs.pooler_output[:, :-1]
        return outputs


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video with its language modelling head."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        # The parent's own initialiser would build a LLaVA-OneVision body first, only to throw it away.
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision processor that writes as many video placeholders as LLaVA-Video has tokens.

    ``num_image_tokens`` is the number of patches of one frame before pooling (729 for SigLIP at 384 pixels).
    """

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        """Placeholders of one video: ``frames * tokens_per_frame`` times the video token."""
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        return self.video_token * (frames * tokens_per_frame(math.isqrt(self.num_image_tokens)))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
        """Token counts of images ``(height, width)`` and videos ``(frames, height, width)`` from sizes."""
        counts = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if video_sizes is not None:
            per_frame = tokens_per_frame(math.isqrt(self.num_image_tokens))
            counts.num_video_tokens = [frames * per_frame for frames, _, _ in video_sizes]
        return counts


def register() -> None:
    """Make the Auto classes of transformers know ``llava_video``; calling it again changes nothing."""
    AutoConfig.register(LlavaVideoConfig.model_type, LlavaVideoConfig, exist_ok=True)
    AutoModel.register(LlavaVideoConfig, LlavaVideoModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)
