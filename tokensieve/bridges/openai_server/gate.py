"""Who may come in: a bounded queue in front of a bounded number of places."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tokensieve.bridges.openai_server.errors import ApiError
from tokensieve.bridges.openai_server.metrics import Metrics

__all__ = ["Gate"]

_LONGEST_RETRY = 120


class Gate:
    """Admits requests at once or refuses them at once, and lets them through in the order of arrival.

    Parameters
    ----------
    places
        Requests that are decoded or answered at the same time.
    queue
        Requests that wait for a place.
    parallel
        Requests that the backend answers at the same time.
    metrics
        Told how many wait and run.
    """

    def __init__(self, places: int, queue: int, parallel: int, metrics: Metrics) -> None:
        self._places = asyncio.Semaphore(places)
        self._capacity, self._parallel = places + queue, parallel
        self._metrics = metrics
        self._inside = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold a ticket.

        Raises
        ------
        ApiError
            With status 429 when the queue is full.
        """
        if self._inside >= self._capacity:
            wait = math.ceil(max(1.0, self._metrics.mean_seconds * self._inside / self._parallel / 2))
            raise ApiError(
                f"The queue is full with {self._inside} requests; try again later.",
                status=429,
                headers={"Retry-After": str(min(wait, _LONGEST_RETRY))},
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it."""
        with self._metrics.waiting.track_inprogress():
            await self._places.acquire()
        try:
            with self._metrics.running.track_inprogress():
                yield
        finally:
            self._places.release()
