"""Statistics of a benchmark: intervals and paired tests whose sampling unit is the clip.

Questions about one clip share its frames, so they are not independent. Every interval and the test that decisions rest
on therefore treat the clip as the unit that was drawn. All functions are deterministic: nothing is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Cluster", "Estimate", "accuracy", "holm", "kept_share", "mcnemar", "sign_flip", "wilson"]

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

Cluster = Sequence[tuple[float, float]]
"""One (sum, weight) per clip: right answers and questions, or the right answers of two models."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return {"value": self.value, "low": self.low, "high": self.high}


def wilson(share: float, number: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share of ``number`` independent trials, which need be no integer.

    Raises
    ------
    ValueError
        When the share is outside [0, 1] or there are no trials.
    """
    if not 0.0 <= share <= 1.0 or number <= 0:
        raise ValueError(f"An interval needs a share in [0, 1] of at least one trial, not {share} of {number}.")
    scale = z * z / number
    centre = (share + scale / 2) / (1 + scale)
    half = z / (1 + scale) * math.sqrt(share * (1 - share) / number + scale / (4 * number))
    # At the ends the interval touches 0 or 1 exactly; rounding must not push it off.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def accuracy(clips: Sequence[tuple[int, int]]) -> Estimate:
    """Accuracy over questions, with Wilson's interval for the effective number of questions.

    The number of questions is divided by the design effect, the variance between clips of the ratio estimate over
    that of as many independent questions, but never enlarged by it.

    Parameters
    ----------
    clips : sequence of (int, int)
        Right answers and questions of every clip.
    """
    number = sum(asked for _, asked in clips)
    if number == 0:
        raise ValueError("An accuracy needs at least one question.")
    share = sum(right for right, _ in clips) / number
    return Estimate(share, *wilson(share, number / design_effect(clips)))


def design_effect(clips: Sequence[tuple[int, int]]) -> float:
    """How much larger the variance of an accuracy is than with as many independent questions; at least 1."""
    number, units = sum(asked for _, asked in clips), len(clips)
    share = sum(right for right, _ in clips) / number
    if units < 2 or share in (0.0, 1.0):
        return 1.0
    between = units / (units - 1) * sum((right - share * asked) ** 2 for right, asked in clips) / number**2
    return max(1.0, between / (share * (1 - share) / number))


def kept_share(clips: Cluster) -> Estimate | None:
    """Right answers of a method as a share of those of the full model, with a linearised interval over clips.

    Parameters
    ----------
    clips : sequence of (float, float)
        Right answers of the method and of the full model for every clip.

    Returns
    -------
    Estimate or None
        None when the full model answers nothing right.
    """
    total = sum(full for _, full in clips)
    if total == 0:
        return None
    units, ratio = len(clips), sum(right for right, _ in clips) / total
    if units < 2:
        return Estimate(ratio, ratio, ratio)
    variance = units / (units - 1) * sum((right - ratio * full) ** 2 for right, full in clips) / total**2
    half = Z_95 * math.sqrt(variance)
    return Estimate(ratio, max(0.0, ratio - half), ratio + half)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: p of as uneven a split of the discordant questions when both are as good.

    Parameters
    ----------
    lost, won
        Questions that only the reference answers, and that only the method answers.
    """
    discordant = lost + won
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def sign_flip(differences: Sequence[int]) -> float:
    """Exact two-sided permutation test over clips.

    Under the hypothesis that method and reference are exchangeable within every clip, the sign of each clip's
    difference is a coin. The distribution of their sum is computed in full, by convolution.

    Parameters
    ----------
    differences : sequence of int
        Right answers of the method minus those of the reference, for every clip.

    Returns
    -------
    float
        Probability of a sum at least as far from zero as the observed one.
    """
    steps = [abs(step) for step in differences if step]
    reach, observed = sum(steps), abs(sum(differences))
    if not steps or observed == 0:
        return 1.0
    # chances[i] is the probability that the sum is i - reach.
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for step in steps:
        moved = np.zeros_like(chances)
        moved[:-step] += chances[step:] / 2
        moved[step:] += chances[:-step] / 2
        chances = moved
    return min(1.0, 2 * math.fsum(chances[reach + observed :]))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of a family of tests.

    Parameters
    ----------
    chances
        Name of a test -> its p.

    Returns
    -------
    dict
        Name -> adjusted p, never smaller than the given one, never larger than 1.
    """
    ordered = sorted(chances, key=lambda name: chances[name])
    adjusted, floor = {}, 0.0
    for rank, name in enumerate(ordered):
        floor = max(floor, min(1.0, (len(ordered) - rank) * chances[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in chances}
