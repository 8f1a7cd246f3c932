"""FlowCut: scores from the information flow of every encoder layer, patches dropped while the encoder runs.

Based on "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models" (arXiv
2505.19536, NeurIPS 2025). A patch scores by the attention of the class token, by the likeness of its value
vector to that of the class token, and by the length of the value. Scores are smoothed over layers; every second
layer drops some patches, more of them the more concentrated the attention is.

The functions take attention rows and values inside a running encoder or decoder layer, which the runtime does
not hand to methods, so there is no registered method of this name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

SMOOTHING = 0.5
_LOG_GUARD = 1e-7


def semantic_attention(values: Tensor, query: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Likeness of value vectors to one value vector, as a softmax (step 2b; B for the LLM).

    Parameters
    ----------
    values : Tensor
        ``[B, H, n, d]``.
    query : Tensor, optional
        ``[B, H, d]`` the value compared with; by default the first of ``values`` (the class token), which
        takes part in the softmax and is then left out of the result.
    scale : float
        Factor of the dot products: 1 in the encoder, ``d ** -0.5`` in the LLM.

    Returns
    -------
    Tensor
        ``[B, n]`` (``[B, n-1]`` without ``query``), mean over heads, float32.
    """
    values = as_float32(values)
    first = values[:, :, 0] if query is None else as_float32(query)
    share = (torch.einsum("bhd,bhnd->bhn", first, values) * scale).softmax(dim=-1).mean(dim=1)
    return share[:, 1:] if query is None else share


def flow_scores(attention: Tensor, semantic: Tensor | None, values: Tensor, normalise: bool = True) -> Tensor:
    """Importance of every patch in one layer, ``(c / sum c + g / sum g) * |v|_1`` (steps 2c and 2d).

    Parameters
    ----------
    attention : Tensor
        ``[B, n]`` attention of the class token (of the mean query, or of the last prompt token), mean over
        heads.
    semantic : Tensor, optional
        ``[B, n]`` from `semantic_attention`; None leaves the term out (Qwen towers, C).
    values : Tensor
        ``[B, n, d]`` value vectors averaged over heads.
    normalise : bool
        Divide both terms by their sums; the Qwen forms take them as they are.

    Returns
    -------
    Tensor
        ``[B, n]`` float32.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if attention.shape != values.shape[:2] or (semantic is not None and semantic.shape != attention.shape):
        raise MethodError(
            f"flow scores need attention [B, n], likeness [B, n] and values [B, n, d], but the shapes are "
            f"{tuple(attention.shape)}, {None if semantic is None else tuple(semantic.shape)} and "
            f"{tuple(values.shape)}."
        )
    terms = [as_float32(term) for term in (attention, semantic) if term is not None]
    if normalise:
        terms = [term / term.sum(dim=-1, keepdim=True) for term in terms]
    return sum(terms[1:], terms[0]) * as_float32(values).abs().sum(dim=-1)


def prune_counts(attention: Tensor, remaining: int, target: int, normalise: bool = True) -> Tensor:
    """Patches that each sample alone would drop in one pruning layer (step 2f).

    Parameters
    ----------
    attention : Tensor
        ``[B, n]`` attention of the class token, mean over heads.
    remaining : int
        Layers left until the last pruning layer, 0 in that layer itself.
    target : int
        Patches to keep in the end, at least 1.
    normalise : bool
        Divide by the sum first; the Qwen form does not, and adds 1e-7 inside the logarithm.

    Returns
    -------
    Tensor
        ``[B]`` int64, ``round((n - T) / sqrt(rem) * (1 - e^2))`` with e the entropy relative to its largest
        value; ``n - T`` in the last pruning layer. The published batch rule takes the largest for all samples.

    Raises
    ------
    MethodError
        If ``target`` is below 1 or ``remaining`` negative.
    """
    if target < 1 or remaining < 0:
        raise MethodError(
            f"cannot prune to {target} patches with {remaining} layers left; keep at least 1 patch and count layers "
            "from 0."
        )
    surplus = attention.shape[-1] - target
    if surplus <= 0:
        return torch.zeros(attention.shape[0], dtype=torch.int64, device=attention.device)
    if remaining == 0:
        return torch.full((attention.shape[0],), surplus, device=attention.device)
    share = as_float32(attention)
    if normalise:
        share = share / share.sum(dim=-1, keepdim=True)
        entropy = -torch.xlogy(share, share).sum(dim=-1)
    else:
        entropy = -(share * (share + _LOG_GUARD).log()).sum(dim=-1)
    relative = entropy / math.log(attention.shape[-1])
    return torch.round(surplus / math.sqrt(remaining) * (1 - relative.square())).long().clamp(0, surplus)


def is_pruning_layer(layer: int, last: int) -> bool:
    """Whether patches are dropped behind layer ``layer``: every second one up to ``last`` (step 2f)."""
    return layer <= last and (last - layer) % 2 == 0


@dataclass
class EncoderFlow:
    """State of the progressive pruning of one batch of pictures (A).

    Parameters
    ----------
    target
        T, patches to keep per picture.
    last
        Index of the last pruning layer: ``L - 3`` where the output of layer ``L - 2`` is projected (CLIP),
        ``L - 1`` in Qwen towers.
    normalise
        False for the Qwen form, see `flow_scores` and `prune_counts`.

    Attributes
    ----------
    score : Tensor [B, n]
        Smoothed score of the patches left.
    idx : Tensor [B, n]
        Their original ids, ascending.
    trace : list of (int, int, int, int)
        Patches, layers left, target and patches to drop of every pruning layer.
    """

    target: int
    last: int
    normalise: bool = True
    score: Tensor | None = None
    idx: Tensor | None = None
    trace: list[tuple[int, int, int, int]] = field(default_factory=list)

    def step(self, layer: int, attention: Tensor, semantic: Tensor | None, values: Tensor) -> Tensor | None:
        """Take in one layer and say which of the patches left go on (step 2).

        Parameters
        ----------
        layer : int
            Index of the layer that has just run.
        attention, semantic, values : Tensor
            As `flow_scores`, for the patches left.

        Returns
        -------
        Tensor, optional
            ``[B, n']`` int64 places among the n patches left, ascending, to gather the output of the layer by;
            None when all go on.
        """
        batch, count = attention.shape
        if self.idx is None:
            self.idx = torch.arange(count, device=attention.device).expand(batch, -1)
        if count <= self.target:
            return None
        fresh = flow_scores(attention, semantic, values, self.normalise)
        self.score = fresh if self.score is None else SMOOTHING * self.score + SMOOTHING * fresh
        if not is_pruning_layer(layer, self.last):
            return None
        remaining = self.last - layer
        # The batch is coupled: its most concentrated picture decides, so that all keep equally many.
        drop = int(prune_counts(attention, remaining, self.target, self.normalise).max())
        self.trace.append((count, remaining, self.target, drop))
        if drop == 0:
            return None
        keep = top_indices(self.score, count - drop)
        self.score, self.idx = self.score.gather(1, keep), self.idx.gather(1, keep)
        return keep


def mean_query_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the mean query of a picture to its patches, for towers without class token (C).

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, n, d]`` behind the rotary embedding.

    Returns
    -------
    Tensor
        ``[B, n]`` mean over heads, float32.
    """
    query = as_float32(q).mean(dim=2)
    logits = torch.einsum("bhd,bhnd->bhn", query, as_float32(k)) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1)


