"""Search for a maximum: bounds, the same steps after an interruption, and optima that are known."""

from __future__ import annotations

import json
import math

import pytest

from tokensieve.errors import MethodError
from tokensieve.ops.bayes import GaussianSearch


def _hill(point: tuple[float, ...]) -> float:
    """A quadratic whose maximum, 3, lies at (2, -0.5)."""
    x, y = point
    return 3 - (x - 2) ** 2 - 4 * (y + 0.5) ** 2


def _run(search: GaussianSearch, calls: int) -> GaussianSearch:
    while len(search.values) < calls:
        point = search.ask()
        search.tell(point, _hill(point))
    return search


def test_finds_the_top_of_a_quadratic() -> None:
    search = _run(GaussianSearch([(0.0, 5.0), (-2.0, 2.0)], initial=6), 25)
    point, value = search.best
    assert value > 2.95
    assert abs(point[0] - 2) < 0.25 and abs(point[1] + 0.5) < 0.15
    # As many points spread blindly do worse.
    blind = _run(GaussianSearch([(0.0, 5.0), (-2.0, 2.0)], initial=25), 25)
    assert blind.best[1] < value


def test_finds_a_top_at_the_bounds() -> None:
    search = _run(GaussianSearch([(0.0, 1.0), (-2.0, -1.0)], initial=5), 20)
    assert search.best[0] == pytest.approx((1.0, -1.0), abs=0.05)
    for point in search.points:
        assert 0.0 <= point[0] <= 1.0 and -2.0 <= point[1] <= -1.0


def test_goes_on_after_an_interruption() -> None:
    whole = _run(GaussianSearch([(0.0, 5.0), (-2.0, 2.0)], seed=3, initial=4), 12)
    part = _run(GaussianSearch([(0.0, 5.0), (-2.0, 2.0)], seed=3, initial=4), 7)
    resumed = _run(GaussianSearch.from_state(json.loads(json.dumps(part.state()))), 12)
    assert resumed.points == whole.points and resumed.values == whole.values
    other = _run(GaussianSearch([(0.0, 5.0), (-2.0, 2.0)], seed=4, initial=4), 7)
    assert other.points != part.points


def test_fixed_axes_and_values_that_are_no_numbers() -> None:
    search = GaussianSearch([(0.0, 1.0), (7.0, 7.0)], initial=3)
    for _ in range(6):
        point = search.ask()
        assert point[1] == 7.0
        search.tell(point, math.nan)
    assert search.values == [0.0] * 6
    search.tell((9.0, 0.0), 1.0)
    assert search.best == ((1.0, 7.0), 1.0)


def test_refusals() -> None:
    with pytest.raises(MethodError, match="bounds that rise"):
        GaussianSearch([(1.0, 0.0)])
    with pytest.raises(MethodError, match="no point yet"):
        _ = GaussianSearch([(0.0, 1.0)]).best
