"""Strategies on disk: what a search found, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import MethodError
from tokensieve.methods.vflowopt.functions import Strategy

FORMAT = "tokensieve-vflowopt-strategy-1"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredStrategy:
    """A strategy with what it was found for.

    Attributes
    ----------
    strategy : Strategy
        The parameters.
    retention
        Average retention that they give.
    layers, cuts
        Layers of the LLM, and those in front of which it cuts.
    model
        Name of the model it was found for, for people.
    value
        Mean cosine similarity that the search reached.
    """

    strategy: Strategy
    retention: float
    layers: int
    cuts: tuple[int, int]
    model: str = ""
    value: float | None = None

    def save(self, path: str | Path) -> None:
        """Write the strategy as JSON."""
        found = {"format": FORMAT, **asdict(self), "strategy": self.strategy._asdict()}
        Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> StoredStrategy:
        """Read a strategy; a MethodError says what is wrong with the file."""
        found = read_json(path, FORMAT)
        try:
            given = found["strategy"]
            numbers = [float(given[name]) for name in ("threshold", "alpha", "grid")]
            first, second, third = (float(x) for x in given["ratios"])
            cuts = (int(found["cuts"][0]), int(found["cuts"][1]))
            value = None if found.get("value") is None else float(found["value"])
            stored = cls(
                Strategy(numbers[0], numbers[1], numbers[2], (first, second, third)),
                float(found["retention"]),
                int(found["layers"]),
                cuts,
                str(found.get("model", "")),
                value,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise MethodError(f"{path} is no complete strategy ({error}); write it anew by a search.") from error
        check_strategy(stored.strategy)
        return stored


def check_strategy(strategy: Strategy) -> None:
    """Raise MethodError when a parameter is outside of its range."""
    if not all(0.0 < ratio <= 1.0 for ratio in strategy.ratios):
        raise MethodError(f"the shares kept at the cuts must lie in (0, 1], not {strategy.ratios}.")
    if not strategy.threshold >= 0 or not math.isfinite(strategy.threshold):
        raise MethodError(f"threshold is {strategy.threshold}, but it is a multiple of a mean; use 0 or more.")
    if not strategy.grid > 0 or not math.isfinite(strategy.grid) or not math.isfinite(strategy.alpha):
        raise MethodError(
            f"grid is {strategy.grid} and alpha {strategy.alpha}; use a side above 0 and a finite weight."
        )


def read_json(path: str | Path, wanted: str) -> dict[str, Any]:
    """A JSON object of a format of ours, at most 1 MiB."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise MethodError(f"{path} is larger than 1 MiB, which no file of this kind is; pass the right one.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MethodError(f"{path} cannot be read as JSON ({error}); pass a file that a search wrote.") from error
    if not isinstance(found, dict) or found.get("format") != wanted:
        raise MethodError(f"{path} is not of the format {wanted}; pass a file that a search wrote.")
    return found
