"""Entropy of the grey values of picture patches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError

LEVELS = 256
_LOG_GUARD = 1e-10


def patch_entropy(levels: Tensor, patch: int) -> Tensor:
    """Entropy of the grey levels of every patch, in bits.

    Parameters
    ----------
    levels : Tensor
        ``[B, 3, h, w]`` whole numbers from 0 to 255 (of any dtype); h and w are multiples of ``patch``.
    patch : int
        Side of a patch in pixels.

    Returns
    -------
    Tensor
        ``[B, h / patch, w / patch]`` float32, from 0 to 8, of the grey values ``round((R + G + B) / 3)`` (with the
        factor 0.3333, as published).

    Raises
    ------
    MethodError
        If the shape does not fit.
    """
    if levels.dim() != 4 or levels.shape[1] != 3 or levels.shape[2] % patch or levels.shape[3] % patch:
        raise MethodError(
            f"pixel entropy needs pixels [B, 3, h, w] with sides that are multiples of {patch}, but the shape is "
            f"{tuple(levels.shape)}."
        )
    grey = (0.3333 * levels.float().sum(dim=1)).round().long()
    batch, height, width = grey.shape
    blocks = grey.view(batch, height // patch, patch, width // patch, patch).transpose(2, 3).flatten(3)
    histogram = torch.zeros(*blocks.shape[:3], LEVELS, device=levels.device)
    histogram.scatter_add_(3, blocks, torch.ones_like(blocks, dtype=torch.float32))
    share = histogram / (patch * patch)
    return -(share * (share + _LOG_GUARD).log2()).sum(dim=-1)


def restored_levels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Grey-level pixels ``[B, 3, h, w]`` (0 to 255, whole, float32) out of those that a processor normalised.

    Parameters
    ----------
    pixels : Tensor
        ``[B, 3, h, w]`` normalised.
    mean, std : Tensor
        ``[3]`` statistics of the processor, for pixels from 0 to 1.
    """
    mean, std = (part.to(pixels.device, torch.float32)[:, None, None] for part in (mean, std))
    return ((pixels.float() * std + mean) * 255).round().clamp(0, 255)
