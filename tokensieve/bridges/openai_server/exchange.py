"""One chat request from its first byte to the last event of its answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import torch
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tokensieve.bridges.chat import Role, Turn
from tokensieve.bridges.openai_server.backend import Backend, Done, Event, Generation, Piece
from tokensieve.bridges.openai_server.errors import ApiError, ClientGone
from tokensieve.bridges.openai_server.gate import Gate
from tokensieve.bridges.openai_server.media import read_media
from tokensieve.bridges.openai_server.metrics import Metrics, Outcome
from tokensieve.bridges.openai_server.schema import AnswerFormat, ChatBody, MediaPart, TextPart, VideoPart, parse_body
from tokensieve.bridges.openai_server.settings import ServerSettings
from tokensieve.errors import HostError, SignalError, TokensieveError
from tokensieve.video import Clip

__all__ = ["Exchange", "Service", "authorize"]

logger = logging.getLogger("tokensieve")

# Bodies above this size are parsed in a thread, so that the event loop goes on.
_LARGE_BODY = 1 << 18
_DRAIN_SECONDS = 5.0
_DRAIN_BODIES = 4
_CLOSE = {"Connection": "close"}


@dataclass
class Service:
    """What all requests share."""

    backend: Backend
    settings: ServerSettings
    metrics: Metrics
    gate: Gate
    decoders: ThreadPoolExecutor


def authorize(headers: Headers, api_key: str | None) -> None:
    """Raise ApiError with status 401 unless the right key was sent, or none is needed."""
    if api_key is None:
        return
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
        raise ApiError(
            "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
            status=401,
            headers={"WWW-Authenticate": "Bearer", **_CLOSE},
        )


class Exchange(Response):
    """An ASGI response that reads the request itself, so that refusing costs nothing.

    Nothing of the body is read before the request has a ticket, and when the client goes away everything
    that was begun for it is cancelled.
    """

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self._streaming = self._sent = self._body_read = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        service = self._service
        outcome: Outcome = "failed"
        failure: ApiError | None = None
        try:
            headers = Headers(scope=scope)
            authorize(headers, service.settings.api_key)
            async with service.gate.admitted():
                body = await self._body(headers, receive)
                await self._unless_gone(receive, self._answer(body, scope, receive, send))
            outcome = "ok"
        except ClientGone:
            outcome = "cancelled"
        except asyncio.CancelledError:
            service.metrics.count("cancelled")
            raise
        except ApiError as error:
            failure = error
        except (HostError, torch.OutOfMemoryError, MemoryError) as error:
            failure = _server_error(error)
        except TokensieveError as error:
            failure = ApiError(str(error))
        except Exception:
            logger.exception("a request failed")
            failure = ApiError("The server failed on this request; its log says why.", status=500)
        if failure is not None:
            outcome = _outcome(failure.status)
            if not self._body_read and failure.status in (401, 413, 429):
                await self._drain(receive)
            await self._fail(failure, scope, receive, send)
        service.metrics.count(outcome)

    async def _unless_gone(self, receive: Receive, work: Awaitable[None]) -> None:
        """Do some work, but cancel it and raise ClientGone when the client disconnects before the answer is sent."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if self._sent:
                # Servers report a disconnect, too, when a response is complete.
                await asyncio.wait({working})
            gone = not working.done()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)
        if gone:
            raise ClientGone
        await working

    async def _body(self, headers: Headers, receive: Receive) -> ChatBody:
        """The body, read under limits of size and time."""
        settings = self._service.settings
        too_large = ApiError(
            f"The body is larger than the {settings.max_body} bytes accepted here; send a smaller clip.",
            status=413,
            headers=_CLOSE,
        )
        stated = headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > settings.max_body:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > settings.max_body:
                        raise too_large
                    if not message.get("more_body", False):
                        self._body_read = True
                        break
        except TimeoutError:
            raise ApiError(
                f"The body did not arrive within {settings.body_timeout:g} s; send it faster.",
                status=408,
                headers=_CLOSE,
            ) from None
        data = b"".join(chunks)
        return parse_body(data) if size < _LARGE_BODY else await asyncio.to_thread(parse_body, data)

    async def _drain(self, receive: Receive) -> None:
        """Let a refused body arrive, within limits: who is still sending when a connection closes sees no answer."""
        left = _DRAIN_BODIES * self._service.settings.max_body
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            logger.debug("a refused body was still arriving")

    async def _answer(self, body: ChatBody, scope: Scope, receive: Receive, send: Send) -> None:
        """Decode, generate and send."""
        service, settings = self._service, self._service.settings
        begun = time.perf_counter()
        if body.model not in (None, settings.model_name):
            raise ApiError(f"There is no model {body.model!r} here; use {settings.model_name!r}.", "model", status=404)
        method, retention, methods = settings.choose(body.method, body.retention)
        sampling = body.sampling(settings)
        if not service.backend.alive:
            raise ApiError("The model is not running; the server's log says why.", status=503)
        async with service.gate.place():
            waited = time.perf_counter() - begun
            chat = await self._read(body)
            read = time.perf_counter() - begun - waited
            request = Generation(chat, method, retention, methods, sampling, settings.max_prompt_tokens)
            form = AnswerFormat(f"chatcmpl-{uuid.uuid4().hex}", settings.model_name, method, retention)
            seconds = {"gate": waited, "media": read}
            async with aclosing(cast(Any, service.backend.generate(request))) as events:
                del request, chat
                first: Event = await anext(events)
                met = time.perf_counter() - begun
                # Nothing is sent before the first token, so that what is wrong with a request gives a status.
                rest = _chain(first, events)
                if body.stream:
                    done = await self._stream(rest, form, body, seconds, send)
                else:
                    pieces, done = await _collect(rest)
                    self._sent = True
                    await JSONResponse(form.whole(pieces, done, seconds))(scope, receive, send)
            service.metrics.answered(method, done.usage, seconds, met, time.perf_counter() - begun)

    async def _read(self, body: ChatBody) -> tuple[Turn, ...]:
        """The conversation with its clips decoded."""
        service, limits = self._service, self._service.settings.media
        settings = service.settings
        frames = body.frames or settings.frames
        if frames > settings.max_frames:
            raise ApiError(f"frames may be at most {settings.max_frames} here, not {frames}.", "frames")
        media = body.media
        length = sum(
            len(part.text) for message in body.messages for part in message.parts if isinstance(part, TextPart)
        )
        if length > settings.max_text:
            raise ApiError(f"A request may hold at most {settings.max_text} characters of text here, not {length}.")
        if len(media) > limits.max_clips:
            raise ApiError(f"A request may show at most {limits.max_clips} clips here, not {len(media)}.", "messages")
        cancelled, loop = threading.Event(), asyncio.get_running_loop()

        def read(part: MediaPart) -> Clip:
            if isinstance(part, VideoPart):
                return read_media(part.video_url.url, "video", limits, frames, body.fps, cancelled)
            return read_media(part.image_url.url, "image", limits, 1, None, cancelled)

        try:
            futures = [loop.run_in_executor(service.decoders, read, part) for part in media]
            clips = iter(await asyncio.gather(*futures))
        finally:
            cancelled.set()
        turns = []
        for message in body.messages:
            parts = [part.text if isinstance(part, TextPart) else next(clips) for part in message.parts]
            # What newer models call developer is the system prompt of the others.
            role: Role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, tuple(parts)))
        return tuple(turns)

    async def _stream(
        self, events: AsyncIterator[Event], form: AnswerFormat, body: ChatBody, seconds: dict[str, float], send: Send
    ) -> Done:
        """Send events as they come."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._streaming = True
        await _send_more(send, form.chunk({"role": "assistant", "content": ""}))
        done: Done | None = None
        async for event in events:
            if isinstance(event, Done):
                done = event
            else:
                await _send_more(send, form.chunk({"content": event.text}))
        assert done is not None
        await _send_more(send, form.chunk({}, done.reason, tokensieve=form.account(done.usage, seconds)))
        if body.stream_options is not None and body.stream_options.include_usage:
            await _send_more(send, form.usage_chunk(done.usage))
        await _send_more(send, b"data: [DONE]\n\n")
        self._sent = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return done

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an error; inside of a stream, as its last event."""
        if self._streaming:
            await _send_more(send, AnswerFormat.event(error.body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)


async def _chain(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for event in rest:
        yield event


async def _collect(events: AsyncIterator[Event]) -> tuple[str, Done]:
    """All text, and the end."""
    pieces: list[str] = []
    async for event in events:
        if isinstance(event, Piece):
            pieces.append(event.text)
        else:
            return "".join(pieces), event
    raise HostError("The model ended without an answer; try again.")


async def _send_more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _outcome(status: int) -> Outcome:
    """How a failed request is counted."""
    if status in (401, 429):
        return "unauthorized" if status == 401 else "busy"
    return "failed" if status >= 500 else "bad_request"


def _server_error(error: BaseException) -> ApiError:
    """An error of the model's side: what does not fit is the client's, the rest the server's."""
    if isinstance(error, SignalError):
        return ApiError(str(error))
    if isinstance(error, HostError):
        # Processors and chat templates refuse inputs that they cannot take; NaN and the like are our own.
        return ApiError(str(error), status=500 if "NaN" in str(error) else 503 if "stopping" in str(error) else 400)
    logger.error("the memory did not suffice for a request: %s", error)
    return ApiError(
        "The memory did not suffice; ask for fewer frames or a lower retention.",
        status=503,
        headers={"Retry-After": "10"},
    )
