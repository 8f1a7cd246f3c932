"""Intervals and tests against numbers worked out by hand and against exhaustive enumeration."""

from __future__ import annotations

import itertools
import math

import pytest

from tokensieve.bench.statistics import accuracy, design_effect, holm, kept_share, mcnemar, sign_flip, wilson


def test_wilson_against_the_textbook() -> None:
    """15 of 20, 95 %: the closed form (p + z2/2n -+ z sqrt(pq/n + z2/4n2)) / (1 + z2/n) gives 0.5313 to 0.8881."""
    low, high = wilson(0.75, 20)
    assert low == pytest.approx(0.5313, abs=1e-4) and high == pytest.approx(0.8881, abs=1e-4)


def test_wilson_at_the_ends_is_neither_empty_nor_outside() -> None:
    """None of 10: upper bound z2 / (n + z2) = 3.8415 / 13.8415."""
    low, high = wilson(0.0, 10)
    assert low == 0.0 and high == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    low, high = wilson(1.0, 10)
    assert high == 1.0 and low == pytest.approx(10 / 13.841459, abs=1e-6)
    with pytest.raises(ValueError, match=r"1\.5"):
        wilson(1.5, 10)


def test_wilson_covers_what_it_promises() -> None:
    """Over all outcomes of 60 trials at p = 0.8 the interval holds p with a probability close to 95 %."""
    number, truth = 60, 0.8
    covered = sum(
        math.comb(number, right) * truth**right * (1 - truth) ** (number - right)
        for right in range(number + 1)
        if wilson(right / number, number)[0] <= truth <= wilson(right / number, number)[1]
    )
    assert 0.93 < covered < 0.97


def test_one_question_a_clip_has_no_design_effect_beyond_the_small_sample_factor() -> None:
    """For singletons the between-clip variance is n/(n-1) times the binomial one."""
    clips = [(1, 1)] * 6 + [(0, 1)] * 4
    assert design_effect(clips) == pytest.approx(10 / 9)


def test_clips_that_stand_or_fall_as_a_whole_count_once() -> None:
    """Two questions that always agree are worth one: deff = 2 n/(n-1), so the interval is that of half as many."""
    clips = [(2, 2)] * 6 + [(0, 2)] * 4
    assert design_effect(clips) == pytest.approx(2 * 10 / 9)
    found = accuracy(clips)
    assert found.value == 0.6
    assert (found.low, found.high) == pytest.approx(wilson(0.6, 9.0))


def test_negative_correlation_does_not_narrow_the_interval() -> None:
    clips = [(1, 2)] * 10
    assert design_effect(clips) == 1.0
    assert (accuracy(clips).low, accuracy(clips).high) == wilson(0.5, 20)


def test_kept_share_by_hand() -> None:
    """Right answers (2,2) (0,1) (1,1): ratio 3/4; residuals 0.5, -0.75, 0.25; variance 3/2 * 0.875 / 16."""
    found = kept_share([(2, 2), (0, 1), (1, 1)])
    assert found is not None
    half = 1.959963984540054 * math.sqrt(1.5 * 0.875 / 16)
    assert found.value == 0.75
    assert found.high == pytest.approx(0.75 + half) and found.low == pytest.approx(max(0.0, 0.75 - half))
    assert kept_share([(1, 0), (0, 0)]) is None


def test_the_full_model_keeps_everything_without_doubt() -> None:
    found = kept_share([(2, 2), (1, 1), (0, 0)])
    assert found is not None and (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("lost", "won", "expected"), [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (8, 0, 2 / 256)])
def test_mcnemar_by_hand(lost: int, won: int, expected: float) -> None:
    """Twice the binomial tail: (1 + 10) / 1024 for one against nine."""
    assert mcnemar(lost, won) == pytest.approx(expected)
    assert mcnemar(won, lost) == mcnemar(lost, won)


@pytest.mark.parametrize("differences", [[1, -1, 2, 2, 0, 1], [2, 2, 2], [-1, -1, -1, 1], [1], [0, 0], [3, -1, -2, 1]])
def test_sign_flip_against_all_sign_patterns(differences: list[int]) -> None:
    observed = abs(sum(differences))
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    extreme = sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed for signs in patterns)
    assert sign_flip(differences) == pytest.approx(extreme / len(patterns))


def test_sign_flip_of_single_questions_is_mcnemar() -> None:
    """With one question a clip the two tests are the same test."""
    assert sign_flip([1] * 9 + [-1] * 2 + [0] * 30) == pytest.approx(mcnemar(2, 9))


def test_sign_flip_is_stable_for_many_clips() -> None:
    """Five hundred clips, all lost: 2 / 2^500."""
    assert sign_flip([-1] * 500) == pytest.approx(2.0**-499, rel=1e-9)


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, then 0.03 x 2 does not fall below, 0.5 stays."""
    found = holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06})
    assert holm({}) == {} and holm({"one": 0.7, "two": 0.9}) == {"one": 1.0, "two": 1.0}
