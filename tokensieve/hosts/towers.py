"""Reading attention out of vision towers, whatever attention kernel they run.

A reader listens to the projections of one attention module, rebuilds its queries and keys, and reduces them to
statistics at once; no attention matrix and no activation outlives the call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.ops.attention import class_attention, received_attention
from tokensieve.ops.entropy import patch_entropy, restored_levels
from tokensieve.ops.focus import focused_attention
from tokensieve.ops.given import given_attention

Sink = Callable[[str, Tensor], None]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

CLIP_PIXELS: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_PIXELS: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_PIXELS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Means and standard deviations by which the published processors of these towers normalise pixels from 0 to 1."""


FOCUSED = "encoder.focused_attention"
ENTROPY = "encoder.pixel_entropy"


@dataclass
class QueriesKeys:
    """Queries and keys [B, H, N, d] of one attention module; ``segments`` bound the blocks it attends in."""

    q: Tensor
    k: Tensor
    scale: float
    segments: Tensor | None = None


@dataclass
class TowerBlock:
    """A pre-norm layer of a picture tower, ``x + attention(norm1(x))`` and then ``x + scale * feed(norm(x))``."""

    layer: Any
    attention: Any
    norm: Any
    feed: Any
    scale: Tensor | None = None


class PictureTower:
    """Towers that take a batch of pictures [B, 3, H, W]: CLIP, SigLIP, InternVL's ViT.

    Parameters
    ----------
    layers
        Path of the layer list inside the tower.
    attention
        Name of the attention module inside a layer.
    class_token
        Whether position 0 is a class token.
    norm, feed
        Names of the norm in front of the feed-forward part and of that part inside a layer.
    scale
        Name of the parameter that the output of the feed-forward part is multiplied by, where there is one.
    pixels
        Means and standard deviations that the pixels were normalised by.
    """

    packed = False

    def __init__(
        self,
        layers: str,
        attention: str = "self_attn",
        class_token: bool = False,
        norm: str = "layer_norm2",
        feed: str = "mlp",
        scale: str | None = None,
        pixels: Statistics | None = None,
    ) -> None:
        self.layers_path = layers
        self.attention_name = attention
        self.class_token = class_token
        self.norm_name, self.feed_name, self.scale_name = norm, feed, scale
        self.pixels = pixels

    def blocks(self, tower: Any) -> list[TowerBlock]:
        """The layers in order, taken apart."""
        return [
            TowerBlock(
                layer,
                getattr(layer, self.attention_name),
                getattr(layer, self.norm_name),
                getattr(layer, self.feed_name),
                getattr(layer, self.scale_name) if self.scale_name else None,
            )
            for layer in tower.get_submodule(self.layers_path)
        ]

    def attended(self, attention: Any) -> dict[str, nn.Module]:
        """Modules whose outputs are queries, keys and values."""
        return {**self.projections(attention), "v": attention.v_proj}

    def attentions(self, tower: Any) -> list[nn.Module]:
        """Attention modules in order."""
        return [getattr(layer, self.attention_name) for layer in tower.get_submodule(self.layers_path)]

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """Modules whose outputs are the queries and keys (behind their norms where there are any)."""
        found = {}
        for part in ("q", "k"):
            norm = getattr(attention, f"{part}_norm", None)
            found[part] = norm if isinstance(norm, nn.Module) else getattr(attention, f"{part}_proj")
        return found

    def queries_keys(self, attention: Any, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> QueriesKeys:
        """Queries and keys of one call from the outputs of the projections."""
        heads = attention.num_heads
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (outputs["q"], outputs["k"]))
        return QueriesKeys(q, k, q.shape[-1] ** -0.5)

    def reduce(self, name: str, qk: QueriesKeys, parameter: float | None = None) -> Tensor:
        """The statistic ``name`` per picture and patch [B, N] (class token column removed)."""
        if name == FOCUSED:
            return focused_attention(qk.q, qk.k, parameter or 0.0, scale=qk.scale, skip=int(self.class_token))
        if name == "encoder.class_attention":
            return class_attention(qk.q, qk.k, scale=qk.scale)[:, 1:]
        if name == "encoder.mean_key":
            keys = qk.k.float().mean(dim=1)
            return keys[:, 1:] if self.class_token else keys
        if name == "encoder.joined_keys":
            return qk.k[:, :, 1:].transpose(1, 2).flatten(2)
        if name == "encoder.joined_class_attention":
            q, k = (x.float().transpose(1, 2).flatten(2) for x in (qk.q[:, :, :1], qk.k))
            return (q @ k.transpose(1, 2) * k.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
        if name == "encoder.given_attention":
            return given_attention(qk.q, qk.k, scale=qk.scale)[:, 1:]
        if name == "encoder.patch_attention":
            return received_attention(qk.q, qk.k, scale=qk.scale, query_rows=slice(1, None))[:, 1:]
        received = received_attention(qk.q, qk.k, scale=qk.scale)
        return received[:, 1:] if self.class_token else received

    def listen(
        self, tower: Any, name: str, layer: int, sink: Sink, key: str, parameter: float | None = None
    ) -> list[Any]:
        """Hooks that hand the statistic of one layer to ``sink`` on every call of the tower."""
        if name == ENTROPY:
            return [tower.register_forward_pre_hook(self._entropy_hook(sink, key), with_kwargs=True)]
        attention = self.attentions(tower)[layer]
        outputs: dict[str, Tensor] = {}

        def keep(part: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                outputs[part] = output.detach()

            return hook

        def finish(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
            with torch.no_grad():
                sink(key, self.reduce(name, self.queries_keys(module, outputs, kwargs), parameter))
            outputs.clear()

        handles = [module.register_forward_hook(keep(part)) for part, module in self.projections(attention).items()]
        handles.append(attention.register_forward_hook(finish, with_kwargs=True))
        return handles

    def _entropy_hook(self, sink: Sink, key: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        mean, std = (torch.tensor(part) for part in self.pixels or SIGLIP_PIXELS)

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            pixels = args[0] if args else kwargs["pixel_values"]
            patch = module.config.patch_size
            patch = patch[0] if isinstance(patch, (list, tuple)) else patch
            # Towers leave out the rim that fills no patch.
            height, width = (side // patch * patch for side in pixels.shape[-2:])
            with torch.no_grad():
                levels = restored_levels(pixels[..., :height, :width], mean, std)
                sink(key, patch_entropy(levels, patch).flatten(1).softmax(dim=-1))

        return hook


class PackedTower(PictureTower):
    """Towers that take all patches of all pictures as one sequence with block lengths (Qwen-VL, VideoLLaMA3)."""

    packed = True

    def __init__(self, layers: str, attention: str = "self_attn", group: int = 1) -> None:
        super().__init__(layers, attention)
        self.group = group

    def projections(self, attention: Any) -> dict[str, nn.Module]:
        """A fused projection where there is one, separate ones otherwise."""
        fused = getattr(attention, "qkv", None)
        return {"qkv": fused} if isinstance(fused, nn.Module) else super().projections(attention)

    def queries_keys(self, attention: Any, outputs: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> QueriesKeys:
        """Queries and keys with the tower's rotary embedding applied, [1, H, n, d]."""
        heads = attention.num_heads
        if "qkv" in outputs:
            q, k = outputs["qkv"].unflatten(-1, (3, heads, -1)).unbind(1)[:2]
        else:
            q, k = (outputs[part].unflatten(-1, (heads, -1)) for part in ("q", "k"))
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        cos, sin = kwargs["position_embeddings"]
        q, k = rotate(q, k, cos, sin)
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        return QueriesKeys(q, k, q.shape[-1] ** -0.5, kwargs["cu_seqlens"])

    def reduce(self, name: str, qk: QueriesKeys, parameter: float | None = None) -> Tensor:
        """Sum over the queries of a patch's block [n]; the host divides by the patches of a frame."""
        if name == "encoder.mean_key":
            return qk.k.float().mean(dim=1)[0]
        if name == FOCUSED:
            return self._focused(qk, parameter or 0.0)
        if name == "encoder.mean_query_attention":
            return self._mean_query(qk)
        return received_attention(qk.q, qk.k, scale=qk.scale, segments=qk.segments, reduce_queries="sum")[0]

    def _mean_query(self, qk: QueriesKeys) -> Tensor:
        """Attention of a block's mean query to the mean keys of its groups, on every patch of a group [n].

        Times the patches of the block, as sums over its queries are.
        """
        bounds = [0, qk.k.shape[2]] if qk.segments is None else qk.segments.tolist()
        parts = []
        for a, b in itertools.pairwise(bounds):
            if b > a:
                q = qk.q[0, :, a:b].float().mean(1, keepdim=True)
                k = qk.k[0, :, a:b].float().unflatten(1, (-1, self.group)).mean(2)
                attention = (q @ k.transpose(1, 2) * qk.scale).softmax(-1).mean((0, 1))
                parts.append(attention.repeat_interleave(self.group) * (b - a))
        return torch.cat(parts)

    @staticmethod
    def _focused(qk: QueriesKeys, threshold: float) -> Tensor:
        """Focused attention times the patches of a block, so that it pools as sums over queries do [n]."""
        bounds = [0, qk.k.shape[2]] if qk.segments is None else qk.segments.tolist()
        parts = [
            focused_attention(qk.q[:, :, a:b], qk.k[:, :, a:b], threshold, scale=qk.scale)[0] * (b - a)
            for a, b in itertools.pairwise(bounds)
            if b > a
        ]
        return torch.cat(parts)
