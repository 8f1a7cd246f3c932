"""Importance of tokens by a random walk on the attention of one layer (AIM)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32

TEMPERATURE = 0.1
ITERATIONS = 5


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
    q: Tensor, k: Tensor, mask: Tensor, columns: Tensor, total: int | None = None, scale: float | None = None
) -> Tensor:
    """Root mean square over heads of `walk_mass`, one head at a time.

    Parameters
    ----------
    q : Tensor
        ``[1, H, L, d]`` rotated queries of the tokens that walk.
    k : Tensor
        ``[1, H_kv, K, d]`` rotated keys.
    mask : Tensor
        ``[L, K]`` bool, true where a token may look.
    columns : Tensor
        ``[L]`` int64 places of the walking tokens among the keys.
    total : int, optional
        See `walk_mass`.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.

    Returns
    -------
    Tensor
        ``[L]`` float32.
    """
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    squares = torch.zeros(q.shape[2], device=q.device)
    blocked = ~mask.to(q.device)
    for head in range(heads):
        logits = as_float32(q[0, head]) @ as_float32(k[0, head // groups]).T * scale
        squares += walk_mass(logits.masked_fill(blocked, float("-inf"))[None], total, columns=columns)[0].square()
    return (squares / heads).sqrt()