def select_in_decoder(
    q_last: Tensor, k: Tensor, v_last: Tensor, v: Tensor, target: int, normalise: bool = True
) -> Tensor:
    """Visual tokens that survive the prune behind the second LLM layer (B).

    Parameters
    ----------
    q_last : Tensor
        ``[H, d]`` query of the last prompt token behind the rotary embedding.
    k, v : Tensor
        ``[H_kv, V, d]`` keys (behind the rotary embedding) and values of the visual tokens.
    v_last : Tensor
        ``[H_kv, d]`` value of the last prompt token.
    target : int
        Tokens to keep; all survive when there are no more.
    normalise : bool
        Divide attention and likeness by their sums (LLaVA-NeXT); they sum to 1 already up to rounding.

    Returns
    -------
    Tensor
        ``[min(target, V)]`` int64, ascending, counted from the first visual token.

    Raises
    ------
    MethodError
        If the heads do not match or ``target`` is below 1.
    """
    heads, kv_heads = q_last.shape[0], k.shape[0]
    if heads % kv_heads or target < 1:
        raise MethodError(
            f"cannot keep {target} visual tokens with {heads} query and {kv_heads} key heads; keep at least 1 and "
            "use a multiple of the key heads."
        )
    scale = q_last.shape[-1] ** -0.5
    grouped = as_float32(q_last).unflatten(0, (kv_heads, -1))
    attention = (torch.einsum("ghd,gnd->ghn", grouped, as_float32(k)) * scale).softmax(dim=-1).mean(dim=(0, 1))
    likeness = semantic_attention(v[None], v_last[None], scale)
    score = flow_scores(attention[None], likeness, as_float32(v).mean(dim=0)[None], normalise)
    return top_indices(score[0], target)
