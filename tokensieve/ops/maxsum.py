"""Greedy max-sum diversity: every choice is the token least similar in sum to those chosen before (ToDRE)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import unit_vectors

Strategy = Literal["auto", "running", "prefetch"]

_AHEAD = 256
_MAX_BYTES = 256 * 1024 * 1024
_CHOSEN = float("inf")


def greedy_max_sum(features: Tensor, count: int, first: int, *, strategy: Strategy = "auto") -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, each with the smallest sum of cosines to those already chosen.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``. A positive factor per token changes nothing.
    count : int
        Number of tokens to choose, limited to n.
    first : int
        The token to start from.
    strategy : {"auto", "running", "prefetch"}
        ``running`` updates the sums of all tokens at every step, ``pool`` those of the likely next ones only. The
        result is the same up to float rounding in near-ties; ``auto`` takes what is fastest.

    Returns
    -------
    order : Tensor
        ``[count]`` int64 in the order of the choice, ``first`` in front; the lowest index wins ties.
    sums : Tensor
        ``[count]`` float32 sum of cosines of each token to those chosen before it.

    Raises
    ------
    MethodError
        If the shape, the first token or the strategy is unusable.

    Notes
    -----
    The greedy rule needs ``n * count`` similarities, which as one product per step is bound by memory traffic. The
    tokens that have the smallest sums now are most of those chosen soon, so their rows can be computed together.
    """
    if features.dim() != 2 or not 0 <= first < max(features.shape[0], 1):
        raise MethodError(
            f"max-sum selection needs features [n, D] and a first token among them, but the shape is "
            f"{tuple(features.shape)} and the first token {first}."
        )
    if strategy not in get_args(Strategy):
        raise MethodError(f"strategy '{strategy}' is unknown; use 'auto', 'running' or 'pool'.")
    count = min(max(count, 0), features.shape[0])
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=features.device), features.new_zeros(0, dtype=torch.float32)
    units = unit_vectors(features).float()
    if strategy == "auto":
        strategy = "prefetch" if units.device.type == "cpu" else "running"
    return (_running if strategy == "running" else _prefetched)(units, count, first)


def _running(units: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
    """All sums at every step; no value leaves the device."""
    idx = torch.tensor([first], device=units.device)
    order, sums = [idx], [units.new_zeros(1)]
    total = units.new_zeros(units.shape[0])
    for _ in range(count - 1):
        total += units @ units.index_select(0, idx)[0]
        total.index_fill_(0, idx, _CHOSEN)
        idx = total.argmin().unsqueeze(0)
        order.append(idx)
        sums.append(total[idx])
    return torch.cat(order), torch.cat(sums)


def _prefetched(units: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
    """All sums at every step; rows of the similarity matrix are computed ahead, many in one product."""
    order, sums = [first], [0.0]
    total = units.new_zeros(units.shape[0])
    rows: dict[int, Tensor] = {}
    # Rows wait for their turn in at most twice the memory of the features.
    limit = max(2 * _AHEAD, min(_MAX_BYTES // (4 * units.shape[0]), 2 * units.shape[1]))
    while len(order) < count:
        idx = order[-1]
        if idx not in rows:
            total[idx] = -_CHOSEN
            likely = total.topk(min(_AHEAD, count - len(order) + 1), largest=False).indices.tolist()
            if len(rows) + len(likely) > limit:
                rows.clear()
            likely = [token for token in likely if token not in rows]
            # Rows are cloned so that a used one does not live on with its block.
            rows.update(zip(likely, (row.clone() for row in units[likely] @ units.T), strict=True))
        total += rows.pop(idx)
        total[idx] = _CHOSEN
        idx = int(total.argmin())
        sums.append(float(total[idx]))
        order.append(idx)
    return torch.tensor(order, device=units.device), torch.tensor(sums, device=units.device)
