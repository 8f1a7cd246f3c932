"""What the server asks of the engine that runs the model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokensieve.bridges.chat import Turn
from tokensieve.bridges.generation import RowTokens, Sampling
from tokensieve.core.method import Method

__all__ = ["Backend", "Done", "Event", "Generation", "Piece", "Usage"]


@dataclass(frozen=True)
class Generation:
    """One answer to make.

    Attributes
    ----------
    chat : tuple of Turn
        The conversation, its clips decoded.
    method : str
        Notation of the methods.
    retention : float
        Share of the visual tokens to keep.
    methods : list of Method
        The same as objects.
    sampling : Sampling
        How to generate.
    max_prompt_tokens : int, optional
        Longest prompt before compression.
    """

    chat: tuple[Turn, ...]
    method: str
    retention: float
    methods: list[Method]
    sampling: Sampling
    max_prompt_tokens: int | None = None


@dataclass(frozen=True)
class Piece:
    """Some more text of the answer; never empty."""

    text: str


@dataclass(frozen=True)
class Usage:
    """What an answer cost.

    Attributes
    ----------
    tokens
        Tokens of the prompt, before and after compression.
    new_tokens
        Tokens generated.
    seconds
        Time per stage: ``prepare``, ``queue``, ``encode``, ``compress``, ``prefill``, ``decode``.
    notes
        What was done differently from what one might expect.
    batch
        Answers that were made in the same call of the model, where the backend knows; ``encode`` to ``decode`` of
        ``seconds`` are those of the whole call.
    """

    tokens: RowTokens
    new_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch: int | None = None


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: Literal["stop", "length"]
    usage: Usage


Event = Piece | Done


class Backend(Protocol):
    """An engine that answers conversations with compressed visual tokens.

    Attributes
    ----------
    name : str
        For ``/health`` and messages.
    parallel : int
        Answers that it works on at the same time.
    random_weights : bool
        Whether its answers mean nothing.
    """

    name: str
    parallel: int
    random_weights: bool

    def check(self, methods: list[Method]) -> None:
        """Raise TokensieveError when methods cannot run on the model."""

    def start(self) -> None:
        """Begin to take requests."""

    def stop(self) -> None:
        """Cancel what runs and give up all threads."""

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""

    def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Pieces of an answer, then one `Done`; closing the iterator early cancels the work.

        Raises
        ------
        MethodError, VideoError
            For a request that cannot be answered.
        HostError
            When the model cannot take the input.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for ``/v1/models``."""
