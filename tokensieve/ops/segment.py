"""Cutting a video into segments so that as many patches as possible stand still (HoliTom)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokensieve.errors import MethodError


def static_run_counts(similar: Tensor) -> Tensor:
    """Count, for every window of frames, the patches that stay similar through it.

    Parameters
    ----------
    similar : Tensor
        ``[F-1, N]`` bool: patch n of frames t and t+1 is similar.

    Returns
    -------
    Tensor
        ``[F-1, F]`` int64; entry ``[t, r]`` is the number of patches similar in each of the ``r`` frame pairs
        ``t-r+1 .. t``, that is S(a, b) with ``b = t+1`` and ``a = b-r``. Zero where ``r > t+1``; column 0
        is N.

    Notes
    -----
    Runs of similar pairs are measured once for all windows (a running maximum of the last dissimilar pair),
    so the cost is O(F N + F^2) instead of O(F^2 N).
    """
    pairs = similar.shape[0]
    if pairs == 0:
        return torch.zeros(0, 1, dtype=torch.int64, device=similar.device)
    time = torch.arange(pairs, device=similar.device).unsqueeze(1)
    last_break = torch.where(similar, -1, time).cummax(dim=0).values
    run = time - last_break
    histogram = torch.zeros(pairs, pairs + 1, dtype=torch.int64, device=similar.device)
    histogram.scatter_add_(1, run, torch.ones_like(run))
    return histogram.flip(1).cumsum(1).flip(1)


def segment_static(similarity: Tensor, threshold: float, max_window: int = 1024) -> tuple[list[tuple[int, int]], int]:
    """Segmentation of a video that saves the most tokens when static patches are merged over time.

    A window of frames a..b saves ``S(a, b) * (b - a)`` tokens, where S counts the patches whose similarity
    is above the threshold in all its frame pairs. Dynamic programming maximises the sum over all
    segmentations; equal sums prefer the shorter last window.

    Parameters
    ----------
    similarity : Tensor
        ``[F-1, N]`` cosine of each patch with itself in the next frame.
    threshold : float
        A patch is similar if its value is strictly above it.
    max_window : int
        Largest number of frames in a segment.

    Returns
    -------
    segments : list of (int, int)
        First and last frame (inclusive), in order, covering all F frames.
    reduced : int
        Tokens that temporal merging saves (value of the optimum).

    Raises
    ------
    MethodError
        If ``max_window`` is below 1.
    """
    if max_window < 1:
        raise MethodError(f"max_window is {max_window}, but a segment has at least 1 frame; use 1 or more.")
    counts: np.ndarray = static_run_counts(similarity > threshold).cpu().numpy()
    frames = similarity.shape[0] + 1
    # best[i] is the optimum for the first i frames; candidate 0 of frame i is "alone", candidate w-1 a
    # window of w.
    best = np.zeros(frames + 1, dtype=np.int64)
    window = np.ones(frames + 1, dtype=np.int64)
    for end in range(2, frames + 1):
        longest = min(end, max_window)
        lengths = np.arange(longest)
        candidates = best[end - 1 - lengths] + counts[end - 2, :longest] * lengths
        choice = int(np.argmax(candidates))
        best[end], window[end] = candidates[choice], choice + 1
    segments: list[tuple[int, int]] = []
    end = frames
    while end > 0:
        segments.append((end - int(window[end]), end - 1))
        end -= int(window[end])
    return segments[::-1], int(best[frames])
