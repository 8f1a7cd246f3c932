"""Channel variances and closeness to the centres of a video, in few passes and without copying features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.similarity import UNIT_EPSILON

_CPU_BLOCK_BYTES = 4 * 1024 * 1024
_DEVICE_BLOCK_BYTES = 256 * 1024 * 1024


class CentreProducts(NamedTuple):
    """Scalar products of unit vectors y with the centre of the video and with the centre of their frame.

    Attributes
    ----------
    video_dot, frame_dot : Tensor
        ``[F, N]`` products of each unit vector with either centre.
    unit_square : Tensor
        ``[F, N]`` squared length of the unit vectors: 1, or 0 where the feature is zero.
    video_square : Tensor
        Scalar, squared length of the video centre.
    frame_square : Tensor
        ``[F, 1]`` squared lengths of the frame centres.
    """

    video_dot: Tensor
    frame_dot: Tensor
    unit_square: Tensor
    video_square: Tensor
    frame_square: Tensor


def _blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Groups of frames ``[f, N, D]`` as float32, small enough to stay in the cache of a processor."""
    limit = _CPU_BLOCK_BYTES if features.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    step = max(1, limit // max(1, 4 * features[0].numel()))
    for start in range(0, features.shape[0], step):
        yield slice(start, start + step), features[start : start + step].float()


def channel_variance(features: Tensor) -> Tensor:
    """Population variance of every channel over all tokens of the video.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` any floating dtype.

    Returns
    -------
    Tensor
        ``[D]`` float32, from sums around the mean of the first frame that are collected in float64.
    """
    tokens = features.shape[0] * features.shape[1]
    shift = features[0].float().mean(dim=0)
    total, square = (torch.zeros_like(shift, dtype=torch.float64) for _ in range(2))
    for _, block in _blocks(features):
        centred = (block - shift).flatten(0, 1)
        total += centred.sum(dim=0)
        square += centred.square_().sum(dim=0)
    return (square / tokens - (total / tokens).square()).clamp_min_(0).float()


def centre_products(features: Tensor, channels: Tensor | None = None) -> CentreProducts:
    """Compare every token with the mean unit vector of the video and of its frame.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` any floating dtype.
    channels : Tensor, optional
        ``[C]`` int64 channels to look at; all by default.

    Returns
    -------
    CentreProducts
        All in float32.

    Notes
    -----
    A weight of 0 or 1 per channel replaces gathering the channels, and as ``y = x / |x|`` enters only through
    products with centres, no unit vector is ever stored: two passes over the features are enough. Distances
    follow from ``|y - g|^2 = |y|^2 - 2 y.g + |g|^2``.
    """
    frames, tokens, dim = features.shape
    if channels is None:
        mask = features.new_ones(dim, dtype=torch.float32)
    else:
        mask = features.new_zeros(dim, dtype=torch.float32).index_fill_(0, channels, 1.0)
    square = features.new_empty(frames, tokens, dtype=torch.float32)
    centres = features.new_empty(frames, dim, dtype=torch.float32)
    frame_dot, video_dot = torch.empty_like(square), torch.empty_like(square)
    for rows, block in _blocks(features):
        square[rows] = block.square() @ mask
        inverse = square[rows].sqrt().clamp_min_(UNIT_EPSILON).reciprocal_()
        centres[rows] = (inverse.unsqueeze(1) @ block).squeeze(1) * mask / tokens
        frame_dot[rows] = (block @ centres[rows].unsqueeze(2)).squeeze(2) * inverse
    video_centre = centres.double().mean(dim=0).float()
    for rows, block in _blocks(features):
        video_dot[rows] = block @ video_centre
    inverse = square.sqrt().clamp_min_(UNIT_EPSILON).reciprocal_()
    return CentreProducts(
        video_dot * inverse,
        frame_dot,
        square * inverse.square(),
        video_centre.square().sum(),
        centres.square().sum(dim=1, keepdim=True),
    )
