"""Cutting a video where consecutive frames differ (DySeg of FastVID and FlashVID)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import unit_vectors


def transition_similarity(vectors: Tensor) -> Tensor:
    """Cosine of each frame vector with the next one.

    Parameters
    ----------
    vectors : Tensor
        ``[F, D]`` one vector per frame.

    Returns
    -------
    Tensor
        ``[F-1]`` float32 (float64 for float64 input); empty for one frame.
    """
    units = unit_vectors(vectors)
    return torch.linalg.vecdot(units[:-1], units[1:])


def segment_transitions(similarity: Tensor, threshold: float, minimum: int = 1) -> list[tuple[int, int]]:
    """Segments of a video that end where the similarity to the next frame is low.

    Every transition below the threshold is a cut. If that gives fewer than ``minimum`` segments, the least similar
    of the other transitions are cut as well.

    Parameters
    ----------
    similarity : Tensor
        ``[F-1]`` similarity of each frame to the next one.
    threshold : float
        A transition strictly below it is a cut.
    minimum : int
        Wanted number of segments, limited by the number of frames.

    Returns
    -------
    list of (int, int)
        First and last frame (inclusive) of every segment, in order.
    """
    frames = similarity.numel() + 1
    below = (similarity < threshold).nonzero()[:, 0]
    cuts = below if below.numel() >= minimum - 1 else top_indices(similarity, minimum - 1, largest=False)
    ends = [*cuts.tolist(), frames - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return list(zip(starts, ends, strict=True))
