"""The server under strain: a full queue, clients that go away, errors of the model, the end of the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_media import ask, data_url, video_part

from tokensieve.bridges.chat import Turn
from tokensieve.bridges.generation import RowTokens, Sampling
from tokensieve.core.registry import resolve
from tokensieve.errors import HostError, MethodError

pytest.importorskip("fastapi", reason="needs pip install 'tokensieve[serve]'")
from tokensieve.bridges.openai_server import Done, Event, Generation, Piece, TransformersBackend, Usage
from tokensieve.bridges.openai_server.text import TextStream

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class Scripted:
    """A backend that answers as a test says, and notes what becomes of each request."""

    name, parallel, random_weights, alive = "scripted", 1, True, True

    def __init__(self, error: BaseException | None = None, after: int = 0) -> None:
        self.error, self.after = error, after
        self.go = asyncio.Event()
        self.begun = self.ended = self.most = 0
        self._now = 0

    def check(self, methods: list[Any]) -> None:
        """Everything fits."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Words, and the error after some of them."""
        self.begun += 1
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self.go.wait()
            for word in range(3):
                if self.error is not None and word == self.after:
                    raise self.error
                yield Piece(f"{word} ")
            yield Done("stop", Usage(RowTokens(9, 3, 8, 2, 2), 3, {"prefill": 2.0}))
        finally:
            self._now -= 1
            self.ended += 1


def test_the_queue_is_bounded(serving: Callable[..., Any]) -> None:
    backend = Scripted()

    async def work(client: Any) -> Any:
        tasks = [asyncio.create_task(client.post(CHAT, json=HELLO)) for _ in range(12)]
        while sum(task.done() for task in tasks) < 12 - 5:
            await asyncio.sleep(0.01)
        metrics = (await client.get("/metrics")).text
        backend.go.set()
        return await asyncio.gather(*tasks), metrics, (await client.get("/metrics")).text

    answers, during, after = serving(work, backend=backend, queue=4, ahead=1)
    codes = [answer.status_code for answer in answers]
    assert codes == [200] * 5 + [429] * 7
    refused = answers[-1]
    assert refused.json()["error"]["type"] == "rate_limit_error" and "The queue is full" in refused.text
    assert int(refused.headers["retry-after"]) >= 1
    assert "tokensieve_requests_waiting 3.0" in during and "tokensieve_requests_running 2.0" in during
    assert "tokensieve_requests_waiting 0.0" in after and "tokensieve_requests_running 0.0" in after
    assert 'tokensieve_requests_total{outcome="busy"} 7.0' in after
    assert (backend.begun, backend.ended, backend.most) == (5, 5, 2)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MethodError("One sentence."), 400, "One sentence."),
        (HostError("The model computes NaN."), 500, "The model computes NaN."),
        (torch.OutOfMemoryError("cuda:0 secret detail"), 503, "memory did not suffice"),
        (ZeroDivisionError("secret detail"), 500, "its log says why"),
    ],
)
def test_errors_of_the_model(serving: Callable[..., Any], error: Exception, status: int, message: str) -> None:
    async def work(client: Any) -> Any:
        backend.go.set()
        early = await client.post(CHAT, json=HELLO)
        backend.after = 2
        return early, await client.post(CHAT, json={**HELLO, "stream": True})

    backend = Scripted(error)
    early, late = serving(work, backend=backend)
    assert early.status_code == status and message in early.json()["error"]["message"]
    assert "secret" not in early.text + late.text
    # A stream that has begun can only end with an event that says what went wrong, and without the final mark.
    events = [line.removeprefix("data: ") for line in late.text.split("\n\n") if line]
    assert late.status_code == 200 and message in json.loads(events[-1])["error"]["message"]
    assert "[DONE]" not in events


def exchange(app: Any, body: dict[str, Any], gone: asyncio.Event) -> Callable[[], Any]:
    """An ASGI request whose client disconnects when told."""
    sent: list[dict[str, Any]] = []
    inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def run() -> list[dict[str, Any]]:
        await app(scope, receive, send)
        return sent

    return run


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_work(serving: Callable[..., Any], stream: bool) -> None:
    backend = Scripted()

    async def work(client: Any) -> Any:
        gone = asyncio.Event()
        requests = [exchange(client.app, {**HELLO, "stream": stream}, gone) for _ in range(3)]
        tasks = [asyncio.create_task(request()) for request in requests]
        while not backend.begun:
            await asyncio.sleep(0.01)
        gone.set()
        sent = await asyncio.wait_for(asyncio.gather(*tasks), 30)
        backend.go.set()
        answer = await client.post(CHAT, json=HELLO)
        return sent, answer, (await client.get("/metrics")).text

    sent, answer, metrics = serving(work, backend=backend, ahead=0, queue=2)
    assert sent == [[], [], []]
    assert answer.status_code == 200
    assert (backend.begun, backend.ended) == (2, 2)
    assert 'tokensieve_requests_total{outcome="cancelled"} 3.0' in metrics


