"""The model in this process, through transformers: one thread prepares prompts, one thread runs the model."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tokensieve.bridges.chat import build_chats
from tokensieve.bridges.generation import Sampling, end_ids, row_tokens, stage_seconds
from tokensieve.bridges.joining import join_prompts
from tokensieve.bridges.openai_server.backend import Done, Event, Generation, Usage
from tokensieve.bridges.openai_server.line import Line
from tokensieve.bridges.openai_server.rows import Job, Rows
from tokensieve.core.method import Method
from tokensieve.core.runtime import Run
from tokensieve.errors import HostError, MethodError, TokensieveError
from tokensieve.hosts.registry import host_for
from tokensieve.prompt import Prompt

__all__ = ["TransformersBackend"]

logger = logging.getLogger("tokensieve")
_STOPPING = "The server is stopping; send the request to another."


class TransformersBackend:
    """Answers requests on a model of this process, those that wait together in one padded batch.

    Requests share a batch when they ask for the same method and retention and their prompts fit together (see
    `tokensieve.bridges.joining.can_join`); sampling, stops and lengths of answers may differ. Every row is
    streamed, ended and cancelled by itself.

    Parameters
    ----------
    model, processor
        From `tokensieve.load.load_model`.
    random_weights
        Whether the answers mean nothing.
    batch_size
        Most requests that are answered in one call of the model.
    """

    name = "transformers"

    def __init__(self, model: Any, processor: Any, random_weights: bool = False, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise TokensieveError(f"batch_size must be 1 or more, not {batch_size}.")
        self.random_weights, self.parallel = random_weights, batch_size
        self._model, self._processor = model, processor
        self._host = host_for(model)
        # Tokenizers of the Rust library refuse to be used by two threads at once.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        text = getattr(model.config, "text_config", model.config)
        self._longest = getattr(text, "max_position_embeddings", None)
        self._line = Line()
        self._preparing: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None

    def check(self, methods: list[Method]) -> None:
        """Raise TokensieveError when methods cannot run on the model."""
        Run(self._model, self._host, methods)

    def start(self) -> None:
        """Start both threads."""
        self._line = Line()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="tokensieve-prepare")
        self._thread = threading.Thread(target=self._work, name="tokensieve-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs at its next token, refuse what waits, and join the threads."""
        for job in self._line.close():
            job.post(HostError(_STOPPING))
            job.cancelled.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._preparing is not None:
            self._preparing.shutdown(wait=True, cancel_futures=True)
            self._preparing = None

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def describe(self) -> dict[str, Any]:
        """Family, weight type and longest prompt of the model."""
        return {
            "host": self._host.slug,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "max_model_len": self._longest,
            "batch_size": self.parallel,
        }

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Pieces of an answer, then one `Done`; see `Backend.generate`."""
        if self._preparing is None:
            raise HostError(_STOPPING)
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        prompt = await loop.run_in_executor(self._preparing, self._prepare, request)
        job = Job(request, prompt, loop, time.perf_counter() - begun)
        if not self._line.put(job):
            raise HostError(_STOPPING)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            job.cancelled.set()

    def _prepare(self, request: Generation) -> Prompt:
        """The prompt, on the CPU."""
        whole_frames = any(method.uniform_views for method in request.methods)
        prompt = build_chats(self._processor, [request.chat], whole_frames=whole_frames)
        limit, new = request.max_prompt_tokens or self._longest, request.sampling.max_new_tokens
        if limit is not None and prompt.tokens + new > limit:
            raise MethodError(
                f"The prompt has {prompt.tokens} tokens before compression, which with {new} new ones is more than "
                f"{limit}; ask for fewer frames or a shorter answer."
            )
        return prompt

    def _work(self) -> None:
        """Answer batches until told to stop; no error of a batch ends the thread."""
        while jobs := self._line.take(self.parallel):
            error = self._try(jobs)
            if error is not None and len(jobs) > 1:
                # One of them may be to blame, or the memory did not suffice for all: each gets a chance alone.
                logger.warning("a batch of %d failed (%s); its requests are answered one by one", len(jobs), error)
                for job in jobs:
                    self._fail(job, error if job.begun else self._try([job]))
            elif error is not None:
                self._fail(jobs[0], error)
            # The inputs of a batch must not stay while the thread waits for the next.
            del jobs, error

    @staticmethod
    def _fail(job: Job, error: Exception | None) -> None:
        if error is not None:
            job.post(error)

    def _try(self, jobs: list[Job]) -> Exception | None:
        """Answer those of a batch that somebody waits for; the error that ended it, without the tensors that its
        traceback holds."""
        try:
            if wanted := [job for job in jobs if not job.cancelled.is_set()]:
                self._answer(wanted)
        except Exception as error:
            if not isinstance(error, (TokensieveError, torch.OutOfMemoryError, MemoryError)):
                logger.exception("the model failed")
            return error.with_traceback(None)
        return None

    def _answer(self, jobs: list[Job]) -> None:
        """Generate on the model's thread; the rows post their pieces and ends."""
        begun = time.perf_counter()
        inputs = join_prompts([job.prompt for job in jobs], self._tokenizer.pad_token_id).on(self._model)

        def account(place: int, count: int) -> Usage:
            job = jobs[place]
            seconds = {"prepare": job.prepared, "queue": begun - job.queued, **stage_seconds(run)}
            return Usage(row_tokens(run, inputs)[place], count, seconds, job.prompt.notes, len(jobs))

        rows = Rows(jobs, self._tokenizer, end_ids(self._model), inputs["input_ids"].shape[1], account)
        longest = max(job.request.sampling.max_new_tokens for job in jobs)
        with Run(self._model, self._host, jobs[0].request.methods) as run, torch.inference_mode():
            self._model.generate(
                **inputs,
                **Sampling(longest).arguments(),
                stopping_criteria=[rows.stop],
                logits_processor=[rows.process],
            )
