"""Search for the maximum of an expensive function by a Gaussian process: ask for a point, tell its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import MethodError

_CANDIDATES = 2048
_NOISE_FLOOR = 1e-6


@dataclass
class GaussianSearch:
    """Expected improvement over a Matern-5/2 process with a length for each axis.

    Every answer depends on the points told so far and on ``seed`` alone, so that a search goes on after an
    interruption as if nothing had happened.

    Parameters
    ----------
    bounds
        Lowest and highest value of every axis; equal ones fix it.
    seed
        Of the first points and of the candidates.
    initial
        Points spread over the box (a scrambled Sobol sequence) before the process is asked.

    Attributes
    ----------
    points, values
        What was told.
    """

    bounds: Sequence[tuple[float, float]]
    seed: int = 42
    initial: int = 10
    points: list[tuple[float, ...]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.bounds or any(not low <= high for low, high in self.bounds) or self.initial < 1:
            raise MethodError(f"a search needs bounds that rise and at least one first point, not {self.bounds}.")

    def ask(self) -> tuple[float, ...]:
        """The next point to evaluate, inside the bounds."""
        told = len(self.points)
        if told < self.initial:
            engine = torch.quasirandom.SobolEngine(len(self.bounds), scramble=True, seed=self.seed)
            return self._point(engine.draw(told + 1)[told].double())
        units = torch.tensor([self._unit(point) for point in self.points], dtype=torch.float64)
        values = torch.tensor(self.values, dtype=torch.float64)
        scale = float(values.std()) if told > 1 else 0.0
        values = (values - values.mean()) / (scale if scale > 0 else 1.0)
        process = _Process.fit(units, values)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + told)
        spread = torch.rand(_CANDIDATES, units.shape[1], generator=generator, dtype=torch.float64)
        best = units[int(values.argmax())]
        steps = torch.randn(_CANDIDATES, units.shape[1], generator=generator, dtype=torch.float64)
        # Half of the candidates around the best point, from wide to narrow.
        widths = torch.logspace(-0.7, -3, _CANDIDATES, dtype=torch.float64).unsqueeze(1)
        candidates = torch.cat((spread, (best + widths * steps).clamp(0, 1)))
        return self._point(candidates[int(process.improvement(candidates, float(values.max())).argmax())])

    def tell(self, point: Sequence[float], value: float) -> None:
        """Learn the value of a point (clipped to the bounds); NaN counts as 0."""
        clipped = tuple(min(max(x, low), high) for x, (low, high) in zip(point, self.bounds, strict=True))
        self.points.append(clipped)
        self.values.append(0.0 if math.isnan(value) else float(value))

    @property
    def best(self) -> tuple[tuple[float, ...], float]:
        """Best point told so far and its value."""
        if not self.values:
            raise MethodError("the search has seen no point yet; ask and tell at least once.")
        place = max(range(len(self.values)), key=self.values.__getitem__)
        return self.points[place], self.values[place]

    def state(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        return {
            "bounds": [list(pair) for pair in self.bounds],
            "seed": self.seed,
            "initial": self.initial,
            "points": [list(point) for point in self.points],
            "values": list(self.values),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> GaussianSearch:
        """A search as `state` described it."""
        search = cls([(float(a), float(b)) for a, b in state["bounds"]], int(state["seed"]), int(state["initial"]))
        for point, value in zip(state["points"], state["values"], strict=True):
            search.tell([float(x) for x in point], float(value))
        return search

    def _unit(self, point: Sequence[float]) -> list[float]:
        return [
            (x - low) / (high - low) if high > low else 0.0 for x, (low, high) in zip(point, self.bounds, strict=True)
        ]

    def _point(self, unit: Tensor) -> tuple[float, ...]:
        return tuple(
            min(max(low + float(x) * (high - low), low), high) for x, (low, high) in zip(unit, self.bounds, strict=True)
        )


@dataclass
class _Process:
    """A Gaussian process with its data."""

    points: Tensor
    lengths: Tensor
    noise: Tensor
    factor: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, points: Tensor, values: Tensor) -> _Process:
        """Lengths and noise that make the data most likely, with weak priors around 0.4 and 0.01."""
        logs = torch.cat((torch.full((points.shape[1],), math.log(0.4)), torch.tensor([math.log(1e-2)]))).double()
        prior = logs.clone()
        logs.requires_grad_(True)
        optimiser = torch.optim.LBFGS([logs], max_iter=25, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -cls._likelihood(points, values, logs) + 0.5 * ((logs - prior) / 1.5).square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        found = logs.detach()
        found = prior if not bool(torch.isfinite(found).all()) else found.clamp(-7, 4)
        factor = cls._factor(points, found)
        weights = torch.cholesky_solve(values.unsqueeze(1), factor)
        return cls(points, found[:-1].exp(), found[-1].exp(), factor, weights)

    @staticmethod
    def _factor(points: Tensor, logs: Tensor) -> Tensor:
        kernel = _matern(points, points, logs[:-1].exp())
        eye = torch.eye(points.shape[0], dtype=points.dtype)
        return torch.linalg.cholesky(kernel + (logs[-1].exp() + _NOISE_FLOOR) * eye)

    @classmethod
    def _likelihood(cls, points: Tensor, values: Tensor, logs: Tensor) -> Tensor:
        factor = cls._factor(points, logs.clamp(-7, 4))
        weights = torch.cholesky_solve(values.unsqueeze(1), factor)
        return -0.5 * (values.unsqueeze(1) * weights).sum() - factor.diagonal().log().sum()

    def improvement(self, candidates: Tensor, best: float) -> Tensor:
        """Expected amount by which each candidate beats the best value."""
        kernel = _matern(candidates, self.points, self.lengths)
        mean = (kernel @ self.weights).squeeze(1)
        solved = torch.linalg.solve_triangular(self.factor, kernel.T, upper=False)
        deviation = (1 - solved.square().sum(0)).clamp(min=1e-12).sqrt()
        gain = mean - best
        z = gain / deviation
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        return gain * torch.special.ndtr(z) + deviation * density


def _matern(a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
    """Matern-5/2 covariance [A, B] of points scaled by a length for each axis."""
    squared = ((a[:, None] - b[None]) / lengths).square().sum(-1)
    # The root has no gradient at zero.
    distance = (5 * squared + 1e-12).sqrt()
    return (1 + distance + distance.square() / 3) * torch.exp(-distance)
