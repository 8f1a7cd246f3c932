"""Farthest-point selection: a greedy answer to the max-min diversity problem (DivPrune, step 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import UNIT_EPSILON

Strategy = Literal["auto", "matrix", "running", "pool"]

DEFAULT_MAX_MATRIX_BYTES = 256 * 1024 * 1024
_TIE = 5e-7
"""Nearest-neighbour distances closer than this are ties: two tokens that are each other's nearest neighbour
have the same distance up to the rounding of the matrix product, and the lower index must win everywhere."""
_POOL = 256
_AHEAD = 16
"""Distances of the likely next tokens are computed together."""
_SMALL = 1024
_CHOSEN = float("-inf")


def farthest_point(
    features: Tensor,
    count: int,
    *,
    strategy: Strategy = "auto",
    max_matrix_bytes: int = DEFAULT_MAX_MATRIX_BYTES,
) -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, each as far as possible from those already chosen, in cosine distance.

    The first token is the one whose nearest other token is farthest away. Ties go to the lowest index.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    count : int
        Number of tokens to choose, limited to n.
    strategy : {"auto", "matrix", "running", "pool"}
        ``matrix`` stores all similarities and looks rows up, ``running`` computes one row per step,
        ``pool`` keeps exact distances for a small pool of candidates only and refreshes the others when the
        pool is used up. The result is the same (up to float rounding in near-ties); ``auto`` takes what is
        fastest for the size and device.
    max_matrix_bytes : int
        Largest similarity matrix that ``auto`` stores.

    Returns
    -------
    order : Tensor
        ``[count]`` int64 in the order of the choice.
    distances : Tensor
        ``[count]`` float32: distance ``1 - cosine`` of each token to the nearest one chosen before it, and
        for the first one to its nearest other token (0 if it is alone).

    Raises
    ------
    MethodError
        If the strategy is unknown, or a token is infinite or not a number.

    Notes
    -----
    The greedy rule needs ``n * count`` similarities, which as one product per step is bound by memory
    traffic. A distance to the chosen set only ever shrinks, so a stale distance is an upper bound: as long
    as the best exact distance in the pool is above the best stale one outside, the next choice is certain.
    """
    if features.dim() != 2:
        raise MethodError(f"farthest-point selection needs features [n, D], but the shape is {tuple(features.shape)}.")
    total = features.shape[0]
    count = min(max(count, 0), total)
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=features.device), features.new_zeros(0, dtype=torch.float32)
    units = _directions(features)
    if strategy == "auto":
        stored = 4 * total * total <= max_matrix_bytes
        if units.device.type == "cpu":
            strategy = "matrix" if stored and total <= _SMALL else "pool"
        else:
            strategy = "matrix" if stored else "running"
    if strategy == "matrix":
        similarity = units @ units.T
        first = _first_choice(_nearest_of_matrix(similarity))
        return _greedy_rows(lambda idx: similarity.index_select(0, idx)[0], first, count)
    if strategy == "running":
        first = _first_choice(_nearest_blockwise(units, max_matrix_bytes))
        return _greedy_rows(lambda idx: units @ units.index_select(0, idx)[0], first, count)
    if strategy == "pool":
        return _greedy_pool(units, _first_choice(_nearest_pruned(units)), count)
    raise MethodError(f"strategy '{strategy}' is unknown; use 'auto', 'matrix', 'running' or 'pool'.")


def _directions(features: Tensor) -> Tensor:
    """Unit vectors in float32; zero vectors share a direction of their own, so that they count as duplicates."""
    norms = features.float().norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all():
        raise MethodError("farthest-point selection met a feature that is infinite or not a number; check the encoder.")
    units = features.float() / norms.clamp_min(UNIT_EPSILON)
    zero = norms == 0
    return torch.cat((units, zero.float()), dim=1) if bool(zero.any()) else units


