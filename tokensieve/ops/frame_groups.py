"""Runs of frames that are fused into one."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.ops.merge import MergeMap, mean_merge


def fuse_frames(features: Tensor, starts: Tensor) -> Tensor:
    """Average the frames of each run patch by patch.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    starts : Tensor
        ``[g]`` int64 on the CPU, first frame of each run, ascending from 0.

    Returns
    -------
    Tensor
        ``[g, N, D]`` in the dtype of ``features``; the features themselves if every frame is a run.
    """
    frames = features.shape[0]
    if starts.numel() == frames:
        return features
    first = torch.zeros(frames, dtype=torch.int64)
    first[starts] = 1
    group = (first.cumsum(0) - 1).to(features.device)
    return mean_merge(features.flatten(1), group, starts.numel()).view(-1, *features.shape[1:])


def over_frames(merge_map: MergeMap, frames: Tensor, tokens: int) -> MergeMap:
    """Spread every entry of a merge map evenly over the frames of a run.

    Parameters
    ----------
    merge_map : MergeMap
        Entries whose source is a token ``frame * N + patch`` of the first frame of a run, as if only that frame
        contributed.
    frames : Tensor
        ``[E]`` int64 number of frames of the run of each entry.
    tokens : int
        N.

    Returns
    -------
    MergeMap
        For every entry one for each frame of the run, with equal parts of the weight.
    """
    source, target, weight = merge_map
    entry = torch.repeat_interleave(torch.arange(source.numel(), device=source.device), frames)
    begin = frames.cumsum(0) - frames
    frame = torch.arange(entry.numel(), device=source.device) - begin[entry]
    return MergeMap(source[entry] + frame * tokens, target[entry], (weight / frames)[entry].float())
