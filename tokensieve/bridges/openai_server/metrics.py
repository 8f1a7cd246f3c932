"""Counters of a server in the Prometheus format."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokensieve.bridges.openai_server.backend import Usage

__all__ = ["Metrics", "Outcome"]

Outcome = Literal["ok", "bad_request", "unauthorized", "busy", "cancelled", "failed"]

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Attributes
    ----------
    waiting, running : Gauge
        Requests in the queue, and those being decoded or answered.
    mean_seconds : float
        Running mean of the time that the backend spent on a request and those in its batch; 0 before the first.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.mean_seconds = 0.0
        self.requests = Counter("tokensieve_requests", "Chat requests by outcome.", ["outcome"], registry=self.registry)
        self.waiting = Gauge("tokensieve_requests_waiting", "Requests in the queue.", registry=self.registry)
        self.running = Gauge(
            "tokensieve_requests_running", "Requests being decoded or answered.", registry=self.registry
        )
        self._visual = {
            place: Counter(
                f"tokensieve_visual_tokens_{place}", f"Visual tokens {text}.", ["method"], registry=self.registry
            )
            for place, text in (("before", "without compression"), ("after", "that entered the language model"))
        }
        self._prompt = Counter(
            "tokensieve_prompt_tokens", "Prompt tokens that entered the language model.", registry=self.registry
        )
        self._generated = Counter("tokensieve_generated_tokens", "Generated tokens.", registry=self.registry)
        self._stages = Histogram(
            "tokensieve_stage_seconds", "Time per stage.", ["stage"], buckets=_FAST, registry=self.registry
        )
        self._first = Histogram(
            "tokensieve_time_to_first_token_seconds",
            "From the accepted request to the first text.",
            buckets=_SLOW,
            registry=self.registry,
        )
        self._whole = Histogram(
            "tokensieve_request_seconds",
            "From the accepted request to the end of the answer.",
            buckets=_SLOW,
            registry=self.registry,
        )
        self._batch = Histogram(
            "tokensieve_batch_size",
            "Answers made in one call of the model, for every answer.",
            buckets=_SIZES,
            registry=self.registry,
        )
        outcomes: tuple[Outcome, ...] = ("ok", "bad_request", "unauthorized", "busy", "cancelled", "failed")
        for outcome in outcomes:
            self.requests.labels(outcome)

    def count(self, outcome: Outcome) -> None:
        """One more request has ended so."""
        self.requests.labels(outcome).inc()

    def answered(self, method: str, usage: Usage, seconds: dict[str, float], first: float, whole: float) -> None:
        """Record a finished answer.

        Parameters
        ----------
        method
            Notation of the method.
        usage
            From the backend.
        seconds
            Time of the stages outside of the backend.
        first, whole
            Seconds to the first text and to the end.
        """
        self._visual["before"].labels(method).inc(usage.tokens.visual_before)
        self._visual["after"].labels(method).inc(usage.tokens.visual)
        self._prompt.inc(usage.tokens.prompt)
        self._generated.inc(usage.new_tokens)
        for stage, value in (seconds | usage.seconds).items():
            self._stages.labels(stage).observe(value)
        self._first.observe(first)
        self._whole.observe(whole)
        if usage.batch is not None:
            self._batch.observe(usage.batch)
        busy = sum(value for stage, value in usage.seconds.items() if stage != "queue")
        self.mean_seconds = busy if not self.mean_seconds else 0.9 * self.mean_seconds + 0.1 * busy

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
