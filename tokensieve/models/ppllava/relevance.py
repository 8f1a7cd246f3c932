"""Relevance maps: cosines of patches and question, and their softmax over a whole clip (PPLLaVA, section 3.1).

Functions of tensors alone; :mod:`.alignment` holds the weights that take both to one space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

__all__ = ["VALUE_SCALE", "Alignment", "cosine_map", "relevance_map", "resize_relevance"]

VALUE_SCALE = 1000.0
"""Factor of the published option that multiplies the relevance with the probe attention (`value_attention`)."""


@dataclass(frozen=True)
class Alignment:
    """What a question says about the patches of a clip; all float32.

    Attributes
    ----------
    cosine : Tensor
        ``[T, h, w]`` or ``[B, T, h, w]`` in [-1, 1]: the map to look at.
    relevance : Tensor
        Same shape, softmax of the scaled cosines over T, h and w together: the map to pool with.
    """

    cosine: Tensor
    relevance: Tensor


def cosine_map(patches: Tensor, text: Tensor) -> Tensor:
    """Cosine between patches and question in the joint space, in float32.

    Parameters
    ----------
    patches : Tensor
        ``[..., T, N, D]``.
    text : Tensor
        ``[..., D]``, the leading axes those of ``patches``.

    Returns
    -------
    Tensor
        ``[..., T, N]``.
    """
    wide = torch.promote_types(patches.dtype, torch.float32)
    # Autocast would take the products back to the narrow type.
    with torch.autocast(patches.device.type, enabled=False):
        unit = normalize(text.to(wide), dim=-1, eps=_tiny(wide))
        patches = patches.to(wide)
        # Dividing the products instead of the patches spares a copy of these.
        products = torch.matmul(patches, unit[..., None, :, None]).squeeze(-1)
        return products / patches.norm(dim=-1).clamp_min(_tiny(wide))


def relevance_map(cosine: Tensor, scale: Tensor | float) -> Tensor:
    """Softmax of the scaled cosines over all positions of each clip (the bias of SigLIP would cancel).

    Parameters
    ----------
    cosine : Tensor
        ``[..., T, h, w]``.
    scale : Tensor or float
        Inverse temperature ``exp(logit_scale)``: 100 for the CLIP models of OpenAI.

    Returns
    -------
    Tensor
        Same shape, float32 or wider; sums to 1 over the last three axes.
    """
    wide = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    return (wide * scale).flatten(-3).softmax(-1).view(cosine.shape)


def resize_relevance(relevance: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a relevance map to another patch grid, bilinearly, and let it sum to 1 again.

    For hosts whose tower is no half of a contrastive pair: a separate CLIP on the same frames gives the map.

    Parameters
    ----------
    relevance : Tensor
        ``[T, h, w]`` or ``[B, T, h, w]``.
    grid : tuple of int
        Rows and columns (h', w') of the host.

    Returns
    -------
    Tensor
        ``[..., T, h', w']`` with sum 1 over T, h' and w'.
    """
    maps = relevance.to(torch.promote_types(relevance.dtype, torch.float32)).flatten(0, -3)[:, None]
    maps = interpolate(maps, size=grid, mode="bilinear", align_corners=False)
    maps = maps.view(*relevance.shape[:-2], *grid)
    return maps / maps.sum((-3, -2, -1), keepdim=True)


def _tiny(dtype: torch.dtype) -> float:
    """Smallest normal number, so that zero vectors give 0 and no others change."""
    return torch.finfo(dtype).tiny
