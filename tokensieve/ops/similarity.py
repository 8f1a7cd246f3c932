"""Unit vectors, cosines of neighbouring frames and Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT_EPSILON = 1e-12
_PAIR_BYTES = 256 * 1024 * 1024
_PAIRS_PER_CHANNEL = 8


def stores_pairs(tokens: int, width: int) -> bool:
    """Whether similarities between all pairs of tokens may be stored.

    They take no more than 256 MiB then, and less than what a language model of this width needs to read the tokens:
    its feed-forward part alone holds some twelve numbers per token and channel.

    Parameters
    ----------
    tokens : int
        n; a matrix has n x n float32 numbers.
    width : int
        D, channels of a token.

    Returns
    -------
    bool
        False asks for an algorithm that computes them piece by piece.
    """
    return tokens <= _PAIRS_PER_CHANNEL * width and 4 * tokens * tokens <= _PAIR_BYTES


def as_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype that is safe for scores.

    Parameters
    ----------
    tensor : Tensor
        Any shape and dtype.

    Returns
    -------
    Tensor
        The same tensor if it is float32 or float64, else a float32 copy.
    """
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


def unit_vectors(features: Tensor, epsilon: float = UNIT_EPSILON) -> Tensor:
    """Scale every vector of the last axis to length one.

    Parameters
    ----------
    features : Tensor
        ``[..., D]``.
    epsilon : float
        Lower bound of the norm in the division, so that a zero vector stays zero instead of becoming NaN.

    Returns
    -------
    Tensor
        ``[..., D]``, float32 (float64 for float64 input).
    """
    features = as_float32(features)
    return features / features.norm(dim=-1, keepdim=True).clamp_min(epsilon)


def neighbour_cosine(features: Tensor, epsilon: float = UNIT_EPSILON) -> Tensor:
    """Cosine between each patch and the patch at the same place of the next frame.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` with F frames of N patches; ``[..., F, N, D]`` is allowed.
    epsilon : float
        Lower bound of either norm.

    Returns
    -------
    Tensor
        ``[..., F-1, N]`` in [-1, 1], float32 (float64 for float64 input); empty for a single frame.
    """
    features = as_float32(features)
    norms = features.norm(dim=-1).clamp_min(epsilon)
    first, second = features[..., :-1, :, :], features[..., 1:, :, :]
    dots = torch.linalg.vecdot(first, second)
    return dots / (norms[..., :-1, :] * norms[..., 1:, :])


def gaussian_kernel_sum(squared_distance: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Sum of Gaussian kernels of several widths, ``sum_a exp(-d^2 / (2 a))``.

    Parameters
    ----------
    squared_distance : Tensor
        Any shape, not negative.
    bandwidths : sequence of float
        The widths a, in units of the squared distance.

    Returns
    -------
    Tensor
        Same shape and dtype, in (0, ``len(bandwidths)``].
    """
    total = torch.zeros_like(squared_distance)
    for bandwidth in bandwidths:
        total += torch.exp(squared_distance * (-0.5 / bandwidth))
    return total
