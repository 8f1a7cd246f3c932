"""What is compared: methods at retentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.core.method import Method, check_retention
from tokensieve.core.registry import list_methods, method_class, option_names, parse
from tokensieve.errors import BenchError

__all__ = ["FULL", "RANDOM", "Setting", "expand"]

FULL = "full model"
RANDOM = "random"


@dataclass(frozen=True)
class Setting:
    """One method at one retention.

    Attributes
    ----------
    method
        Notation (``"vidcom2"``, ``"fastv:layer=3"``, ``"a+b"``), or `FULL`.
    retention
        Share of visual tokens asked for; None where the notation states its own.
    """

    method: str
    retention: float | None = None

    @property
    def key(self) -> str:
        """Name in journals and tables, unique in a benchmark."""
        return self.method if self.retention is None else f"{self.method} @ {self.retention:g}"

    @property
    def is_full(self) -> bool:
        """Whether this is the model without compression."""
        return self.method == FULL

    def build(self, options: Mapping[str, Any]) -> list[Method]:
        """Fresh method objects.

        Parameters
        ----------
        options
            Options for the parts that have them (``seed``, ``text_tower``) and state none of their own.
        """
        if self.is_full:
            return parse("none")
        known = _known(self.method)
        given = {name: value for name, value in options.items() if name in known and value is not None}
        if self.retention is not None:
            given["retention"] = self.retention
        return parse(self.method, given)

    @property
    def classes(self) -> list[type[Method]]:
        """Classes of the parts."""
        return [] if self.is_full else [method_class(name) for name in _names(self.method)]


def expand(methods: Sequence[str], retentions: Sequence[float]) -> list[Setting]:
    """Settings of a benchmark: every method at every retention, the full model first.

    Parameters
    ----------
    methods : sequence of str
        Notations; ``"all"`` stands for every method that compresses. ``random`` is always among the results, because
        every method is tested against it. A notation that states ``retention`` in all its parts runs once, so.
    retentions : sequence of float
        Shares in (0, 1].

    Raises
    ------
    BenchError
        When nothing is left to compare.
    MethodError
        For an unknown method or option; `RetentionError` for a retention outside (0, 1].
    """
    shares = list(dict.fromkeys(check_retention(share) for share in retentions))
    names: list[str] = []
    for name in methods:
        names += (
            [one for one in list_methods() if method_class(one).kind != "none"] if name == "all" else [name.strip()]
        )
    if not names or not shares:
        raise BenchError("There is nothing to compare; name at least one method and one retention.")
    found = [Setting(FULL)]
    for name in dict.fromkeys((RANDOM, *names)):
        own = _states_retention(name)
        found += [Setting(name)] if own else [Setting(name, share) for share in shares]
    return found


def _names(notation: str) -> list[str]:
    return [part.partition(":")[0].strip() for part in notation.split("+")]


def _known(notation: str) -> set[str]:
    """Options that some part of a notation has."""
    return set().union(*(option_names(method_class(name)) for name in _names(notation)))


def _states_retention(notation: str) -> bool:
    """Whether the retention of every part is in its notation."""
    one, other = ([part.retention for part in parse(notation, {"retention": share})] for share in (0.25, 0.5))
    return one == other