def _first_choice(nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Index [1] and distance [1] of the token with the farthest nearest neighbour, from similarities [n]."""
    if nearest.numel() == 1:
        return torch.zeros(1, dtype=torch.int64, device=nearest.device), nearest.new_zeros(1)
    tied = nearest <= nearest.min() + _TIE
    idx = tied.long().argmax().unsqueeze(0)
    return idx, (1 - nearest[idx]).clamp_min(0)


def _nearest_of_matrix(similarity: Tensor) -> Tensor:
    """Largest similarity of each token to another one, from the full matrix (left as it was)."""
    diagonal = similarity.diagonal()
    kept = diagonal.clone()
    diagonal.fill_(float("-inf"))
    nearest = similarity.amax(dim=1)
    diagonal.copy_(kept)
    return nearest


def _nearest_blockwise(units: Tensor, max_bytes: int) -> Tensor:
    """Largest similarity of each token to another one, a block of rows at a time."""
    total = units.shape[0]
    rows = max(1, max_bytes // (4 * total))
    parts = []
    for start in range(0, total, rows):
        block = units[start : start + rows] @ units.T
        block.diagonal(start).fill_(float("-inf"))
        parts.append(block.amax(dim=1))
    return torch.cat(parts)


def _nearest_pruned(units: Tensor, columns: int = 256, probes: int = 16) -> Tensor:
    """Like ``_nearest_blockwise``, but exact only where it can matter for the smallest value.

    A token cannot have the farthest nearest neighbour if it has any neighbour closer than the nearest neighbour of
    some token that is known exactly (a probe). A guess of its nearest neighbour rules most tokens out at the price
    of one product each; the others are compared with one block of columns after the other until they are ruled out
    as well. Tokens that are ruled out get the value +inf.
    """
    total = units.shape[0]
    alive, rows = torch.arange(total, device=units.device), units
    seen = _guessed_nearest(units)
    limit = torch.tensor(float("inf"), device=units.device)
    # Shuffled columns (always in the same way) let every token meet all parts of the video early.
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(units.device)
    for block in shuffled.split(columns):
        probe = seen.topk(min(probes, seen.numel()), largest=False).indices
        limit = torch.minimum(limit, _nearest_among(rows[probe], alive[probe], units).min())
        keep = seen <= limit + 2 * _TIE
        if int(keep.sum()) < 0.8 * keep.numel():
            alive, rows, seen = alive[keep], rows[keep], seen[keep]
        if alive.numel() <= columns:
            break
        seen = torch.maximum(seen, _nearest_among(rows, alive, units[block], block))
    nearest = torch.full((total,), float("inf"), device=units.device)
    nearest[alive] = _nearest_among(rows, alive, units) if alive.numel() <= columns else seen
    return nearest


def _guessed_nearest(units: Tensor, width: int = 64, rows: int = 256) -> Tensor:
    """Similarity of each token to another one that is likely its nearest, found on a few random directions."""
    generator = torch.Generator().manual_seed(0)
    sketch = units @ torch.randn(units.shape[1], width, generator=generator).to(units)
    found = []
    for start, part in zip(range(0, units.shape[0], rows), sketch.split(rows), strict=True):
        likeness = part @ sketch.T
        likeness.diagonal(start).fill_(float("-inf"))
        guess = likeness.argmax(dim=1)
        found.append(torch.linalg.vecdot(units[start : start + rows], units[guess]))
    return torch.cat(found)


def _nearest_among(rows: Tensor, row_idx: Tensor, columns: Tensor, column_idx: Tensor | None = None) -> Tensor:
    """Largest similarity of each row to a column that is another token; all tokens are columns by default."""
    similarity = rows @ columns.T
    if column_idx is None:
        similarity.scatter_(1, row_idx.unsqueeze(1), float("-inf"))
    else:
        similarity.masked_fill_(row_idx.unsqueeze(1) == column_idx, float("-inf"))
    return similarity.amax(dim=1)


def _greedy_rows(row_of: Callable[[Tensor], Tensor], first: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Greedy choice with the running minimum over all tokens; never waits for the device."""
    idx, distance = first
    order, distances = [idx], [distance]
    nearest: Tensor | None = None
    for _ in range(count - 1):
        row = (1 - row_of(idx)).clamp_min_(0)
        nearest = row if nearest is None else torch.minimum(nearest, row)
        nearest[torch.cat(order)] = _CHOSEN
        idx = nearest.argmax().unsqueeze(0)
        order.append(idx)
        distances.append(nearest[idx])
    return torch.cat(order), torch.cat(distances)


def _greedy_pool(units: Tensor, first: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Greedy choice with exact distances for a pool of candidates and upper bounds for the rest."""
    total = units.shape[0]
    order, distances = [int(first[0])], [float(first[1])]
    chosen = units.new_empty(count, units.shape[1])
    chosen[0] = units[order[0]]
    nearest = (1 - units @ chosen[0]).clamp_min_(0)
    nearest[order[0]] = _CHOSEN
    # How many of the chosen tokens the distance of a token takes into account.
    known = torch.ones(total, dtype=torch.int64, device=units.device)
    while len(order) < count:
        ranked = nearest.sort(descending=True, stable=True).indices
        pool = ranked[:_POOL].sort().values
        outside = float(nearest[ranked[_POOL]]) if total > _POOL else _CHOSEN
        rows, settled = units[pool], len(order)
        exact = _refreshed(rows, nearest[pool], known[pool], chosen[:settled])
        # If no distance of the pool was stale, the best one is the largest of all, at the lowest index.
        sure = torch.equal(exact, nearest[pool])
        between: dict[int, Tensor] = {}
        while len(order) < count:
            place = int(exact.argmax())
            distance = float(exact[place])
            if distance <= outside and not (sure and len(order) == settled):
                break
            chosen[len(order)] = rows[place]
            order.append(int(pool[place]))
            distances.append(distance)
            if place not in between:
                ahead = exact.sort(descending=True, stable=True).indices[:_AHEAD]
                between.update(zip(ahead.tolist(), (1 - rows[ahead] @ rows.T).clamp_min_(0), strict=True))
            exact = torch.minimum(exact, between[place])
            exact[place] = _CHOSEN
        nearest[pool], known[pool] = exact, len(order)
    order_tensor = torch.tensor(order, dtype=torch.int64, device=units.device)
    return order_tensor, torch.tensor(distances, dtype=torch.float32, device=units.device)


def _refreshed(rows: Tensor, nearest: Tensor, known: Tensor, chosen: Tensor) -> Tensor:
    """Distances ``[P]`` of some tokens to all chosen ones, from those to the first ``known [P]`` of them."""
    nearest = nearest.clone()
    stale = (known < chosen.shape[0]).nonzero()[:, 0]
    for part in stale[known[stale].argsort()].split(_POOL // 4) if stale.numel() else ():
        # Tokens of similar age share a product.
        later = chosen[int(known[part].min()) :]
        distance = (1 - (rows[part] @ later.T).amax(dim=1)).clamp_min_(0)
        nearest[part] = torch.minimum(nearest[part], distance)
    return nearest
