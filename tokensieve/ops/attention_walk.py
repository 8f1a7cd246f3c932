"""Importance of tokens by a random walk on the attention of one layer (AIM)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.attention import DEFAULT_MAX_BYTES
from tokensieve.ops.similarity import as_float32

TEMPERATURE = 0.1
ITERATIONS = 5
_COPIES = 4
"""Matrices that live at the same time for the rows that are handled together."""


def walk_mass(
    logits: Tensor,
    total: int | None = None,
    temperature: float = TEMPERATURE,
    iterations: int = ITERATIONS,
    columns: Tensor | None = None,
) -> Tensor:
    """Mass of every token behind some steps of a random walk, head by head.

    Parameters
    ----------
    logits : Tensor
        ``[H, L, K]`` scaled scores of L tokens, very negative or -inf where a token may not look; every row needs one
        entry that is not.
    total : int, optional
        Every token starts with the mass ``1 / total``; L by default.
    temperature, iterations : float, int
        0.1 and 5 as released; the walk has no restarts.
    columns : Tensor, optional
        ``[L]`` int64 places of the L tokens among the K keys, where there are other keys; what goes there is lost. By
        default K is L.

    Returns
    -------
    Tensor
        ``[H, L]`` float32.

    Raises
    ------
    MethodError
        If the logits have another shape.
    """
    wanted = logits.shape[1] if columns is None else columns.numel()
    if logits.dim() != 3 or logits.shape[1] != wanted or (columns is None and logits.shape[2] != wanted):
        raise MethodError(f"ranking tokens needs logits [H, L, L], but the shape is {tuple(logits.shape)}.")
    step = (as_float32(logits) / temperature).softmax(dim=-1)
    if columns is not None:
        step = step.index_select(2, columns.to(step.device))
    mass = step.new_full((step.shape[0], 1, step.shape[1]), 1 / (total or step.shape[1]))
    for _ in range(iterations):
        mass = mass @ step
    return mass[:, 0]


def walk_importance(
    q: Tensor,
    k: Tensor,
    mask: Tensor | Callable[[slice], Tensor],
    columns: Tensor,
    total: int | None = None,
    scale: float | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """Root mean square over heads of `walk_mass`, one head and some rows at a time.

    Parameters
    ----------
    q : Tensor
        ``[1, H, L, d]`` rotated queries of the tokens that walk.
    k : Tensor
        ``[1, H_kv, K, d]`` rotated keys.
    mask : Tensor or callable
        ``[L, K]`` bool, true where a token may look; or a function from a slice of the L tokens to their rows of it.
    columns : Tensor
        ``[L]`` int64 places of the walking tokens among the keys.
    total : int, optional
        See `walk_mass`.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    max_bytes : int
        Memory for attention. The rows of a head that do not fit are computed again in every step of the walk.

    Returns
    -------
    Tensor
        ``[L]`` float32.
    """
    heads, groups, length = q.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    squares = torch.zeros(length, device=q.device)
    rows = max(1, max_bytes // (_COPIES * 4 * max(k.shape[2], 1)))
    parts = [slice(start, start + rows) for start in range(0, length, rows)]
    for head in range(heads):
        keys = as_float32(k[0, head // groups]).T

        def step(part: slice, head: int = head, keys: Tensor = keys) -> Tensor:
            seen = (mask(part) if callable(mask) else mask[part]).to(q.device)
            logits = (as_float32(q[0, head, part]) @ keys).mul_(scale / TEMPERATURE)
            return logits.masked_fill_(~seen, float("-inf")).softmax(dim=-1).index_select(1, columns.to(q.device))

        stored = [step(part) for part in parts] if len(parts) == 1 else None
        mass = torch.full((length,), 1 / (total or length), device=q.device)
        for _ in range(ITERATIONS):
            reached = torch.zeros_like(mass)
            for number, part in enumerate(parts):
                reached += mass[part] @ (stored[number] if stored else step(part))
            mass = reached
        squares += mass.square()
    return (squares / heads).sqrt()
