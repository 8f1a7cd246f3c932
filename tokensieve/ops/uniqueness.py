"""Frame uniqueness and token typicality: the mathematics of VidCom2, usable by any selector.

Based on "Video Compression Commander" (arXiv 2505.14454), sections on frame compression adjustment and adaptive
token compression; the Gaussian form is that of the released code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.allocate import check_retention, keep_count, largest_remainder, per_frame_counts
from tokensieve.ops.centre import centre_products, channel_variance
from tokensieve.ops.select import top_indices, top_mask
from tokensieve.ops.similarity import UNIT_EPSILON, gaussian_kernel_sum

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01

Similarity = Literal["gaussian", "cosine"]
FrameVariant = Literal[
    "negative_mean", "equal", "positive_mean", "positive_max", "negative_max", "positive_min", "negative_min"
]
TokenVariant = Literal[
    "video_and_frame", "video", "negative_video", "frame", "negative_frame", "attention", "negative_attention"
]


def _check_features(features: Tensor) -> None:
    if features.dim() != 3 or 0 in features.shape:
        raise MethodError(
            f"VidCom2 needs features [F, N, D] that are not empty, but the shape is {tuple(features.shape)}."
        )


def low_variance_channels(features: Tensor, score_dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels used for scoring: the half with the lowest variance (step 1).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    score_dtype : torch.dtype
        Float32, or float16 / bfloat16 to reproduce half-precision runs of the reference.

    Returns
    -------
    Tensor
        ``[max(1, D // 2)]`` int64, ascending; ties go to the lowest channel.
    """
    _check_features(features)
    if score_dtype == torch.float32:
        variance = channel_variance(features)
    else:
        variance = features.to(score_dtype).flatten(0, 1).var(dim=0, correction=0)
    return top_indices(variance, max(1, features.shape[-1] // 2), largest=False)


def gaussian_scores(
    features: Tensor,
    channels: Tensor | None = None,
    similarity: Similarity = "gaussian",
    score_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Similarity of every token to the centre of the video and to the centre of its frame (steps 2 to 4).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features, without newline tokens.
    channels : Tensor, optional
        Channels to look at; all by default.
    similarity : {"gaussian", "cosine"}
        ``gaussian``: multi-scale Gaussian similarity of unit vectors to the mean unit vector (which is not
        scaled to length one). ``cosine``: cosine to the same mean.
    score_dtype : torch.dtype
        Float32 by default; another dtype follows the steps literally in that precision.

    Returns
    -------
    video_score, frame_score : Tensor
        ``[F, N]`` in ``score_dtype``; high means typical.

    Raises
    ------
    MethodError
        If the features are not ``[F, N, D]`` or the similarity is unknown.
    """
    _check_features(features)
    if similarity not in get_args(Similarity):
        raise MethodError(f"similarity '{similarity}' is unknown; use 'gaussian' or 'cosine'.")
    if score_dtype != torch.float32:
        return _literal_scores(features, channels, similarity, score_dtype)
    products = centre_products(features, channels)
    unit_square = products.unit_square
    video_score = _similarity(products.video_dot, unit_square, products.video_square, similarity)
    frame_score = _similarity(products.frame_dot, unit_square, products.frame_square, similarity)
    return video_score, frame_score


def _similarity(dots: Tensor, unit_square: Tensor, centre_square: Tensor, similarity: Similarity) -> Tensor:
    if similarity == "cosine":
        return dots / (unit_square.sqrt() * centre_square.sqrt()).clamp_min(UNIT_EPSILON)
    return gaussian_kernel_sum((unit_square - 2 * dots + centre_square).clamp_min_(0), BANDWIDTHS)


def _literal_scores(
    features: Tensor, channels: Tensor | None, similarity: Similarity, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Steps 2 to 4 one after the other, so that a half-precision run rounds where the reference rounds."""
    units = features.to(dtype) if channels is None else features.to(dtype)[..., channels]
    smallest = max(UNIT_EPSILON, torch.finfo(dtype).tiny)
    units = units / units.norm(dim=-1, keepdim=True).clamp_min(smallest)
    frame_centre = units.mean(dim=1, keepdim=True)
    video_centre = units.flatten(0, 1).mean(dim=0)
    if similarity == "cosine":
        cosines = [
            torch.nn.functional.cosine_similarity(units, centre.expand_as(units), dim=-1, eps=smallest)
            for centre in (video_centre, frame_centre)
        ]
        return cosines[0], cosines[1]
    video_score, frame_score = (
        gaussian_kernel_sum((units - centre).square().sum(dim=-1), BANDWIDTHS)
        for centre in (video_centre, frame_centre)
    )
    return video_score, frame_score


def frame_uniqueness(video_score: Tensor, variant: FrameVariant = "negative_mean") -> Tensor:
    """How much each frame differs from the whole video (step 5).

    Parameters
    ----------
    video_score : Tensor
        ``[F, N]``.
    variant : str
        ``negative_mean`` is the method; the other names are the ablations of the first release (sign and
        statistic over the tokens of a frame). ``equal`` gives every frame the same value.

    Returns
    -------
    Tensor
        ``[F]``, dtype of the input.

    Raises
    ------
    MethodError
        If the variant is unknown.
    """
    if variant == "equal":
        return torch.zeros_like(video_score[:, 0])
    sign, _, statistic = variant.partition("_")
    if variant not in get_args(FrameVariant):
        raise MethodError(f"frame variant '{variant}' is unknown; use one of {', '.join(get_args(FrameVariant))}.")
    if statistic == "mean":
        exact = torch.float64 if video_score.dtype == torch.float32 else video_score.dtype
        value = video_score.mean(dim=1, dtype=exact).to(video_score.dtype)
    else:
        value = video_score.amax(dim=1) if statistic == "max" else video_score.amin(dim=1)
    return -value if sign == "negative" else value


def frame_ratios(uniqueness: Tensor, retention: float, temperature: float = TEMPERATURE) -> Tensor:
    """Retention of each frame, ``min(1, R (1 + p - 1/F))``, p = softmax of the uniqueness (step 6).

    Parameters
    ----------
    uniqueness : Tensor
        ``[F]``.
    retention : float
        R, in (0, 1].
    temperature : float
        Divides the uniqueness; low values give nearly all of the surplus to one frame.

    Returns
    -------
    Tensor
        ``[F]``, dtype of the input, between ``R (1 - 1/F)`` and ``min(1, R (2 - 1/F))``. What the limit of
        1 cuts off is not given to other frames.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    MethodError
        If the temperature is not above 0.
    """
    check_retention(retention)
    if not temperature > 0:
        raise MethodError(f"temperature is {temperature}, but it must be above 0; the published value is 0.01.")
    work = uniqueness.double() if uniqueness.dtype == torch.float32 else uniqueness
    shares = torch.softmax((work - work.max()) / temperature, dim=0)
    ratios = retention * (1.0 + shares - 1.0 / uniqueness.numel())
    return ratios.clamp_max(1.0).to(uniqueness.dtype)


def frame_budget(
    features: Tensor,
    retention: float,
    *,
    temperature: float = TEMPERATURE,
    similarity: Similarity = "gaussian",
    variant: FrameVariant = "negative_mean",
    exact_total: bool = False,
    score_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Retention and number of tokens of every frame (steps 1 to 7), usable in front of any other selector.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected features of one video.
    retention : float
        R in (0, 1]; 1 keeps everything.
    temperature, similarity, variant, score_dtype
        See ``frame_ratios``, ``gaussian_scores``, ``frame_uniqueness``.
    exact_total : bool
        Correct the counts so that they add up to ``round(R F N)`` (ours; the reference leaves rounding
        errors).

    Returns
    -------
    ratios : Tensor
        ``[F]`` retention per frame.
    counts : Tensor
        ``[F]`` int64, ``max(1, round(ratio * N))``.

    Raises
    ------
    RetentionError, MethodError
        On a bad option, see the functions above.
    """
    channels = low_variance_channels(features, score_dtype)
    video_score, _ = gaussian_scores(features, channels, similarity, score_dtype)
    return budget_from_scores(video_score, retention, temperature, variant, exact_total)


def budget_from_scores(
    video_score: Tensor, retention: float, temperature: float, variant: FrameVariant, exact_total: bool
) -> tuple[Tensor, Tensor]:
    frames, tokens = video_score.shape
    ratios = frame_ratios(frame_uniqueness(video_score, variant), retention, temperature)
    if retention == 1.0:
        # The formula would still trim the other frames to about N (1 - 1/F); keeping everything means
        # everything.
        ratios = torch.ones_like(ratios)
    if exact_total:
        total = max(frames, keep_count(frames * tokens, retention))
        return ratios, largest_remainder(ratios * tokens, total, tokens)
    return ratios, per_frame_counts(ratios, tokens)


def token_scores(
    video_score: Tensor,
    frame_score: Tensor,
    variant: TokenVariant = "video_and_frame",
    attention: Tensor | None = None,
) -> Tensor:
    """Score whose smallest values are kept (step 8).

    Parameters
    ----------
    video_score, frame_score : Tensor
        ``[F, N]``.
    variant : str
        ``video_and_frame`` is the method; the others are the ablations of the first release.
    attention : Tensor, optional
        ``[F, N]`` patch attention, for the two attention variants.

    Returns
    -------
    Tensor
        ``[F, N]``.

    Raises
    ------
    MethodError
        If the variant is unknown, or its attention is missing or of another shape.
    """
    if variant not in get_args(TokenVariant):
        raise MethodError(f"token variant '{variant}' is unknown; use one of {', '.join(get_args(TokenVariant))}.")
    if variant == "video_and_frame":
        return video_score + frame_score
    sign, _, name = variant.rpartition("_")
    score = {"video": video_score, "frame": frame_score, "attention": attention}[name]
    if score is None or score.shape != video_score.shape:
        shape = None if score is None else tuple(score.shape)
        raise MethodError(
            f"token variant '{variant}' needs attention {tuple(video_score.shape)}, but its shape is {shape}."
        )
    return -score if sign else score


def select_tokens(
    features: Tensor,
    retention: float,
    *,
    temperature: float = TEMPERATURE,
    similarity: Similarity = "gaussian",
    frame_variant: FrameVariant = "negative_mean",
    token_variant: TokenVariant = "video_and_frame",
    attention: Tensor | None = None,
    exact_total: bool = False,
    score_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole method: which tokens of a video survive (steps 1 to 8).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features of one video, without newline tokens.
    retention : float
        R in (0, 1]; 1 keeps everything, although the published formula would still trim most frames.
    temperature, similarity, frame_variant, token_variant, attention, exact_total, score_dtype
        See ``frame_budget`` and ``token_scores``.

    Returns
    -------
    keep : Tensor
        ``[K]`` int64 indices ``frame * N + patch``, ascending; the features of these tokens stay as they are.
    ratios : Tensor
        ``[F]`` retention per frame.
    counts : Tensor
        ``[F]`` int64 tokens kept per frame.

    Raises
    ------
    RetentionError, MethodError
        On a bad option, see the functions above.
    """
    channels = low_variance_channels(features, score_dtype)
    video_score, frame_score = gaussian_scores(features, channels, similarity, score_dtype)
    ratios, counts = budget_from_scores(video_score, retention, temperature, frame_variant, exact_total)
    scores = token_scores(video_score, frame_score, token_variant, attention)
    mask = top_mask(scores, counts, largest=False)
    return mask.flatten().nonzero()[:, 0], ratios, counts
