"""Timing one ``generate`` call from outside, alike with and without a method attached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tokensieve.core.runtime import base_model
from tokensieve.hosts.registry import host_for

__all__ = ["Stopwatch", "Times", "throughput", "timed"]


@dataclass(frozen=True)
class Times:
    """Seconds of one ``generate`` call.

    Attributes
    ----------
    front
        From the call to the language model: encoder, projector, embedding of the prompt.
    first
        The language model's share of the first token, methods in front of and inside it included.
    first_token
        From the call to the logits of the first token.
    step
        Language model per later token, mean.
    steps
        Number of later tokens.
    generation
        From the first layer of the language model to the end of the call: methods in front of the language
        model are outside, those inside it are inside.
    total
        The whole call.
    """

    front: float
    first: float
    first_token: float
    step: float
    steps: int
    generation: float
    total: float


class Stopwatch:
    """Hooks on a model that note when the language model is reached and left; enter it after attaching a method.

    CUDA work is timed with events, other work with a clock.

    Parameters
    ----------
    model
        The model that will generate.
    clock
        Seconds on a CPU: ``time.perf_counter`` for wall time, ``time.process_time`` for the time that the
        process really computed, which other work on the machine hardly changes.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model = model
        self.clock = clock
        self.text = host_for(model).text_model(base_model(model))
        self.device = next(model.parameters()).device
        self._handles: list[Any] = []
        self._marks: dict[str, list[Any]] = {}

    def __enter__(self) -> Stopwatch:
        self._handles = [
            # In front of all other hooks, and behind all other hooks, of the language model.
            self.text.register_forward_pre_hook(self._note("reached"), prepend=True),
            self.text.register_forward_pre_hook(self._note("begun")),
            self.text.register_forward_hook(self._note("left")),
            self.model.register_forward_hook(self._note("answered")),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            self._marks.setdefault(name, []).append(self._now())

        return hook

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start)

    def run(self, call: Callable[[], Any]) -> Times:
        """Time a call that makes the model answer one prompt (or one batch)."""
        self._marks = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self._now()
        call()
        end = self._now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        marks = self._marks
        spans = [self._between(*pair) for pair in zip(marks["reached"], marks["left"], strict=True)]
        return Times(
            front=self._between(start, marks["reached"][0]),
            first=spans[0],
            first_token=self._between(start, marks["answered"][0]),
            step=sum(spans[1:]) / max(1, len(spans) - 1),
            steps=len(spans) - 1,
            generation=self._between(marks["begun"][0], end),
            total=self._between(start, end),
        )


def timed(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call by a clock, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def throughput(
    dtype: torch.dtype, device: torch.device, size: int = 2048, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations a second of a square matrix product (two per multiply-accumulate), best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed(lambda: a @ b, device)
    return 2 * size**3 / min(timed(lambda: a @ b, device, clock) for _ in range(5))
