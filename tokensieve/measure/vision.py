"""Arithmetic of vision encoders: tower and projector, from the configuration and what was encoded.

Counted are the matrix products: patch embedding, projections, attention inside each block (a picture, a
temporal step, or a window), feed-forward, and the projector in front of the LLM. Pooling, norms and position
embeddings are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.core.layout import Layout
from tokensieve.errors import HostError
from tokensieve.measure.flops import Work

__all__ = ["TowerGeometry", "encoder_work", "projector_work", "tower_grids", "tower_work"]

Grid = tuple[int, int]
"""Rows and columns of the patches of one picture or one temporal step, as the tower sees them."""

_PICTURES = ("clip", "siglip", "internvl")
_PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")


@dataclass(frozen=True)
class TowerGeometry:
    """The sizes of a vision tower that its arithmetic depends on.

    Attributes
    ----------
    width, mlp, layers
        Width of the states and of the feed-forward layer, and depth.
    patch_inputs
        Numbers that one patch embedding reads (channels x pixels, x 2 frames for the Qwen family).
    class_token
        Whether a class token runs along.
    gated
        Whether the feed-forward has three matrices.
    full_layers
        Layers that attend over the whole block; the others attend inside windows.
    window
        Side of a window in patches, 0 where there are none.
    """

    width: int
    mlp: int
    layers: int
    patch_inputs: int
    class_token: bool = False
    gated: bool = False
    full_layers: int | None = None
    window: int = 0

    @classmethod
    def of(cls, vision: Any) -> TowerGeometry:
        """From the ``vision_config`` of a supported family, or a HostError for another tower."""
        kind = tower_kind(vision)
        patch = _first(vision.patch_size)
        channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
        inputs = channels * patch * patch
        if kind in _PICTURES or kind == "video_llama_3":
            return cls(
                vision.hidden_size,
                vision.intermediate_size,
                vision.num_hidden_layers,
                inputs,
                class_token=kind in ("clip", "internvl"),
            )
        inputs *= vision.temporal_patch_size
        if kind == "qwen2_vl":
            return cls(vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.depth, inputs)
        if kind == "qwen3_vl":
            return cls(vision.hidden_size, vision.intermediate_size, vision.depth, inputs)
        merge = vision.spatial_merge_size
        return cls(
            vision.hidden_size,
            vision.intermediate_size,
            vision.depth,
            inputs,
            gated=True,
            full_layers=len(vision.fullatt_block_indexes),
            window=vision.window_size // merge // patch * merge,
        )


def tower_kind(vision: Any) -> str:
    """Family of a vision tower, from the model type of its configuration."""
    text = str(getattr(vision, "model_type", "unknown"))
    kind = text.removesuffix("_model").removesuffix("_vision")
    if kind not in _PICTURES + _PACKED:
        known = ", ".join(_PICTURES + _PACKED)
        raise HostError(f"FLOPs of a vision tower of type {text!r} are not known; known are {known}.")
    return kind


def tower_work(vision: Any, grids: Iterable[Grid], seen: Sequence[Sequence[float]] | None = None) -> Work:
    """Multiply-accumulates of a vision tower.

    Parameters
    ----------
    vision
        The ``vision_config`` of the model.
    grids : iterable of (rows, columns)
        Patches of every picture (CLIP, SigLIP, InternVL) or temporal step (packed towers); each attends
        only inside itself.
    seen : sequence of (tokens, tokens), optional
        Tokens of a picture, class token included, that attention and feed-forward part of every layer see, where a
        method shortens the sequence inside the tower; by default all everywhere.

    Returns
    -------
    Work
        The patch embedding is under ``other``.
    """
    geometry = TowerGeometry.of(vision)
    if seen is not None:
        return _shortened_work(geometry, list(grids), seen)
    extra = int(geometry.class_token)
    width, layers = geometry.width, geometry.layers
    full = layers if geometry.full_layers is None else geometry.full_layers
    total = Work()
    for rows, columns in grids:
        tokens = rows * columns + extra
        pairs = full * tokens**2
        if full < layers:
            pairs += (layers - full) * sum(n * n for n in window_sizes(rows, columns, geometry.window))
        total += Work(
            projections=layers * 4 * tokens * width * width,
            attention=2 * pairs * width,
            mlp=layers * (3 if geometry.gated else 2) * tokens * width * geometry.mlp,
            other=rows * columns * geometry.patch_inputs * width,
        )
    return total


def _shortened_work(geometry: TowerGeometry, grids: Sequence[Grid], seen: Sequence[Sequence[float]]) -> Work:
    """Multiply-accumulates of a picture tower whose blocks see fewer and fewer tokens."""
    width, pictures = geometry.width, len(grids)
    attended, fed = ([float(entry[i]) for entry in seen] for i in (0, 1))
    return Work(
        projections=round(pictures * sum(4 * tokens * width * width for tokens in attended)),
        attention=round(pictures * sum(2 * tokens**2 * width for tokens in attended)),
        mlp=round(pictures * sum((3 if geometry.gated else 2) * tokens * width * geometry.mlp for tokens in fed)),
        other=sum(rows * columns for rows, columns in grids) * geometry.patch_inputs * width,
    )


def window_sizes(rows: int, columns: int, window: int) -> list[int]:
    """Patches of every attention window of a grid; the windows at the far rims are smaller."""
    heights = [min(window, rows - start) for start in range(0, rows, window)]
    widths = [min(window, columns - start) for start in range(0, columns, window)]
    return [height * width for height in heights for width in widths]


def tower_grids(config: Any, layout: Layout, views: Sequence[int] | None = None) -> list[Grid]:
    """What the tower encoded for one visual item.

    Parameters
    ----------
    config
        Configuration of the composite model.
    layout : Layout
        Uncompressed geometry of the item. The unpadded mosaic of an any-resolution image is taken to come
        from the fewest tiles that cover it.
    views : sequence of int, optional
        Views that were encoded; all by default.
    """
    vision = config.vision_config
    kind = tower_kind(vision)
    chosen = layout.views if views is None else [layout.views[i] for i in views]
    if kind in _PACKED:
        merge = _merge(config, layout)
        return [(rows * merge, columns * merge) for rows, columns in chosen]
    side = _first(vision.image_size) // _first(vision.patch_size)
    mosaic = layout.kind == "image" and kind != "internvl" and len(chosen) == 2
    if not mosaic:
        return [(side, side)] * len(chosen)
    rows, columns = chosen[1]
    return [(side, side)] * (1 + -(-rows // side) * -(-columns // side))


def projector_work(config: Any, layout: Layout, grids: Sequence[Grid], views: Sequence[int] | None = None) -> Work:
    """Multiply-accumulates between tower and LLM for one visual item; arguments as `tower_grids`."""
    vision = config.vision_config
    kind, hidden = tower_kind(vision), config.text_config.hidden_size
    geometry = TowerGeometry.of(vision)
    width, patches = geometry.width, sum(rows * columns for rows, columns in grids)
    if kind.startswith("qwen"):
        merged, group = patches // vision.spatial_merge_size**2, width * vision.spatial_merge_size**2
        levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return Work(other=levels * merged * (group * group + group * hidden))
    if kind == "video_llama_3":
        patches //= _merge(config, layout) ** 2
    elif kind == "internvl":
        shrink = round(1 / config.downsample_ratio) ** 2
        patches, width = patches // shrink, width * shrink
    else:
        levels = config.vision_feature_layer
        width *= len(levels) if isinstance(levels, (list, tuple)) else 1
        if config.model_type == "llava_next_video" and layout.kind == "video":
            # The resampler pools in front of the projector.
            chosen = layout.views if views is None else [layout.views[i] for i in views]
            patches = sum(rows * columns for rows, columns in chosen)
        elif geometry.class_token and config.vision_feature_select_strategy == "full":
            patches += len(grids)
    return Work(other=patches * (width * hidden + hidden * hidden))


def encoder_work(
    config: Any,
    layout: Layout,
    views: Sequence[int] | None = None,
    seen: Sequence[Sequence[float]] | None = None,
) -> Work:
    """Multiply-accumulates of tower and projector for one visual item; arguments as `tower_grids`, `tower_work`."""
    grids = tower_grids(config, layout, views)
    return tower_work(config.vision_config, grids, seen) + projector_work(config, layout, grids, views)


def _merge(config: Any, layout: Layout) -> int:
    """Side of the square of patches that becomes one token."""
    if tower_kind(config.vision_config) == "video_llama_3":
        return 2 if layout.kind == "video" else 1
    return int(config.vision_config.spatial_merge_size)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
