"""How many tokens to keep: rounding rules and budgets per frame."""

from __future__ import annotations

import heapq
import math
from typing import Literal

import torch
from torch import Tensor

from tokensieve.errors import MethodError, RetentionError

Rounding = Literal["half_even", "floor", "ceil"]

QUOTA_GRID = 1e4
"""Quotas (tokens per frame before rounding) are snapped to 1/QUOTA_GRID tokens, far below any real
difference, so that the float noise of a processor never decides on which side of a half a quota falls."""


def round_half_even(value: float) -> int:
    """Round to the nearest integer, halves to the even neighbour (Python's and torch's rule).

    Parameters
    ----------
    value : float
        The value to round.

    Returns
    -------
    int
        The nearest integer; 0.5 gives 0, 1.5 gives 2, 2.5 gives 2.
    """
    return round(value)


def check_retention(retention: float) -> float:
    """Check that a retention lies in (0, 1].

    Parameters
    ----------
    retention : float
        Share of the visual tokens to keep.

    Returns
    -------
    float
        The same value.

    Raises
    ------
    RetentionError
        If the value is outside (0, 1] or not a number.
    """
    if not 0.0 < retention <= 1.0:
        raise RetentionError(f"retention is {retention}, but it must be above 0 and at most 1; for example 0.25.")
    return retention


def keep_count(total: int, retention: float, rounding: Rounding = "half_even", minimum: int = 1) -> int:
    """Number of tokens to keep out of a total.

    Parameters
    ----------
    total : int
        Number of candidates.
    retention : float
        Share to keep, in (0, 1].
    rounding : {"half_even", "floor", "ceil"}
        How ``total * retention`` (in float64, as the reference implementations compute it) becomes an
        integer.
    minimum : int
        Lower bound of the result, itself limited by ``total``.

    Returns
    -------
    int
        Between ``min(minimum, total)`` and ``total``.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    MethodError
        If the rounding rule is unknown or the total negative.
    """
    quota = total * check_retention(retention)
    if total < 0:
        raise MethodError(f"cannot keep tokens out of a total of {total}; pass a total of zero or more.")
    if rounding == "half_even":
        count = round_half_even(quota)
    elif rounding == "floor":
        count = math.floor(quota)
    elif rounding == "ceil":
        count = math.ceil(quota)
    else:
        raise MethodError(f"rounding rule '{rounding}' is unknown; use 'half_even', 'floor' or 'ceil'.")
    return min(total, max(count, minimum))


def per_frame_counts(ratios: Tensor, tokens_per_frame: int, minimum: int = 1) -> Tensor:
    """Turn a retention per frame into a number of tokens per frame, rounding halves to even.

    Parameters
    ----------
    ratios : Tensor
        ``[F]`` (or ``[..., F]``) retention of each frame. Float16 and bfloat16 ratios are multiplied in
        their own dtype, which is how reference implementations in half precision reach their counts.
    tokens_per_frame : int
        N.
    minimum : int
        Lower bound of each count.

    Returns
    -------
    Tensor
        Same shape, int64, each between ``min(minimum, N)`` and N.
    """
    quotas = (ratios * tokens_per_frame).double()
    if ratios.dtype in (torch.float32, torch.float64):
        quotas = torch.round(quotas * QUOTA_GRID) / QUOTA_GRID
    counts = torch.round(quotas).long()
    return counts.clamp(min(minimum, tokens_per_frame), tokens_per_frame)


def largest_remainder(ideal: Tensor, total: int, capacity: int, minimum: int = 1) -> Tensor:
    """Integers that follow ideal shares and add up to an exact total.

    Every frame first gets the integer part of its share, inside its bounds; what is missing goes one by one
    to the frames furthest below their share, what is too much is taken from those furthest above it. Ties
    go to the lowest index. With no bound reached this is the largest-remainder (Hamilton) apportionment.

    Parameters
    ----------
    ideal : Tensor
        ``[F]`` real-valued shares in tokens; they need not add up to ``total``.
    total : int
        The exact sum wanted.
    capacity : int
        Upper bound of each count (tokens per frame).
    minimum : int
        Lower bound of each count.

    Returns
    -------
    Tensor
        ``[F]`` int64 on the device of ``ideal``, summing to ``total``.

    Raises
    ------
    MethodError
        If no such counts exist: ``total`` outside ``[F * minimum, F * capacity]``.
    """
    frames = ideal.numel()
    if not frames * minimum <= total <= frames * capacity:
        raise MethodError(
            f"cannot spread {total} tokens over {frames} frames of {minimum} to {capacity} tokens each; "
            "change the retention."
        )
    shares: list[float] = torch.round(ideal.double() * QUOTA_GRID).div(QUOTA_GRID).tolist()
    counts = [min(capacity, max(minimum, math.floor(share))) for share in shares]
    excess = sum(counts) - total
    step = -1 if excess > 0 else 1
    bound = minimum if excess > 0 else capacity
    queue = [((count - share) * step, idx) for idx, (count, share) in enumerate(zip(counts, shares, strict=True))]
    heapq.heapify(queue)
    for _ in range(abs(excess)):
        deviation, idx = heapq.heappop(queue)
        while counts[idx] == bound:
            deviation, idx = heapq.heappop(queue)
        counts[idx] += step
        heapq.heappush(queue, (deviation + 1.0, idx))
    return torch.tensor(counts, dtype=torch.int64, device=ideal.device)
