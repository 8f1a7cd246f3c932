"""BT-Adapter: a branch beside the last layers of a CLIP vision tower that sees the frames of a clip together.

The published Vicuna models of PPLLaVA have it in their tower (depth 4); the pooling does not depend on it. The
branch comes from Liu et al., "BT-Adapter: Video Conversation is Feasible Without Video Instruction Tuning" (2023).
:class:`BTAdapterVisionModel` holds a CLIP tower with the branch under the names of the published weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokensieve.errors import MethodError

__all__ = ["BTAdapterVisionModel", "TemporalLayer", "VisionTransformer"]

DEPTH = 4
MAX_FRAMES = 64
DROP_PATH = 0.1


class TemporalLayer(nn.Module):
    """Attention along time for every patch place, behind an output projection that starts at zero.

    Parameters
    ----------
    attention : nn.Module
        Self-attention of a CLIP layer.
    norm : nn.LayerNorm
        In front of it.
    """

    def __init__(self, attention: nn.Module, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.self_attn = attention
        self.layer_norm1 = norm
        width = norm.normalized_shape[0]
        self.temporal_fc = nn.Linear(width, width)
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, grid: Tensor) -> Tensor:
        """What to add to ``grid [B, N, T, D]``, same shape."""
        rows = self.layer_norm1(grid).flatten(0, 1)
        return self.temporal_fc(self.self_attn(hidden_states=rows)[0]).view(grid.shape)


class VisionTransformer(nn.Module):
    """CLIP vision transformer with the branch; see :class:`BTAdapterVisionModel`.

    Parameters
    ----------
    body : nn.Module
        CLIP vision transformer whose embeddings, encoder and norms are used (not copied).
    depth : int
        Layers of the branch: it runs beside the last ``depth`` layers of the tower.
    max_frames : int
        Rows of the table of time embeddings.
    """

    def __init__(self, body: Any, depth: int = DEPTH, max_frames: int = MAX_FRAMES) -> None:
        super().__init__()
        layers = body.encoder.layers
        if not 1 <= depth <= len(layers):
            raise MethodError(f"the branch has {depth} layers, the tower {len(layers)}; choose 1 to {len(layers)}.")
        self.embeddings = body.embeddings
        # The misspelling is the name in transformers and in all checkpoints.
        self.pre_layrnorm = body.pre_layrnorm
        self.encoder = body.encoder
        self.post_layernorm = body.post_layernorm
        width = self.post_layernorm.normalized_shape[0]
        last = list(layers)[-depth:]
        self.btadapter_S_layers = nn.ModuleList(copy.deepcopy(layer) for layer in last)
        self.btadapter_T_layers = nn.ModuleList(
            TemporalLayer(copy.deepcopy(layer.self_attn), copy.deepcopy(layer.layer_norm1)) for layer in last
        )
        self.btadapter_time_embed = nn.Embedding(max_frames, width)
        self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.zeros_(self.btadapter_time_embed.weight)
        # Plain numbers: a tensor would hold no values while the model is built without weights.
        self.drop_path = [DROP_PATH * number / max(1, depth - 1) for number in range(depth)]

    def forward(self, pixel_values: Tensor, sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Run the frames ``[F, 3, S, S]`` of all clips, which have ``sizes`` frames.

        Returns
        -------
        tuple
            The states in front of every layer and behind the last, each ``[F, 1 + N, D]``, and the pooled output
            ``[F, D]``.
        """
        limit = self.btadapter_time_embed.num_embeddings
        if max(sizes) > limit:
            raise MethodError(
                f"the clip has {max(sizes)} frames, the time embeddings end at {limit}; sample fewer frames."
            )
        # Clips of equal length go through the branch together, others one by one.
        shapes = [(len(sizes), sizes[0])] if len(set(sizes)) == 1 else [(1, size) for size in sizes]
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        start = len(self.encoder.layers) - len(self.btadapter_S_layers)
        states = []
        branches: list[Any] = [None] * len(shapes)
        for index, layer in enumerate(self.encoder.layers):
            states.append(_combine_all(x, branches, shapes))
            x = layer(x, attention_mask=None)
            if index >= start:
                parts = zip(_split(x, shapes), shapes, branches, strict=True)
                branches = [self._step(index - start, part.unflatten(0, shape), own) for part, shape, own in parts]
        states.append(_combine_all(x, branches, shapes))
        tokens = [
            branch[0].repeat_interleave(frames, dim=0) for branch, (_, frames) in zip(branches, shapes, strict=True)
        ]
        return states, self.post_layernorm(x[:, 0] + torch.cat(tokens))

    def _step(self, number: int, x: Tensor, branch: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """One layer of the branch from ``x [B, T, 1 + N, D]``; the branch is ``([B, D], [B, N, T, D])``."""
        token = x[:, :, 0].mean(dim=1)
        grid = x[:, :, 1:].transpose(1, 2)
        if branch is None:
            places = self.embeddings.position_embedding.weight
            times = self.btadapter_time_embed.weight[: x.shape[1]]
            token = (token + self.btadapter_cls_token[0, 0] + places[0]) / 2
            grid = grid + places[1:, None] + times
        else:
            token, grid = token + branch[0], grid + branch[1]
        grid = grid + self._drop(number, self.btadapter_T_layers[number](grid))[0]
        return self._spatial(number, token, grid)

    def _spatial(self, number: int, token: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """A CLIP layer on every frame; all frames share one class token, which takes their mean."""
        layer: Any = self.btadapter_S_layers[number]
        clips, _, frames, _ = grid.shape
        rows = torch.cat([token[:, None, None].expand(-1, -1, frames, -1), grid], dim=1).transpose(1, 2)
        mixed = layer.self_attn(hidden_states=layer.layer_norm1(rows.flatten(0, 1)))[0].unflatten(0, (clips, frames))
        first, rest = self._drop(number, mixed[:, :, 0].mean(dim=1), mixed[:, :, 1:].transpose(1, 2))
        token, grid = token + first, grid + rest
        first, rest = self._drop(number, *(layer.mlp(layer.layer_norm2(part)) for part in (token, grid)))
        return token + first, grid + rest

    def _drop(self, number: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """In training leave out what a layer adds, for whole clips at random, and scale up the others."""
        rate = self.drop_path[number]
        if not self.training or rate == 0:
            return parts
        kept = torch.rand(parts[0].shape[0], device=parts[0].device) >= rate
        factors = kept.to(parts[0].dtype) / (1 - rate)
        return tuple(part * factors.view(-1, *[1] * (part.dim() - 1)) for part in parts)


class BTAdapterVisionModel(nn.Module):
    """CLIP vision tower with the BT-Adapter branch.

    The spatial stream is the unchanged tower, frame by frame. From the first adapted layer on every recorded state
    is the mean of both streams on the patches, with the class token of the spatial stream. A state is recorded in
    front of each layer, so the last adapter layer reaches the last state and the pooled output only; a host that
    reads layer -2 does not see it.

    The names in the state dict are those of the published weights below ``vision_tower``. A new branch starts with
    copies of the last CLIP layers and with time embeddings, class token and temporal projections at zero.

    Parameters
    ----------
    vision_model : nn.Module
        CLIP vision model of transformers. Its modules become part of this one and keep their weights.
    depth : int
        Layers of the branch (released models: 4).
    max_frames : int
        Longest clip (released models: 64).

    Raises
    ------
    MethodError
        If the tower has fewer than ``depth`` layers.
    """

    def __init__(self, vision_model: Any, depth: int = DEPTH, max_frames: int = MAX_FRAMES) -> None:
        super().__init__()
        self.config = vision_model.config
        body = getattr(vision_model, "vision_model", vision_model)
        self.vision_model = VisionTransformer(body, depth, max_frames)
        self.train(vision_model.training)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool = True,
        sizes: Sequence[int] | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode clips.

        Parameters
        ----------
        pixel_values : Tensor
            ``[T, 3, S, S]``, the frames of one clip, or ``[B, T, 3, S, S]``. The views of an image are clips of
            one frame each, ``[P, 1, 3, S, S]``.
        output_hidden_states : bool
            Whether to return the states.
        sizes : sequence of int, optional
            Frames of each clip, for clips of different length that ``[F, 3, S, S]`` holds one behind the other.
        **unused
            Other options of transformers' vision towers; without effect.

        Returns
        -------
        BaseModelOutputWithPooling
            ``hidden_states``: one more than layers, each ``[B * T, 1 + N, D]`` (or ``[F, 1 + N, D]``) with the frames
            of a clip in sequence; ``last_hidden_state``, the last of them; ``pooler_output [B * T, D]``.

        Raises
        ------
        MethodError
            If ``pixel_values`` has another number of axes, its frames are not those of ``sizes``, or a clip has
            more frames than time embeddings.
        """
        if pixel_values.dim() not in (4, 5):
            raise MethodError(
                f"pixel_values has the shape {list(pixel_values.shape)}; give [T, 3, S, S] or [B, T, 3, S, S]."
            )
        if pixel_values.dim() == 5:
            sizes = [pixel_values.shape[1]] * pixel_values.shape[0]
            pixel_values = pixel_values.flatten(0, 1)
        sizes = [pixel_values.shape[0]] if sizes is None else list(sizes)
        if sum(sizes) != pixel_values.shape[0]:
            raise MethodError(
                f"the clips have {sum(sizes)} frames, pixel_values {pixel_values.shape[0]}; make them equal."
            )
        states, pooled = self.vision_model(pixel_values, sizes)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def _combine(x: Tensor, branch: tuple[Tensor, Tensor]) -> Tensor:
    """State to record: the class token of ``x [B * T, 1 + N, D]`` and the mean of both streams on the patches."""
    patches = branch[1].transpose(1, 2).flatten(0, 1)
    return torch.cat([x[:, :1], (x[:, 1:] + patches) / 2], dim=1)


def _split(x: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Frames ``[F, ...]`` of every group of clips."""
    return x.split([clips * frames for clips, frames in shapes])


def _combine_all(x: Tensor, branches: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """:func:`_combine` for every group of clips."""
    if branches[0] is None:
        return x
    return torch.cat([_combine(part, own) for part, own in zip(_split(x, shapes), branches, strict=True)])
