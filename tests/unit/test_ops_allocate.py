"""Rounding rules and budgets per frame."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.allocate import keep_count, largest_remainder, per_frame_counts, round_half_even


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (2.51, 3), (-0.5, 0), (7.0, 7)])
def test_round_half_even(value: float, expected: int) -> None:
    assert round_half_even(value) == expected


@pytest.mark.parametrize(
    ("total", "retention", "rounding", "expected"),
    [
        (10, 0.25, "half_even", 2),
        (14, 0.25, "half_even", 4),
        (10, 0.25, "floor", 2),
        (10, 0.25, "ceil", 3),
        (576, 0.098, "half_even", 56),
        (6272, 1.0, "floor", 6272),
        (3, 0.01, "half_even", 1),
        (0, 0.5, "ceil", 0),
    ],
)
def test_keep_count(total: int, retention: float, rounding: str, expected: int) -> None:
    assert keep_count(total, retention, rounding) == expected


def test_keep_count_minimum_is_limited_by_the_total() -> None:
    assert keep_count(2, 0.1, minimum=5) == 2
    assert keep_count(2, 0.1, minimum=0) == 0


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.0001, float("nan")])
def test_retention_outside_the_range(retention: float) -> None:
    with pytest.raises(RetentionError, match="retention is"):
        keep_count(10, retention)


def test_unknown_rounding_and_negative_total() -> None:
    with pytest.raises(MethodError, match="'up' is unknown"):
        keep_count(10, 0.5, "up")
    with pytest.raises(MethodError, match="-1"):
        keep_count(-1, 0.5)


def test_per_frame_counts_bounds_and_halves() -> None:
    counts = per_frame_counts(torch.tensor([0.0, 0.05, 0.15, 0.25, 1.0]), 10)
    assert counts.tolist() == [1, 1, 2, 2, 10]
    assert counts.dtype == torch.int64


def test_per_frame_counts_ignores_float_noise_around_halves() -> None:
    # 0.35 is not exact in float32: 0.35 * 10 lies below or above 3.5 depending on the arithmetic.
    noise = torch.tensor([-3e-7, 0.0, 3e-7])
    assert per_frame_counts(0.35 + noise, 10).tolist() == [4, 4, 4]
    assert per_frame_counts(torch.full((3,), 0.25) + noise, 10).tolist() == [2, 2, 2]


def test_per_frame_counts_in_half_precision() -> None:
    # One frame takes the surplus: 0.25 * (1 - 1/32) * 196 = 47.47 is 47.5 in bfloat16, which rounds to 48.
    ratios = torch.full((32,), 0.25 * (1 - 1 / 32))
    ratios[5] = 0.25 * (2 - 1 / 32)
    assert int(per_frame_counts(ratios, 196).sum()) == 1553
    assert int(per_frame_counts(ratios.half(), 196).sum()) == 1553
    assert int(per_frame_counts(ratios.bfloat16(), 196).sum()) == 1584


def _hamilton(ideal: list[float], total: int) -> list[int]:
    counts = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (-(Fraction(ideal[i]) - counts[i]), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def test_largest_remainder_equals_hamilton_without_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        shares = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
        shares = (shares / shares.sum() * 70 * 1e4).round() / 1e4
        expected = _hamilton(shares.tolist(), 70)
        if min(expected) >= 1:
            assert largest_remainder(shares, 70, 60).tolist() == expected


def test_largest_remainder_is_exact_and_inside_the_bounds() -> None:
    generator = torch.Generator().manual_seed(1)
    for total in (8, 9, 40, 77, 96):
        counts = largest_remainder(torch.rand(8, generator=generator) * 30, total, 12)
        assert int(counts.sum()) == total
        assert int(counts.min()) >= 1
        assert int(counts.max()) <= 12


def test_largest_remainder_ties_go_to_the_lowest_index() -> None:
    assert largest_remainder(torch.full((4,), 2.5), 10, 5).tolist() == [3, 3, 2, 2]
    assert largest_remainder(torch.full((4,), 3.0), 10, 5).tolist() == [2, 2, 3, 3]


def test_largest_remainder_full_and_impossible() -> None:
    assert largest_remainder(torch.zeros(3), 12, 4).tolist() == [4, 4, 4]
    for total in (2, 13):
        with pytest.raises(MethodError, match=f"spread {total} tokens"):
            largest_remainder(torch.zeros(3), total, 4)
