"""Prepared requests in the order of their arrival, from which the model's thread takes what fits together."""

from __future__ import annotations

import threading
from collections import deque

from tokensieve.bridges.joining import can_join
from tokensieve.bridges.openai_server.rows import Job

__all__ = ["Line"]

# Shorter rows are padded to the longest; beyond this factor the padding would cost more than the batch saves.
_LONGEST_RATIO = 1.5


class Line:
    """A queue between any number of threads that put and one that takes several at a time."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._taken: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> bool:
        """Add a job at the end; False when the line is closed."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()
            return not self._closed

    def close(self) -> list[Job]:
        """Let nobody in any more and end the waiting in `take`; all jobs that wait or were taken last."""
        with self._changed:
            self._closed = True
            left = [*self._taken, *self._jobs]
            self._jobs.clear()
            self._changed.notify()
            return left

    def take(self, most: int) -> list[Job]:
        """Wait for the oldest job, and take it with those behind it that can share its batch.

        Cancelled jobs are dropped. Nobody waits for a batch to fill up: what is there goes.

        Parameters
        ----------
        most : int
            Jobs to take.

        Returns
        -------
        list of Job
            Empty when the line is closed.
        """
        with self._changed:
            # Nothing keeps the last batch in memory while this waits.
            self._taken = []
            while not self._waiting() and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            first, *others = self._jobs
            mates = [job for job in others if _share(first, job)][: most - 1]
            self._taken = [first, *mates]
            self._jobs = deque(job for job in others if job not in mates)
            return list(self._taken)

    def _waiting(self) -> bool:
        """Whether a job waits for which somebody waits."""
        self._jobs = deque(job for job in self._jobs if not job.cancelled.is_set())
        return bool(self._jobs)


def _share(one: Job, other: Job) -> bool:
    """Whether two jobs can be answered in one batch."""
    first, second = one.request, other.request
    lengths = sorted((one.prompt.tokens, other.prompt.tokens))
    return (
        (first.method, first.retention) == (second.method, second.retention)
        and lengths[1] <= _LONGEST_RATIO * lengths[0]
        and can_join(one.prompt, other.prompt)
    )
