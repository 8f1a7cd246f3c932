"""Schedules over the depth of an LLM: where to cut, and how many tokens a layer sees on average."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tokensieve.errors import MethodError, RetentionError

Numbers = Sequence[float] | str | float | None
"""A list of numbers as options give it: a sequence, one number, or a text with slashes (``"8/16/24"``)."""


def numbers(value: Numbers, option: str) -> tuple[float, ...]:
    """The numbers of an option.

    Parameters
    ----------
    value : sequence of float, float or str
        A sequence, a single number, or a text with slashes between the numbers.
    option : str
        Name of the option, for the message.

    Returns
    -------
    tuple of float
        The numbers; whole ones as int.

    Raises
    ------
    MethodError
        If it is empty or holds something else.
    """
    parts: Sequence[object] = value.split("/") if isinstance(value, str) else ()
    if isinstance(value, (int, float)):
        parts = (value,)
    elif value is not None and not isinstance(value, str):
        parts = tuple(value)
    try:
        found = tuple(float(str(part)) for part in parts)
    except ValueError:
        found = ()
    if not found:
        raise MethodError(f"{option} is {value!r}; give numbers with slashes between them, for example 8/16/24.")
    return tuple(int(number) if number.is_integer() else number for number in found)


def stated_shares(value: Numbers, cuts: Sequence[int], method: str) -> tuple[float, ...]:
    """Shares that a user states for every cut, from the option ``ratios``.

    Raises
    ------
    MethodError
        If there are not as many shares as cuts.
    """
    shares = numbers(value, "ratios")
    if len(shares) != len(cuts):
        raise MethodError(f"{method} has {len(cuts)} cuts but {len(shares)} ratios; give as many of each.")
    return shares


def spread_layers(wanted: Sequence[float], layers: int, first: int = 1) -> tuple[int, ...]:
    """Distinct layers close to wanted ones.

    Parameters
    ----------
    wanted : sequence of float
        Ascending layer indices, not necessarily whole.
    layers : int
        Number of layers of the LLM.
    first : int
        First layer in front of which a cut is allowed.

    Returns
    -------
    tuple of int
        Strictly ascending, each at least ``first`` and below ``layers``. Fewer than wanted when the LLM is too
        shallow for all.
    """
    found: list[int] = []
    for place in wanted:
        lowest = found[-1] + 1 if found else max(1, first)
        layer = max(lowest, round(place))
        if layer < layers:
            found.append(layer)
    return tuple(found) or (layers - 1,)


def layer_average(starts: Sequence[int], shares: Sequence[float], layers: int) -> float:
    """Visual tokens per layer, averaged over all layers, as a share of those that entered.

    Parameters
    ----------
    starts : sequence of int
        Ascending; from layer ``starts[i]`` on ``shares[i]`` of the tokens are left. Before the first all are.
    shares : sequence of float
        One share per start.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        The average, at most 1 when no share exceeds 1.
    """
    bounds = [0, *starts, layers]
    levels = [1.0, *shares]
    return sum((bounds[i + 1] - bounds[i]) * level for i, level in enumerate(levels)) / layers


def geometric_factor(average: float, starts: Sequence[int], layers: int) -> float:
    """The factor between stages by which a geometric schedule 1, f, f^2, ... has a wanted layer average.

    Parameters
    ----------
    average : float
        Wanted average, above ``starts[0] / layers`` and at most 1.
    starts : sequence of int
        First layer of every stage behind the first one.
    layers : int
        Number of layers of the LLM.

    Returns
    -------
    float
        f in (0, 1], by bisection to the last bits of a float64.

    Raises
    ------
    RetentionError
        If the layers before the first cut alone use up the average.
    """
    check_average(average, starts[0], layers)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = [middle ** (i + 1) for i in range(len(starts))]
        low, high = (middle, high) if layer_average(starts, shares, layers) < average else (low, middle)
    return high


def interpolated_shares(last: float, rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Shares behind several cuts for a wanted share behind the last one, by way of published schedules.

    Parameters
    ----------
    last : float
        Wanted share, in [0, 1].
    rows : sequence of sequence of float
        Published schedules, ascending in their last share. Between them the shares are interpolated linearly,
        below the smallest they shrink in proportion, above the largest they tend to 1.

    Returns
    -------
    tuple of float
        As many shares as a row has.
    """
    cuts = len(rows[0])
    known = [(0.0,) * cuts, *rows, (1.0,) * cuts]
    upper = min(max(1, bisect_left(known, last, key=lambda row: row[-1])), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    weight = (last - low[-1]) / (high[-1] - low[-1])
    return tuple(a + (b - a) * weight for a, b in zip(low, high, strict=True))


def average_shares(
    average: float, starts: Sequence[int], layers: int, rows: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Shares behind several cuts whose layer average is a wanted one, by way of published schedules.

    Parameters
    ----------
    average : float
        Wanted average, above ``starts[0] / layers`` and at most 1.
    starts : sequence of int
        Ascending; from layer ``starts[i]`` on the i-th share counts. May be fewer than a row has shares, which
        leaves the first shares out.
    layers : int
        Number of layers of the LLM.
    rows
        See `interpolated_shares`.

    Returns
    -------
    tuple of float
        One share per start.

    Raises
    ------
    RetentionError
        If the layers before the first cut alone use up the average.
    """
    check_average(average, starts[0], layers)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = layer_average(starts, interpolated_shares(middle, rows)[-len(starts) :], layers)
        low, high = (middle, high) if reached < average else (low, middle)
    return interpolated_shares(high, rows)[-len(starts) :]


def check_average(average: float, full_layers: int, layers: int) -> None:
    """Raise a RetentionError when the layers before the first cut alone use up a layer average."""
    if not full_layers / layers < average <= 1.0:
        raise RetentionError(
            f"an average retention of {average} cannot be reached with {full_layers} of {layers} layers at full "
            f"length; it must be above {full_layers / layers:.3f} and at most 1, or the first cut must be earlier."
        )
