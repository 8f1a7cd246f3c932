"""Requests that wait together are answered in one batch, each as if it were alone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_media import ask, data_url, video_part

from tokensieve.bridges.chat import Turn
from tokensieve.bridges.generation import Sampling
from tokensieve.core.registry import resolve
from tokensieve.errors import HostError, TokensieveError
from tokensieve.hosts import tiny
from tokensieve.video import Clip, read_clip

pytest.importorskip("fastapi", reason="needs pip install 'tokensieve[serve]'")
from tokensieve.bridges.openai_server import Done, Generation, Piece, TransformersBackend
from tokensieve.bridges.openai_server.line import Line
from tokensieve.bridges.openai_server.rows import Job, Sampler
from tokensieve.prompt import Prompt

CHAT = "/v1/chat/completions"
QUESTIONS = ("What moves?", "Which shape is in front of all the others at the end?", "Where to?", "How many are there?")


@pytest.fixture(scope="module")
def clips(video: Path, other_video: Path) -> list[Clip]:
    """Two clips of the same length."""
    return [read_clip(video, 4), read_clip(other_video, 4)]


def request(
    clip: Clip | None, question: str, method: str = "vidcom2", retention: float = 0.25, **sampling: Any
) -> Generation:
    parts = (question,) if clip is None else (clip, question)
    methods = resolve(method, retention=retention)
    return Generation((Turn("user", parts),), method, retention, methods, Sampling(**{"max_new_tokens": 6, **sampling}))


async def collect(backend: TransformersBackend, one: Generation) -> tuple[str, Done]:
    """Text and end of an answer."""
    text = ""
    async for event in backend.generate(one):
        if isinstance(event, Done):
            return text, event
        text += event.text
    raise AssertionError("no end")


def answers(loaded: Any, requests: Sequence[Generation], size: int, behind: bool = True) -> list[tuple[str, Done]]:
    """What a backend answers when all requests wait behind a first one."""
    backend = TransformersBackend(*loaded, batch_size=size)

    async def work() -> list[tuple[str, Done]]:
        backend.start()
        first = backend.generate(request(None, "Hello", max_new_tokens=20_000))
        await anext(first)
        tasks = [asyncio.create_task(collect(backend, one)) for one in requests]
        while len(backend._line._jobs) < len(requests):
            await asyncio.sleep(0.01)
        await first.aclose()
        return await asyncio.gather(*tasks)

    try:
        return asyncio.run(asyncio.wait_for(work(), 300))
    finally:
        backend.stop()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", ["vidcom2", "random", "fastv", "none", "holitom"])
def test_answers_in_a_batch_are_those_alone(family: str, method: str, clips: list[Clip]) -> None:
    loaded = tiny.load(family)
    requests = [
        request(clips[number % 2], question, method, 0.3, max_new_tokens=4 + number)
        for number, question in enumerate(QUESTIONS)
    ]
    alone, together = answers(loaded, requests, 1), answers(loaded, requests, 4)
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert [done.usage.batch for _, done in together] == [4] * 4 and alone[0][1].usage.batch == 1
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert (one.reason, one.usage.tokens, one.usage.new_tokens) == (
            other.reason,
            other.usage.tokens,
            other.usage.new_tokens,
        )


def test_every_row_has_its_own_sampling(loaded: tuple[Any, Any], clips: list[Clip]) -> None:
    greedy = request(clips[0], QUESTIONS[0], max_new_tokens=8)
    ((text, _),) = answers(loaded, [greedy], 1)
    stop = text[len(text) // 2 :]
    requests = [
        greedy,
        request(clips[0], QUESTIONS[0], max_new_tokens=8, temperature=1.5, seed=1),
        request(clips[0], QUESTIONS[0], max_new_tokens=12, temperature=1.5, seed=2, top_k=20),
        request(clips[0], QUESTIONS[0], max_new_tokens=8, stop=(stop,)),
        request(clips[1], QUESTIONS[2], max_new_tokens=3, temperature=0.7, seed=1, top_p=0.5),
    ]
    alone, together = answers(loaded, requests, 1), answers(loaded, requests, 8)
    assert [found for found, _ in together] == [found for found, _ in alone]
    assert {done.usage.batch for _, done in together} == {5}
    assert [done.usage.new_tokens for _, done in together][1:3] == [8, 12]
    assert together[3][0] == text[: text.index(stop)] and together[3][1].reason == "stop"
    assert len({found for found, _ in together}) == 5


def test_only_what_fits_shares_a_batch(loaded: tuple[Any, Any], clips: list[Clip], picture: Path) -> None:
    still = read_clip(picture, 1)
    requests = [
        request(clips[0], "What?"),
        request(clips[0], "What?", retention=0.5),
        request(still, "What?"),
        request(clips[1], "Where?"),
        request(clips[0], "What?", "uniform"),
        request(None, "What?"),
        request(clips[0], "many words " * 60),
        request(None, "Who?"),
    ]
    alone, together = answers(loaded, requests, 1), answers(loaded, requests, 8)
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert [done.usage.batch for _, done in together] == [2, 1, 1, 2, 1, 2, 1, 2]


def test_a_client_that_leaves_does_not_hurt_its_batch(loaded: tuple[Any, Any], clips: list[Clip]) -> None:
    requests = [request(clips[0], question, max_new_tokens=40) for question in QUESTIONS]
    alone = [text for text, _ in answers(loaded, requests, 1)]
    backend = TransformersBackend(*loaded, batch_size=4)

    async def leave(one: Generation) -> None:
        events = backend.generate(one)
        assert isinstance(await anext(events), Piece)
        await events.aclose()

    async def work() -> Any:
        backend.start()
        first = backend.generate(request(None, "Hello", max_new_tokens=20_000))
        await anext(first)
        long = request(clips[0], QUESTIONS[1], max_new_tokens=20_000)
        tasks = [asyncio.create_task(collect(backend, one)) for one in (requests[0], requests[2], requests[3])]
        leaving = asyncio.create_task(leave(long))
        while len(backend._line._jobs) < 4:
            await asyncio.sleep(0.01)
        await first.aclose()
        begun = time.perf_counter()
        await leaving
        found = await asyncio.gather(*tasks)
        # The batch has ended with the others, not after 20 000 tokens.
        later = await collect(backend, request(None, "Hello", max_new_tokens=2))
        return found, later, time.perf_counter() - begun

    found, later, seconds = asyncio.run(asyncio.wait_for(work(), 120))
    backend.stop()
    assert [text for text, _ in found] == [alone[0], alone[2], alone[3]]
    assert [done.usage.batch for _, done in found] == [4, 4, 4] and later[1].usage.new_tokens == 2
    assert seconds < 60


def test_a_batch_that_fails_is_answered_one_by_one(
    loaded: tuple[Any, Any], clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    requests = [request(clips[0], question) for question in QUESTIONS[:3]]
    alone = [text for text, _ in answers(loaded, requests, 1)]
    whole, sizes = model.generate, []

    def generate(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("too much at once")
        return whole(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    found = answers(loaded, requests, 4)
    assert [text for text, _ in found] == alone
    assert sizes == [1, 3, 1, 1, 1] and [done.usage.batch for _, done in found] == [1, 1, 1]


def test_nan_in_one_row_fails_that_row_alone(loaded: tuple[Any, Any], clips: list[Clip]) -> None:
    requests = [request(clips[0], question) for question in QUESTIONS[:3]]
    alone = [text for text, _ in answers(loaded, requests, 1)]
    backend = TransformersBackend(*loaded, batch_size=4)

    def spoil(module: Any, args: Any, output: Any) -> None:
        if len(output.logits) == 3:
            output.logits[1] = torch.nan

    async def work() -> Any:
        backend.start()
        first = backend.generate(request(None, "Hello", max_new_tokens=20_000))
        await anext(first)
        tasks = [asyncio.create_task(collect(backend, one)) for one in requests]
        while len(backend._line._jobs) < 3:
            await asyncio.sleep(0.01)
        await first.aclose()
        return await asyncio.gather(*tasks, return_exceptions=True)

    handle = loaded[0].register_forward_hook(spoil)
    try:
        found = asyncio.run(asyncio.wait_for(work(), 120))
    finally:
        handle.remove()
        backend.stop()
    assert isinstance(found[1], HostError) and "NaN" in str(found[1])
    assert [found[0][0], found[2][0]] == [alone[0], alone[2]]


def test_stopping_ends_all_rows_with_a_reason(loaded: tuple[Any, Any], clips: list[Clip]) -> None:
    backend = TransformersBackend(*loaded, batch_size=2)

    async def work() -> Any:
        backend.start()
        tasks = [
            asyncio.create_task(collect(backend, request(clips[0], "What?", max_new_tokens=20_000))) for _ in range(5)
        ]
        await asyncio.sleep(1)
        await asyncio.to_thread(backend.stop)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(work(), 60))
    assert all(isinstance(error, HostError) and "stopping" in str(error) for error in found)
    assert not backend.alive


def test_a_server_batches_and_says_so(serving: Callable[..., Any], loaded: tuple[Any, Any], video: Path) -> None:
    part = video_part(data_url(video))

    async def work(client: Any) -> Any:
        async def one(number: int) -> Any:
            body = ask(part, question=QUESTIONS[number % 4], max_tokens=30)
            return (await client.post(CHAT, json=body)).json()

        alone = [await one(number) for number in range(4)]
        together = await asyncio.gather(*(one(number) for number in range(16)))
        models = (await client.get("/v1/models")).json()
        return alone, together, models, (await client.get("/metrics")).text

    backend = TransformersBackend(*loaded, batch_size=4)
    alone, together, models, metrics = serving(work, backend=backend)
    texts = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert [answer["choices"][0]["message"]["content"] for answer in together] == texts * 4
    sizes = Counter(answer["tokensieve"]["batch"] for answer in together)
    assert max(sizes) == 4 and set(sizes) <= {1, 2, 3, 4}
    assert models["data"][0]["tokensieve"]["batch_size"] == 4
    assert "tokensieve_batch_size_count 20.0" in metrics
    assert f"tokensieve_batch_size_sum {4 + sum(size * count for size, count in sizes.items()):.1f}" in metrics


def test_a_batch_needs_a_row(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(TokensieveError, match="batch_size must be 1 or more, not 0"):
        TransformersBackend(*loaded, batch_size=0)


class Still:
    """An event loop that nobody runs."""

    def call_soon_threadsafe(self, call: Any, *arguments: Any) -> None:
        """Drop it."""


def job(tokens: int, method: str = "none", retention: float = 1.0) -> Job:
    ids = torch.ones(1, tokens, dtype=torch.long)
    prompt = Prompt({"input_ids": ids, "attention_mask": ids}, False)
    return Job(Generation((), method, retention, [], Sampling()), prompt, Still(), 0.0)  # type: ignore[arg-type]


def test_the_line_is_fair_and_leaves_cancelled_jobs_out() -> None:
    line = Line()
    jobs = [job(10), job(10, "x"), job(11), job(16), job(15), job(10, "x"), job(10), job(9)]
    assert all(line.put(one) for one in jobs)
    jobs[2].cancelled.set()
    assert line.take(3) == [jobs[0], jobs[4], jobs[6]]
    # Whoever has waited longest is next, whatever the others are.
    assert line.take(3) == [jobs[1], jobs[5]]
    assert line.take(1) == [jobs[3]]
    last = job(10)
    line.put(last)
    assert line.close() == [jobs[3], jobs[7], last]
    assert line.take(4) == [] and not line.put(job(3))


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -4.0]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    number = 20_000
    for settings, logits in (
        ({"temperature": 1.0}, scores),
        ({"temperature": 0.5}, scores / 0.5),
        ({"temperature": 1.0, "top_k": 2}, torch.tensor([[2.0, 1.0, *[-torch.inf] * 3]])),
        ({"temperature": 1.0, "top_p": 0.8}, torch.tensor([[2.0, 1.0, *[-torch.inf] * 3]])),
    ):
        sampler = Sampler(Sampling(seed=3, **settings))
        drawn = torch.stack([sampler(ids, scores)[0].argmax() for _ in range(number)])
        found = torch.bincount(drawn, minlength=5) / number
        wanted = logits[0].softmax(0)
        # Four standard errors of a share.
        assert bool(((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / number).sqrt()).all()), settings
    assert Sampler(Sampling())(ids, scores) is scores
    free = [Sampler(Sampling(temperature=1.0))(ids, scores) for _ in range(2)]
    assert not torch.equal(*free)
