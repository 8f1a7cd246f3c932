"""Schedules over depth: averages, factors, interpolation."""

from __future__ import annotations

import pytest

from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.depth import (
    average_shares,
    geometric_factor,
    interpolated_shares,
    layer_average,
    numbers,
    spread_layers,
)

ROWS = ((0.2, 0.1), (0.6, 0.4))


def test_layer_average_counts_layers() -> None:
    """The mean of the share at every single layer."""
    levels = [1.0] * 3 + [0.5] * 4 + [0.2] * 5
    assert layer_average((3, 7), (0.5, 0.2), 12) == pytest.approx(sum(levels) / 12)


@pytest.mark.parametrize("average", [0.3, 0.5, 1.0])
def test_factor_reaches_the_average(average: float) -> None:
    """Powers of the factor have the wanted average."""
    factor = geometric_factor(average, (2, 5, 7), 10)
    assert layer_average((2, 5, 7), [factor, factor**2, factor**3], 10) == pytest.approx(average)


def test_interpolation() -> None:
    """Published rows come out, between them lines, outside towards nothing and everything."""
    assert interpolated_shares(0.4, ROWS) == pytest.approx((0.6, 0.4))
    assert interpolated_shares(0.1, ROWS) == pytest.approx((0.2, 0.1))
    assert interpolated_shares(0.25, ROWS) == pytest.approx((0.4, 0.25))
    assert interpolated_shares(0.05, ROWS) == pytest.approx((0.1, 0.05))
    assert interpolated_shares(0.7, ROWS) == pytest.approx((0.8, 0.7))
    assert interpolated_shares(1.0, ROWS) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("starts", [(2, 4), (3,)])
def test_average_of_published_rows(starts: tuple[int, ...]) -> None:
    """One share per start, with the wanted average; out of reach is an error."""
    shares = average_shares(0.5, starts, 10, ROWS)
    assert len(shares) == len(starts)
    assert layer_average(starts, shares, 10) == pytest.approx(0.5)
    with pytest.raises(RetentionError, match=r"cannot be reached with \d of 10"):
        average_shares(0.2, starts, 10, ROWS)


@pytest.mark.parametrize(("value", "expected"), [("8/16", (8, 16)), (3, (3,)), ([0.5, 1.0], (0.5, 1)), (0.25, (0.25,))])
def test_numbers(value: object, expected: tuple[float, ...]) -> None:
    """Texts, single numbers and sequences; whole numbers come as int."""
    found = numbers(value, "layers")  # type: ignore[arg-type]
    assert found == expected
    assert [type(number) for number in found] == [type(number) for number in expected]


@pytest.mark.parametrize("value", [None, "", "a/b", [], "1//2"])
def test_no_numbers(value: object) -> None:
    """Anything else is named with its option."""
    with pytest.raises(MethodError, match=r"layers is .*slashes"):
        numbers(value, "layers")  # type: ignore[arg-type]


def test_spread() -> None:
    """Distinct and in range."""
    assert spread_layers([8, 16, 24], 32) == (8, 16, 24)
    assert spread_layers([0.1, 0.2, 9], 3) == (1, 2)