def test_a_finished_stream_is_not_taken_for_a_disconnect(serving: Callable[..., Any]) -> None:
    backend = Scripted()

    async def work(client: Any) -> Any:
        backend.go.set()
        gone = asyncio.Event()
        request = asyncio.create_task(exchange(client.app, {**HELLO, "stream": True}, gone)())
        sent = await request
        gone.set()
        return sent, (await client.get("/metrics")).text

    sent, metrics = serving(work, backend=backend)
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert 'tokensieve_requests_total{outcome="ok"} 1.0' in metrics


def generation(tokens: int, method: str = "vidcom2") -> Generation:
    chat = (Turn("user", ("Hello",)),)
    return Generation(chat, method, 0.25, resolve(method, retention=0.25), Sampling(max_new_tokens=tokens))


def test_closing_the_iterator_ends_generation_at_the_next_token(loaded: tuple[Any, Any]) -> None:
    backend = TransformersBackend(*loaded)

    async def work() -> tuple[float, list[Event]]:
        backend.start()
        events = backend.generate(generation(20_000))
        assert isinstance(await anext(events), Piece)
        await events.aclose()
        begun = time.perf_counter()
        later = [event async for event in backend.generate(generation(3))]
        return time.perf_counter() - begun, later

    seconds, later = asyncio.run(work())
    backend.stop()
    assert isinstance(later[-1], Done) and later[-1].usage.new_tokens == 3
    assert seconds < 15
    assert not backend.alive


def test_a_cancelled_request_never_reaches_the_model(loaded: tuple[Any, Any]) -> None:
    backend = TransformersBackend(*loaded)

    async def work() -> list[Event]:
        backend.start()
        first = backend.generate(generation(2000))
        await anext(first)
        waiting = asyncio.create_task(anext(backend.generate(generation(20_000))))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await first.aclose()
        return [event async for event in backend.generate(generation(2))]

    events = asyncio.run(asyncio.wait_for(work(), 60))
    backend.stop()
    assert isinstance(events[-1], Done)


def test_errors_do_not_end_the_worker(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(*loaded)
    model, _ = loaded

    async def work() -> list[Any]:
        backend.start()
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", lambda **inputs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await anext(backend.generate(generation(2)))
        return [event async for event in backend.generate(generation(2))]

    events = asyncio.run(work())
    backend.stop()
    assert isinstance(events[-1], Done)
    with pytest.raises(HostError, match="stopping"):
        asyncio.run(anext_of(backend))


async def anext_of(backend: TransformersBackend) -> Event:
    return await anext(backend.generate(generation(2)))


def test_text_comes_in_whole_characters(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    text = "naïve 東京 🙂 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for stop in ((), ("never",)):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.push([token]) for token in ids]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    stream = TextStream(tokenizer, ("京 🙂", "xyz"))
    assert "".join(stream.push([token]) for token in ids) + stream.finish() == "naïve 東"
    assert stream.stopped and stream.push(ids) == "" and stream.finish() == ""


@pytest.fixture
def process(tmp_path: Path) -> Any:
    """``tokensieve serve`` as a process of its own: the process and its address."""
    command = [sys.executable, "-m", "tokensieve.cli", "serve", "--port", "0", "--frames", "4", "--no-progress"]
    command += ["--max-body", "1000000"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stderr is not None
    try:
        assert "the bundled model answers" in running.stderr.readline()
        line = running.stderr.readline()
        assert "note: serving bundled at http://127.0.0.1:" in line
        yield running, line.partition("http://")[2].partition("/v1")[0], scratch
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_a_real_process(process: Any, video: Path) -> None:
    httpx = pytest.importorskip("httpx", reason="needs httpx to talk to the server")
    running, address, scratch = process
    base = f"http://{address}"
    body = ask(video_part(data_url(video)))
    whole = httpx.post(base + CHAT, json=body, timeout=120).json()
    assert whole["tokensieve"]["visual"] < whole["tokensieve"]["visual_before"]
    with httpx.stream("POST", base + CHAT, json={**body, "stream": True}, timeout=120) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"

    # Clients that go away before their answer, in the middle of a body, or after garbage.
    host, port = address.split(":")
    asked = httpx.Request("POST", base + CHAT, json={**body, "stream": True})
    head = "".join(f"{name}: {value}\r\n" for name, value in asked.headers.items())
    request = f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + asked.content
    for sent in (
        request,
        b"GARBAGE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(sent)
    large = httpx.post(base + CHAT, content=b" " * 3_000_000, timeout=120)
    assert large.status_code == 413 and "larger than the 1000000 bytes" in large.text
    after = httpx.post(base + CHAT, json=body, timeout=120).json()
    assert after["choices"][0]["message"] == whole["choices"][0]["message"]
    deadline = time.monotonic() + 60
    while 'outcome="cancelled"} 2.0' not in (text := httpx.get(base + "/metrics").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    assert list(scratch.iterdir()) == []
    running.send_signal(signal.SIGINT)
    assert running.wait(90) == 0
    assert list(scratch.iterdir()) == []
    # The one line is about the garbage.
    assert running.stderr.read() == "WARNING:  Invalid HTTP request received.\n"
