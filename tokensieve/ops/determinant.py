"""Greedy choice of the subset with the largest determinant (MAP inference of a determinantal point process)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32, unit_vectors

Strategy = Literal["auto", "matrix", "rows"]

DEFAULT_MAX_MATRIX_BYTES = 256 * 1024 * 1024
RANK_FLOOR = 1e-10
"""Gain below which a set counts as spanning all the others: what is left is rounding noise."""
_CHOSEN = float("-inf")


def greedy_determinant(
    features: Tensor,
    count: int,
    quality: Tensor | None = None,
    *,
    strategy: Strategy = "auto",
    max_matrix_bytes: int = DEFAULT_MAX_MATRIX_BYTES,
) -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, each with the largest gain in ``log det`` of the kernel of the chosen ones.

    The kernel is ``quality_i cos(i, j) quality_j``. The gain of a token is what its squared quality keeps after
    projection onto the tokens chosen before, kept up to date by one row of an incremental Cholesky factor per
    step. Once no gain exceeds ``RANK_FLOOR`` the chosen tokens span all others, and the best remaining quality
    is taken instead. Ties go to the lowest index.

    Parameters
    ----------
    features : Tensor
        ``[B, n, D]``, or ``[n, D]`` for one set; the B sets are independent. Only directions matter.
    count : int
        Number of tokens per set, limited to n.
    quality : Tensor, optional
        ``[B, n]`` (or ``[n]``), not negative; all ones by default.
    strategy : {"auto", "matrix", "rows"}
        ``matrix`` stores all similarities, ``rows`` computes one row per step. The choice is the same up to
        float rounding in near-ties; ``auto`` stores the matrix when it is small and pays off.
    max_matrix_bytes : int
        Largest similarity matrix that ``auto`` stores.

    Returns
    -------
    order : Tensor
        ``[B, count]`` (or ``[count]``) int64 in the order of the choice.
    gains : Tensor
        The same shape, float32 (float64 for float64 features): pivot of each choice, so that the sum of their
        logarithms is the log determinant of the chosen kernel; 0 behind the rank of the kernel.

    Raises
    ------
    MethodError
        If shapes do not match or the strategy is unknown.
    """
    if features.dim() == 2:
        order, gains = greedy_determinant(
            features[None],
            count,
            None if quality is None else quality[None],
            strategy=strategy,
            max_matrix_bytes=max_matrix_bytes,
        )
        return order[0], gains[0]
    if features.dim() != 3 or (quality is not None and quality.shape != features.shape[:2]):
        raise MethodError(
            f"a determinant needs features [B, n, D] and qualities [B, n], but the shapes are "
            f"{tuple(features.shape)} and {None if quality is None else tuple(quality.shape)}."
        )
    if strategy not in ("auto", "matrix", "rows"):
        raise MethodError(f"strategy '{strategy}' is unknown; use 'auto', 'matrix' or 'rows'.")
    units = unit_vectors(features)
    batch, total, _ = units.shape
    count = min(max(count, 0), total)
    weight = torch.ones_like(units[..., 0]) if quality is None else as_float32(quality).to(units)
    if strategy == "auto":
        # One row per step reads all features; the matrix costs about as much as total / 12 such steps.
        stored = units.element_size() * batch * total * total <= max_matrix_bytes and total <= 12 * count + 512
        strategy = "matrix" if stored else "rows"
    kernel = units @ units.transpose(1, 2) if strategy == "matrix" else None
    # A token of length zero is like nothing at all, itself included.
    gain = weight.square() * (units != 0).any(dim=-1)
    spare = weight.clone()
    factor = units.new_empty(batch, count, total)
    order = torch.empty(batch, count, dtype=torch.int64, device=units.device)
    gains = units.new_zeros(batch, count)
    each = torch.arange(batch, device=units.device)
    spent = torch.zeros(batch, dtype=torch.bool, device=units.device)
    for step in range(count):
        spent = spent | (gain.amax(dim=1) < RANK_FLOOR)
        idx = torch.where(spent.unsqueeze(1), spare, gain).argmax(dim=1)
        pivot = gain[each, idx].masked_fill(spent, 0.0)
        direction = units[each, idx]
        row = kernel[each, idx] if kernel is not None else torch.bmm(units, direction.unsqueeze(2)).squeeze(2)
        row = row * weight * weight[each, idx].unsqueeze(1)
        if step:
            before = factor[:, :step]
            row = row - torch.bmm(before[each, :, idx].unsqueeze(1), before).squeeze(1)
        row = torch.where(spent.unsqueeze(1), 0.0, row / pivot.sqrt().clamp_min(RANK_FLOOR).unsqueeze(1))
        factor[:, step] = row
        gain = gain - row.square()
        gain[each, idx] = _CHOSEN
        spare[each, idx] = _CHOSEN
        order[:, step], gains[:, step] = idx, pivot
    return order, gains
