"""FastV: drop the visual tokens that the last prompt token hardly attends to, after an early LLM layer.

Based on "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models" (arXiv 2403.06764, ECCV 2024). The score is the attention row of the last prompt
token, as in the released code; the paper's text averages over all query rows instead.
"""

from __future__ import annotations

from torch import Tensor

from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.select import top_indices


def rank_visual(attention_row: Tensor, visual_mask: Tensor, keep: int) -> Tensor:
    """Visual tokens with the largest attention (steps 2 and 3).

    Parameters
    ----------
    attention_row : Tensor
        ``[L]`` score of every token of the sequence, usually the attention of the last prompt token in
        layer K-1, averaged over heads.
    visual_mask : Tensor
        ``[L]`` bool, true at the visual tokens that may be dropped. Text and padding never take part.
    keep : int
        Number of visual tokens to keep.

    Returns
    -------
    Tensor
        ``[keep]`` int64 ids among the visual tokens (0 for the first true place of the mask), ascending;
        the lowest id wins ties.

    Raises
    ------
    MethodError
        If the shapes differ or ``keep`` is outside 1..number of visual tokens.
    """
    if attention_row.shape != visual_mask.shape or attention_row.dim() != 1:
        raise MethodError(
            f"ranking needs one score per token, but the scores have shape {tuple(attention_row.shape)} "
            f"and the mask {tuple(visual_mask.shape)}."
        )
    scores = attention_row[visual_mask.bool()]
    if not 1 <= keep <= scores.numel():
        raise MethodError(
            f"cannot keep {keep} of {scores.numel()} visual tokens; keep at least 1 and at most all."
        )
    return top_indices(scores, keep)


def kept_positions(visual_mask: Tensor, kept: Tensor) -> Tensor:
    """Places of the sequence that survive: all that is not visual, and the kept tokens (steps 4 and 5).

    Parameters
    ----------
    visual_mask : Tensor
        ``[L]`` bool.
    kept : Tensor
        ``[n]`` ids among the visual tokens.

    Returns
    -------
    Tensor
        ``[L - V + n]`` int64, ascending. They are also the position ids used from layer K on.
    """
    survives = ~visual_mask.bool()
    survives[visual_mask.nonzero()[kept, 0]] = True
    return survives.nonzero()[:, 0]


def average_retention(retention: float, first_layer: int, layers: int) -> float:
    """Visual tokens per layer, averaged over all layers, as a share of the uncompressed number.

    Parameters
    ----------
    retention : float
        Share kept from ``first_layer`` on (1 - R in the paper's notation).
    first_layer : int
        K, the index of the first layer that sees the shortened sequence; layers 0..K-1 see everything.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        ``(K + (layers - K) * retention) / layers``.
    """
    return (first_layer + (layers - first_layer) * retention) / layers


def retention_for_average(average: float, first_layer: int, layers: int) -> float:
    """Share to keep from layer K on so that the average over all layers is a wanted one.

    Parameters
    ----------
    average : float
        Wanted average retention, above ``first_layer / layers`` and at most 1.
    first_layer : int
        K.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        ``(average * layers - K) / (layers - K)``, in (0, 1].

    Raises
    ------
    RetentionError
        If the first K full layers alone already use up the average.
    """
    if not first_layer / layers < average <= 1.0:
        raise RetentionError(
            f"an average retention of {average} cannot be reached with {first_layer} of {layers} layers "
            f"at full length; it must be above {first_layer / layers:.3f} and at most 1."
        )
    return (average * layers - first_layer) / (layers - first_layer)
