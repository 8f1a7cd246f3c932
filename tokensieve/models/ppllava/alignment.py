"""How well each patch of a clip fits the question: the relevance maps of PPLLaVA (section 3.1).

CLIP and SigLIP come with a text tower beside the vision tower of many video language models. The alignments here
embed the question with it, take the patch features that the host has computed anyway to the same space, and turn the
cosines into one softmax over all positions of the clip. Parameter names are those of the published weights below
``multi_modal_projector``, the two layers of the projector itself left out.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokensieve.errors import MethodError
from tokensieve.models.ppllava.context import text_body
from tokensieve.models.ppllava.relevance import VALUE_SCALE, Alignment, cosine_map, relevance_map

__all__ = ["ClipAlignment", "SiglipAlignment"]


class _Alignment(nn.Module, ABC):
    """What both variants share: checks, cosines and the softmax."""

    clip_text_model: Any
    logit_scale: nn.Parameter

    @abstractmethod
    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Questions ``[B, L]`` in the joint space ``[B, D]``, not normalised."""

    @abstractmethod
    def embed_patches(self, features: Tensor) -> Tensor:
        """Patch features ``[..., Dv]`` in the joint space ``[..., D]``, not normalised."""

    def compare(self, features: Tensor, text: Tensor, grid: tuple[int, int]) -> Alignment:
        """Relevance of every patch for questions that are embedded already.

        Parameters
        ----------
        features : Tensor
            ``[T, N, Dv]`` or ``[B, T, N, Dv]``, as for the call of the module.
        text : Tensor
            ``[D]`` or ``[B, D]`` from :meth:`embed_text`.
        grid : tuple of int
            Rows and columns of a frame.

        Returns
        -------
        Alignment
            Cosines and relevance per clip.
        """
        cosine = cosine_map(self.embed_patches(features), text).unflatten(-1, grid)
        # Frozen in the published training; loading a checkpoint would make it trainable again.
        scale = self.logit_scale.detach().to(cosine.dtype).exp()
        return Alignment(cosine, relevance_map(cosine, scale))

    def _align(
        self, features: Tensor, grid: tuple[int, int], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Alignment:
        batched = features.dim() == 4
        if features.dim() not in (3, 4) or features.shape[-2] != grid[0] * grid[1]:
            raise MethodError(
                f"features of shape {list(features.shape)} are not [T, {grid[0] * grid[1]}, D] or [B, T, "
                f"{grid[0] * grid[1]}, D]; give the patches of a {grid[0]} x {grid[1]} grid without class token."
            )
        clips = features.shape[0] if batched else 1
        if input_ids.dim() != 2 or input_ids.shape[0] != clips:
            raise MethodError(
                f"input_ids of shape {list(input_ids.shape)} do not go with {clips} clip(s); give one row of "
                "token ids per clip."
            )
        text = self.embed_text(input_ids, attention_mask)
        return self.compare(features, text if batched else text[0], grid)


class ClipAlignment(_Alignment):
    """Alignment of patches and question by CLIP.

    Patches take the way of CLIP's class token: LayerNorm behind the tower, then the visual projection.

    Parameters
    ----------
    text_model : nn.Module
        CLIP text model of transformers, its context extended or not.
    vision_width, joint_width : int
        Width of the patch features and of the joint space.
    epsilon : float
        Of the LayerNorm.
    """

    def __init__(self, text_model: nn.Module, vision_width: int, joint_width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.clip_text_model = text_body(text_model)
        text_width = self.clip_text_model.config.hidden_size
        self.clip_text_projection = nn.Linear(text_width, joint_width, bias=False)
        self.clip_visual_projection = nn.Linear(vision_width, joint_width, bias=False)
        self.clip_visual_ln = nn.LayerNorm(vision_width, eps=epsilon)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)), requires_grad=False)

    @classmethod
    def from_clip(cls, clip: Any) -> ClipAlignment:
        """The alignment of a `CLIPModel` of transformers, with copies of its weights.

        Parameters
        ----------
        clip : transformers.CLIPModel
            The pair whose vision half is the host's tower; it is not changed.

        Returns
        -------
        ClipAlignment
            On the device and in the dtype of ``clip``.
        """
        norm = clip.vision_model.post_layernorm
        projection = clip.visual_projection
        made = cls(copy.deepcopy(clip.text_model), norm.normalized_shape[0], projection.out_features, norm.eps)
        made.clip_text_projection = copy.deepcopy(clip.text_projection)
        made.clip_visual_projection = copy.deepcopy(projection)
        made.clip_visual_ln = copy.deepcopy(norm)
        made.logit_scale = nn.Parameter(clip.logit_scale.detach().clone(), requires_grad=False)
        return made.train(clip.training)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Questions in the joint space, not normalised.

        Parameters
        ----------
        input_ids, attention_mask : Tensor
            ``[B, L]``, at most as long as the position table.

        Returns
        -------
        Tensor
            ``[B, joint_width]``.
        """
        pooled = self.clip_text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.clip_text_projection(pooled)

    def embed_patches(self, features: Tensor) -> Tensor:
        """Patches in the joint space ``[..., joint_width]``, not normalised, from features ``[..., vision_width]``."""
        norm = self.clip_visual_ln
        return self.clip_visual_projection(norm(features.to(norm.weight.dtype)))

    def forward(
        self, features: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, grid: tuple[int, int]
    ) -> Alignment:
        """Relevance of every patch.

        Parameters
        ----------
        features : Tensor
            ``[T, N, vision_width]`` or ``[B, T, N, vision_width]``: hidden states of the vision tower at the
            host's feature layer, without class token.
        input_ids, attention_mask : Tensor
            ``[B, L]``; B is 1 for a single clip.
        grid : tuple of int
            Rows and columns of a frame.

        Returns
        -------
        Alignment
            Cosines and relevance per clip.

        Raises
        ------
        MethodError
            If the shapes contradict each other.
        """
        return self._align(features, grid, input_ids, attention_mask)


class SiglipAlignment(_Alignment):
    """Alignment of patches and question by SigLIP, which has an attention-pooling head instead of a projection.

    Patches take the value path of the head: the value projection, then the head's residual MLP. The attention and
    its output projection are not used.

    Parameters
    ----------
    text_model : nn.Module
        SigLIP text model of transformers, its context extended or not.
    head : nn.Module
        Attention-pooling head of the vision model.
    epsilon : float
        Of the LayerNorm in front of the head.
    value_attention : bool
        Multiply the relevance with 1000 times the probe's attention, averaged over heads (the option
        `valuew_plus` of the released code, off there too). The relevance then has no fixed sum.
    """

    def __init__(
        self, text_model: nn.Module, head: Any, epsilon: float = 1e-6, *, value_attention: bool = False
    ) -> None:
        super().__init__()
        self.clip_text_model = text_body(text_model)
        self.clip_visual_head = head
        self.clip_visual_ln = nn.LayerNorm(head.attention.embed_dim, eps=epsilon)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]), requires_grad=False)
        # Without effect, as it cancels in the softmax; kept for the published weights, which hold it.
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]), requires_grad=False)
        self.value_attention = value_attention

    @classmethod
    def from_siglip(cls, siglip: Any, *, value_attention: bool = False) -> SiglipAlignment:
        """The alignment of a `SiglipModel` of transformers, with copies of its weights.

        Parameters
        ----------
        siglip : transformers.SiglipModel
            The pair whose vision half is the host's tower; it is not changed.
        value_attention : bool
            See the class.

        Returns
        -------
        SiglipAlignment
            On the device and in the dtype of ``siglip``.
        """
        vision = siglip.vision_model
        text, head = copy.deepcopy(siglip.text_model), copy.deepcopy(vision.head)
        made = cls(text, head, vision.post_layernorm.eps, value_attention=value_attention)
        made.clip_visual_ln = copy.deepcopy(vision.post_layernorm)
        made.logit_scale = nn.Parameter(siglip.logit_scale.detach().clone(), requires_grad=False)
        made.logit_bias = nn.Parameter(siglip.logit_bias.detach().clone(), requires_grad=False)
        return made.train(siglip.training)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Questions in the joint space, not normalised; SigLIP reads padding too and takes no mask.

        Parameters
        ----------
        input_ids : Tensor
            ``[B, L]``, padded to the length the model is used with, as its last position is the text.
        attention_mask : Tensor, optional
            Ignored, so that the output of a tokenizer can be passed on.

        Returns
        -------
        Tensor
            ``[B, width]``.
        """
        return self.clip_text_model(input_ids=input_ids).pooler_output

    def embed_patches(self, features: Tensor) -> Tensor:
        """Patches in the joint space ``[..., width]``, not normalised, from features ``[..., width]``."""
        norm, head = self.clip_visual_ln, self.clip_visual_head
        _, _, weight = head.attention.in_proj_weight.chunk(3)
        _, _, bias = head.attention.in_proj_bias.chunk(3)
        value = linear(norm(features.to(norm.weight.dtype)), weight, bias)
        return value + head.mlp(head.layernorm(value))

    def probe_attention(self, features: Tensor) -> Tensor:
        """Attention of the head's probe over the patches of each frame.

        Parameters
        ----------
        features : Tensor
            ``[..., N, width]``.

        Returns
        -------
        Tensor
            ``[..., H, N]``, float32, sums to 1 over N.
        """
        norm, attention = self.clip_visual_ln, self.clip_visual_head.attention
        to_q, to_k, _ = attention.in_proj_weight.chunk(3)
        q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
        heads = attention.num_heads
        q = linear(self.clip_visual_head.probe[0, 0], to_q, q_bias).unflatten(-1, (heads, -1))
        k = linear(norm(features.to(norm.weight.dtype)), to_k, k_bias).unflatten(-1, (heads, -1))
        logits = torch.einsum("hd,...nhd->...hn", q, k) * q.shape[-1] ** -0.5
        return logits.float().softmax(-1)

    def forward(
        self, features: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, *, grid: tuple[int, int]
    ) -> Alignment:
        """Relevance of every patch.

        Parameters
        ----------
        features : Tensor
            ``[T, N, width]`` or ``[B, T, N, width]``: hidden states of the vision tower at the host's feature
            layer.
        input_ids : Tensor
            ``[B, L]``; B is 1 for a single clip.
        attention_mask : Tensor, optional
            Ignored, see :meth:`embed_text`.
        grid : tuple of int
            Rows and columns of a frame.

        Returns
        -------
        Alignment
            Cosines and relevance per clip.

        Raises
        ------
        MethodError
            If the shapes contradict each other.
        """
        return self._align(features, grid, input_ids, None)

    def compare(self, features: Tensor, text: Tensor, grid: tuple[int, int]) -> Alignment:
        """As :class:`ClipAlignment`, and times the probe's attention if `value_attention` is set."""
        found = super().compare(features, text, grid)
        if not self.value_attention:
            return found
        seen = self.probe_attention(features).mean(-2).unflatten(-1, grid)
        return Alignment(found.cosine, VALUE_SCALE * seen * found.relevance)
