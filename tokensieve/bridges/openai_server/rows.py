"""The rows of a batch while it is generated: each has its own sampling, text, end and cancellation."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tokensieve.bridges.generation import Sampling
from tokensieve.bridges.openai_server.backend import Done, Event, Generation, Piece, Usage
from tokensieve.bridges.openai_server.text import TextStream
from tokensieve.errors import HostError
from tokensieve.prompt import Prompt

__all__ = ["Job", "Rows", "Sampler"]

logger = logging.getLogger("tokensieve")


class Job:
    """One request on its way through the model's thread.

    Parameters
    ----------
    request
        What to answer.
    prompt
        The same as model inputs of one row.
    loop
        Where its events are awaited.
    prepared
        Seconds that the preparation took.
    """

    def __init__(self, request: Generation, prompt: Prompt, loop: asyncio.AbstractEventLoop, prepared: float) -> None:
        self.request, self.prompt, self.prepared = request, prompt, prepared
        self.queued = time.perf_counter()
        self.cancelled = threading.Event()
        self.begun = False
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._loop = loop

    def post(self, event: Event | BaseException) -> None:
        """Hand an event to whoever waits for it."""
        self.begun = True
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop is closed: the server has ended and nobody waits.
            logger.debug("an answer came after the end of the server")


class Sampler:
    """Draws the tokens of one row as if it were alone: other rows change neither its numbers nor its settings.

    A draw from a softmax is the largest of the logits after Gumbel noise is added, so rows that draw and rows that
    decode greedily run through one greedy search.

    Parameters
    ----------
    sampling : Sampling
        Temperature, top_p, top_k and seed of the row; a temperature of 0 leaves the scores as they are.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._generator: torch.Generator | None = None
        self._warpers: list[Any] = []
        if sampling.temperature <= 0:
            return
        # Noise comes from the processor on every device, so that a seed means the same everywhere.
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] whose largest is the drawn token; ``ids [1, L]`` are the tokens so far."""
        if self._generator is None:
            return scores
        for warp in self._warpers:
            scores = warp(ids, scores)
        noise = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator)
        return scores - noise.log().to(scores.device)


class Rows:
    """Logits processor and stopping criterion of a batch: sees every token and ends each row when it should.

    Parameters
    ----------
    jobs : sequence of Job
        One per row.
    tokenizer
        Of the model; not shared with other threads.
    ends : set of int
        Tokens that end an answer.
    prompt_length : int
        Columns of the padded prompts.
    account : callable
        Called with a row's number, its new tokens when it ends; what it cost.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        tokenizer: Any,
        ends: set[int],
        prompt_length: int,
        account: Callable[[int, int], Usage],
    ) -> None:
        self._rows = [_Row(job, tokenizer) for job in jobs]
        self._ends, self._length, self._account = ends, prompt_length, account
        self._checked = False

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] from which the next tokens are the largest."""
        if not self._checked:
            self._checked = True
            for row, broken in zip(self._rows, torch.isnan(scores).any(1).tolist(), strict=True):
                if broken:
                    row.fail(
                        HostError(
                            "The model computes NaN; check its weights and the dtype (bfloat16 instead of float16)."
                        )
                    )
        drawn = [row.sampler(ids[place : place + 1], scores[place : place + 1]) for place, row in enumerate(self._rows)]
        return torch.cat(drawn)

    def stop(self, ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        """Take the last column of ``ids [B, L]``; whether each row has ended."""
        for place, (row, token) in enumerate(zip(self._rows, ids[:, -1].tolist(), strict=True)):
            if not row.ended:
                row.push(token, token in self._ends, partial(self._account, place))
        ended = [row.ended for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=ids.device)


class _Row:
    """One answer."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        sampling = job.request.sampling
        self.sampler = Sampler(sampling)
        self.ended = False
        self._job, self._most, self._count = job, sampling.max_new_tokens, 0
        self._text = TextStream(tokenizer, sampling.stop)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._job.post(error)
        self.ended = True

    def push(self, token: int, last: bool, account: Callable[[int], Usage]) -> None:
        """Take a token; post what can be shown, and the end when this was the last one."""
        if self._job.cancelled.is_set():
            self.ended = True
            return
        self._count += 1
        self._show(self._text.push([token]))
        stopped = last or self._text.stopped
        if not stopped and self._count < self._most:
            return
        self._show(self._text.finish())
        # A stop text may be complete only with what was held back.
        reason: Literal["stop", "length"] = "stop" if stopped or self._text.stopped else "length"
        self._job.post(Done(reason, account(self._count)))
        self.ended = True

    def _show(self, text: str) -> None:
        if text:
            self._job.post(Piece(text))
