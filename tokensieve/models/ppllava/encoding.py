"""From pixels and questions to the visual tokens of every prompt: tower, projector, relevance and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokensieve.errors import HostError
from tokensieve.models.ppllava.alignment import ClipAlignment, SiglipAlignment
from tokensieve.models.ppllava.configuration import PPLlavaConfig
from tokensieve.models.ppllava.context import split_tables
from tokensieve.models.ppllava.pooling import prompt_guided_pool

__all__ = ["Encoded", "Projector", "VisualOutput", "build_alignment", "pool_clip", "slots_of"]


@dataclass
class VisualOutput(BaseModelOutputWithPooling):
    """Visual tokens of a batch.

    Attributes
    ----------
    pooler_output : list of Tensor
        ``[tokens, D]`` per placeholder of the batch, in reading order.
    cosines : list of Tensor, optional
        ``[1, T, h, w]`` per placeholder: how well each patch fits the question, before the softmax. The images of
        a prompt with several share one map with T images.
    """

    cosines: Any = None


@dataclass
class Encoded:
    """What the tower and the projector made of one clip or image.

    Attributes
    ----------
    features : Tensor
        ``[T, N, Dv]`` of the tower.
    projected : Tensor
        ``[T, N, D]`` in the language model's space.
    """

    features: Tensor
    projected: Tensor


class Projector(nn.Module):
    """Two layers that take every patch to the language model's space.

    Parameters
    ----------
    config : PPLlavaConfig
        Of the model.
    """

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., Dv]`` -> ``[..., D]``."""
        return self.linear_2(self.act(self.linear_1(features)))


def build_alignment(config: PPLlavaConfig) -> ClipAlignment | SiglipAlignment:
    """The alignment of a configuration, with weights yet to load."""
    text: Any
    if config.pair == "clip":
        from transformers import CLIPTextModel

        text = CLIPTextModel._from_config(config.prompt_config)
        vision = config.vision_config
        alignment: ClipAlignment | SiglipAlignment = ClipAlignment(
            text, vision.hidden_size, config.projection_dim, vision.layer_norm_eps
        )
    else:
        from transformers import SiglipTextModel
        from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

        text = SiglipTextModel._from_config(config.prompt_config)
        vision = config.vision_config
        head = SiglipMultiheadAttentionPoolingHead(vision)
        alignment = SiglipAlignment(text, head, vision.layer_norm_eps, value_attention=config.value_attention)
    if config.keep_positions is not None:
        split_tables(alignment.clip_text_model, config.keep_positions)
    return alignment


def slots_of(counts: Tensor | None, index: Tensor | None, entries: int, rows: int | None, kind: str) -> list[list[int]]:
    """Which clips (or images) every prompt shows.

    Parameters
    ----------
    counts : Tensor, optional
        ``[B]``: how many each prompt shows. None: one each.
    index : Tensor, optional
        ``[sum(counts)]``: which of the given ones, prompt after prompt. None: each once, in order.
    entries : int
        How many are given.
    rows : int, optional
        B, where it is known from the questions.
    kind : str
        For messages.

    Returns
    -------
    list of list of int
        Per prompt.

    Raises
    ------
    HostError
        If the numbers contradict each other.
    """
    sizes = [1] * (rows or entries) if counts is None else [int(count) for count in counts]
    order = list(range(entries)) if index is None else [int(entry) for entry in index]
    if len(order) != sum(sizes) or (order and max(order) >= entries) or (rows is not None and len(sizes) != rows):
        raise HostError(
            f"{len(sizes)} prompts show {sum(sizes)} {kind}s, but {entries} are given for {rows} questions; pass on "
            f"everything that the processor returned (batch_num_{kind}s, {kind}_index)."
        )
    found, start = [], 0
    for size in sizes:
        found.append(order[start : start + size])
        start += size
    return found


def pool_clip(
    alignment: Any, config: PPLlavaConfig, clip: Encoded, text: Tensor | None, kernel: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Pool one clip for one question.

    Parameters
    ----------
    alignment : ClipAlignment or SiglipAlignment
        Compares patches and question.
    config : PPLlavaConfig
        Weighting and temperature.
    clip : Encoded
        T frames, views or images.
    text : Tensor, optional
        ``[Dc]``: the question in the joint space; None averages.
    kernel : sequence of int
        Window and stride; its first axis shrinks to T for shorter clips.

    Returns
    -------
    tokens : Tensor
        ``[T', h', w', D]``.
    cosine : Tensor or None
        ``[1, T, h, w]``.
    """
    grid = (config.side, config.side)
    window = (min(int(kernel[0]), clip.features.shape[0]), int(kernel[1]), int(kernel[2]))
    if text is None:
        return prompt_guided_pool(clip.projected, grid=grid, kernel=window), None
    found = alignment.compare(clip.features, text, grid)
    weighting: Any = config.weighting
    tokens = prompt_guided_pool(
        clip.projected,
        found.relevance,
        grid=grid,
        kernel=window,
        weighting=weighting,
        temperature=config.pooling_temperature,
    )
    return tokens, found.cosine[None]


def join(clips: Sequence[Encoded]) -> Encoded:
    """Several images as the frames of one clip."""
    if len(clips) == 1:
        return clips[0]
    return Encoded(torch.cat([clip.features for clip in clips]), torch.cat([clip.projected for clip in clips]))
