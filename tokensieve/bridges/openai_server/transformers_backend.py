"""The model in this process, through transformers: one thread prepares prompts, one thread runs the model."""

from __future__ import annotations

import asyncio
import copy
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from tokensieve.bridges.chat import build_chats
from tokensieve.bridges.generation import FiniteLogits, end_ids, row_tokens, stage_seconds
from tokensieve.bridges.openai_server.backend import Done, Event, Generation, Piece, Usage
from tokensieve.bridges.openai_server.text import TextStream
from tokensieve.core.method import Method
from tokensieve.core.runtime import Run
from tokensieve.errors import HostError, MethodError
from tokensieve.hosts.registry import host_for
from tokensieve.prompt import Prompt

__all__ = ["TransformersBackend"]

logger = logging.getLogger("tokensieve")


class TransformersBackend:
    """Answers one request at a time on a model of this process.

    Parameters
    ----------
    model, processor
        From `tokensieve.load.load_model`.
    random_weights
        Whether the answers mean nothing.
    """

    name = "transformers"
    parallel = 1

    def __init__(self, model: Any, processor: Any, random_weights: bool = False) -> None:
        self.random_weights = random_weights
        self._model, self._processor = model, processor
        self._host = host_for(model)
        # Tokenizers of the Rust library refuse to be used by two threads at once.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        text = getattr(model.config, "text_config", model.config)
        self._longest = getattr(text, "max_position_embeddings", None)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._running: _Job | None = None
        self._preparing: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def check(self, methods: list[Method]) -> None:
        """Raise TokensieveError when methods cannot run on the model."""
        Run(self._model, self._host, methods)

    def start(self) -> None:
        """Start both threads."""
        self._stopping.clear()
        self._jobs = queue.SimpleQueue()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="tokensieve-prepare")
        self._thread = threading.Thread(target=self._work, name="tokensieve-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs at its next token, refuse what waits, and join the threads."""
        self._stopping.set()
        running = self._running
        if running is not None:
            running.cancelled.set()
        self._jobs.put(None)
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
        }

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Pieces of an answer, then one `Done`; see `Backend.generate`."""
        if self._preparing is None:
            raise HostError("The server is stopping; send the request to another.")
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        prompt = await loop.run_in_executor(self._preparing, self._prepare, request)
        job = _Job(request, prompt, loop, time.perf_counter() - begun)
        self._jobs.put(job)
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
        """Run jobs until told to stop; no error of a job ends the thread."""
        while (job := self._jobs.get()) is not None:
            if self._stopping.is_set():
                job.post(HostError("The server is stopping; send the request to another."))
                continue
            if job.cancelled.is_set():
                continue
            self._running = job
            try:
                job.post(self._answer(job))
            except Exception as error:
                job.post(error)
            finally:
                self._running = None
                del job
        while not self._jobs.empty():
            late = self._jobs.get()
            if late is not None:
                late.post(HostError("The server is stopping; send the request to another."))

    def _answer(self, job: _Job) -> Event:
        """Generate on the model's thread, posting pieces."""
        waited = time.perf_counter() - job.queued
        sampling = job.request.sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        text = TextStream(self._tokenizer, sampling.stop)
        watch = _Watch(job, text, end_ids(self._model))
        inputs = job.prompt.on(self._model)
        with Run(self._model, self._host, job.request.methods) as run, torch.inference_mode():
            self._model.generate(
                **inputs,
                **sampling.arguments(),
                streamer=watch,
                stopping_criteria=[watch],
                logits_processor=[FiniteLogits()],
            )
        rest = text.finish()
        if rest:
            job.post(Piece(rest))
        seconds = {"prepare": job.prepared, "queue": waited, **stage_seconds(run)}
        usage = Usage(row_tokens(run, inputs)[0], watch.count, seconds, job.prompt.notes)
        reason: Literal["stop", "length"] = "stop" if text.stopped or watch.ended else "length"
        return Done(reason, usage)


class _Job:
    """One request on its way through the model's thread."""

    def __init__(self, request: Generation, prompt: Prompt, loop: asyncio.AbstractEventLoop, prepared: float) -> None:
        self.request, self.prompt, self.prepared = request, prompt, prepared
        self.queued = time.perf_counter()
        self.cancelled = threading.Event()
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._loop = loop

    def post(self, event: Event | BaseException) -> None:
        """Hand an event to whoever waits for it."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop is closed: the server has ended and nobody waits.
            logger.debug("an answer came after the end of the server")


class _Watch:
    """Streamer and stopping criterion in one: sees every token, and ends the generation when it should."""

    def __init__(self, job: _Job, text: TextStream, ends: set[int]) -> None:
        self.count, self.ended = 0, False
        self._job, self._text, self._ends = job, text, ends
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called first with the prompt, then with every new token, already on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = value.flatten().tolist()
        self.count += len(ids)
        self.ended = ids[-1] in self._ends
        text = self._text.push(ids)
        if text:
            self._job.post(Piece(text))

    def end(self) -> None:
        """Nothing is left to do."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Whether to stop, for each row."""
        stop = self._text.stopped or self._job.cancelled.is_set()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)
