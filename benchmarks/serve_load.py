"""The server under load: throughput, time to first token, memory, right answers, and clients that behave badly.

    python -m benchmarks.serve_load [--quick] [--requests 200] [--concurrency 32] [--retention 0.25]
    make test-vllm && .venv-vllm/bin/python -m benchmarks.serve_load --engine vllm --keep

`tokensieve serve` runs as a process of its own on loopback, with a small LLaVA-OneVision of random weights and the
published layout of 196 tokens per frame. The same requests (clips under the media root, streamed greedy answers)
are sent without compression and with it, in turns; every answer is compared with the one that the same
request got alone. Then come clients that disconnect in the middle, send garbage or oversized bodies, or all
come at once, and the requests of the beginning must still get their answers. All that is done for every server:
transformers that answers one request at a time, the same with batches, and vLLM. An engine of vLLM has one method
for its life, so there two servers run one after the other instead of in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import httpx
import psutil

from benchmarks.results import RESULTS, SHARED, machine, show, write
from benchmarks.served import CLIPS, FRAMES, processor_seconds, resident, server, write_clips
from tokensieve.measure.text import in_bytes, in_percent, in_seconds

__all__ = ["main"]

NEW_TOKENS = 8
QUESTIONS = ("What moves?", "Which shape is in front of all the others at the end of the clip?")
COLUMNS = (
    "server",
    "method",
    "round",
    "visual tokens",
    "requests/s",
    "TTFT p50",
    "TTFT p95",
    "whole p95",
    "processor per request",
    "answers per call",
    "right answers",
    "server memory",
)
NOTES = (
    SHARED,
    "TTFT: at the client, from sending the request to the first text; under full load it is mostly waiting.",
    "processor per request: processor time of the server's processes over the round, divided by the answers.",
    "answers per call: how many requests the model answered together, mean over the answers; of vLLM not known.",
    "right answers: equal to the answer that the same request got alone, all others or lost ones missing.",
    "server memory: resident set at 25, 50, 75 and 100 % of the requests of the round.",
    f"Client and server share the processor. The requests show {CLIPS} clips: vLLM keeps prepared inputs, features and "
    "prefixes of clips that come again (its defaults), the server on transformers computes every request anew.",
    "Rounds of transformers are interleaved; vLLM runs without and with the method one after the other.",
)


@dataclass
class Round:
    """What one round of load gave."""

    server: str
    method: str
    number: int
    seconds: float = 0.0
    processor: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    visual: tuple[int, int] = (0, 0)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        derived = {
            "requests_per_second": len(self.whole) / self.seconds,
            "first_p50": _share(self.first, 50),
            "first_p95": _share(self.first, 95),
            "whole_p95": _share(self.whole, 95),
        }
        return vars(self) | derived

    def row(self, requests: int) -> tuple[str, ...]:
        """Cells of the table."""
        before, after = self.visual
        return (
            self.server,
            self.method,
            str(self.number),
            f"{after} of {before} ({in_percent(after / before)})",
            f"{len(self.whole) / self.seconds:.2f}",
            in_seconds(_share(self.first, 50)),
            in_seconds(_share(self.first, 95)),
            in_seconds(_share(self.whole, 95)),
            in_seconds(self.processor / max(1, len(self.whole))),
            f"{fmean(self.together):.1f}" if self.together else "-",
            f"{self.right} of {requests}",
            ", ".join(in_bytes(value) for value in self.memory),
        )


def _share(values: Sequence[float], percent: int) -> float:
    """A percentile; NaN of nothing."""
    if not values:
        return nan
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def body(number: int, clips: Sequence[str], method: str) -> dict[str, Any]:
    """The request of a number."""
    content = [
        {"type": "video_url", "video_url": {"url": clips[number % len(clips)]}},
        {"type": "text", "text": QUESTIONS[number // len(clips) % len(QUESTIONS)]},
    ]
    message = {"role": "user", "content": content}
    return {"messages": [message], "method": method, "max_tokens": NEW_TOKENS, "stream": True}


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> tuple[str, dict[str, Any], float, float]:
    """Text, account, seconds to the first text and in all of a streamed answer."""
    begun, first, text, account = time.perf_counter(), 0.0, "", None
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            piece = event["choices"][0]["delta"].get("content", "")
            first = first or (time.perf_counter() - begun if piece else 0.0)
            text += piece
            account = event.get("tokensieve", account)
    if account is None:
        raise RuntimeError("the stream broke off")
    return text, account, first, time.perf_counter() - begun


async def load(
    client: httpx.AsyncClient, process: psutil.Process, arguments: argparse.Namespace, found: Round, clips: list[str]
) -> Round:
    """Send all requests of a round, so many at a time."""
    truth = [
        (await ask(client, body(number, clips, found.method)))[0]
        for number in range(min(arguments.requests, len(clips) * len(QUESTIONS)))
    ]
    waiting = iter(range(arguments.requests))
    marks = {max(1, round(arguments.requests * quarter / 4)) for quarter in (1, 2, 3, 4)}
    done = 0

    async def client_loop() -> None:
        nonlocal done
        for number in waiting:
            try:
                text, account, first, whole = await ask(client, body(number, clips, found.method))
            except (RuntimeError, httpx.HTTPError) as error:
                found.wrong.append(f"{number}: {type(error).__name__} {error}")
            else:
                found.first.append(first)
                found.whole.append(whole)
                found.together += [account["batch"]] if "batch" in account else []
                found.visual = (account["visual_before"], account["visual"])
                if text == truth[number % len(truth)]:
                    found.right += 1
                else:
                    found.wrong.append(f"{number}: {text!r} instead of {truth[number % len(truth)]!r}")
            done += 1
            if done in marks:
                found.memory.append(resident(process))

    begun, used = time.perf_counter(), processor_seconds(process)
    await asyncio.gather(*(client_loop() for _ in range(arguments.concurrency)))
    found.seconds, found.processor = time.perf_counter() - begun, processor_seconds(process) - used
    return found


async def misbehave(client: httpx.AsyncClient, arguments: argparse.Namespace, clips: list[str]) -> dict[str, Any]:
    """What clients that behave badly get, by kind; and whether a good request is still answered."""
    number, method = arguments.requests // 5 or 1, arguments.method
    good = body(0, clips, method)
    before = (await ask(client, good))[0]

    async def leave() -> str:
        async with client.stream("POST", "/v1/chat/completions", json={**good, "max_tokens": 500}) as response:
            if response.status_code == 200:
                await anext(response.aiter_lines())
            return f"left after {response.status_code}"

    async def send(content: bytes) -> str:
        try:
            return str((await client.post("/v1/chat/completions", content=content)).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__

    async def several(call: Callable[[], Awaitable[str]], count: int) -> dict[str, int]:
        return dict(Counter(await asyncio.gather(*(call() for _ in range(count)))))

    small = json.dumps({**good, "stream": False}).encode()
    outcomes = {
        "disconnect after the first event": await several(leave, number),
        "garbage": await several(lambda: send(b"\x00garbage"), number),
        "body of 2 MiB where 1 MiB is allowed": await several(lambda: send(b" " * (2 << 20)), number),
        f"{arguments.burst} at once": await several(lambda: send(small), arguments.burst),
    }
    after = (await ask(client, good))[0]
    metrics = (await client.get("/metrics")).text
    counted = {
        line.partition('outcome="')[2].partition('"')[0]: int(float(line.split()[-1]))
        for line in metrics.splitlines()
        if line.startswith("tokensieve_requests_total")
    }
    return {"outcomes": outcomes, "answer_unchanged": before == after, "counted": counted}


async def measure(
    label: str,
    address: str,
    process: psutil.Process,
    arguments: argparse.Namespace,
    clips: list[str],
    methods: Sequence[str],
) -> tuple[list[Round], dict[str, Any]]:
    """All rounds, then the bad clients of the compressed server."""
    limits = httpx.Limits(max_connections=arguments.burst + 64, max_keepalive_connections=arguments.concurrency)
    async with httpx.AsyncClient(base_url=address, timeout=900, limits=limits) as client:
        rounds = []
        for number in range(1, arguments.rounds + 1):
            for method in methods:
                rounds.append(await load(client, process, arguments, Round(label, method, number), clips))
        if arguments.method not in methods:
            return rounds, {}
        trouble = await misbehave(client, arguments, clips)
        trouble["memory_at_the_end"] = resident(process)
        return rounds, trouble


def run_server(arguments: argparse.Namespace, engine: str, batch: int) -> dict[str, Any]:
    """All that is measured on one server, with the cells of its tables."""
    label = f"{engine}, batch {batch}"
    together = [("none", arguments.method)] if engine == "transformers" else [("none",), (arguments.method,)]
    rounds: list[Round] = []
    trouble: dict[str, Any] = {}
    for methods in together:
        with tempfile.TemporaryDirectory(prefix="tokensieve-load-") as place:
            folder = Path(place)
            clips = write_clips(folder)
            with server(folder, arguments, engine, batch, methods) as (address, process):
                more, trouble = asyncio.run(measure(label, address, process, arguments, clips, methods))
                rounds += more
    bad = [(kind, ", ".join(f"{key}: {n}" for key, n in got.items())) for kind, got in trouble["outcomes"].items()]
    bad.append(("a good request afterwards", "same answer" if trouble["answer_unchanged"] else "ANOTHER ANSWER"))
    bad.append(("server memory afterwards", in_bytes(trouble["memory_at_the_end"])))
    return {
        "label": label,
        "machine": machine(),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("output", "keep")},
        "rounds": [one.to_dict() for one in rounds],
        "trouble": trouble,
        "rows": [one.row(arguments.requests) for one in rounds],
        "bad": [(label, *row) for row in bad],
    }


def report(servers: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print and write the tables of all servers."""
    title = (
        f"Server under load: {arguments.requests} requests, {arguments.concurrency} at a time, {FRAMES} frames of 196 "
        f"tokens, {NEW_TOKENS} new tokens, retention {arguments.retention:g}"
    )
    rows = [row for one in servers for row in one["rows"]]
    bad = [row for one in servers for row in one["bad"]]
    columns = ("server", "clients", "what they got")
    show(title, COLUMNS, rows)
    show("Clients that behave badly", columns, bad)
    sections = [("", COLUMNS, rows), ("Clients that behave badly", columns, bad)]
    payload = {"machine": servers[0]["machine"], "servers": servers}
    print(f"written: {write(arguments.output, 'serve_load', payload, title, sections, NOTES)}")


def kept(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Servers of earlier runs, with --keep."""
    path = arguments.output / "serve_load.json"
    return list(json.loads(path.read_text())["servers"]) if arguments.keep and path.is_file() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, 1 when an answer was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--batch-size", type=int, nargs="+", help="a server for each: 1 4, of vLLM 16 unless given")
    parser.add_argument("--method", default="vidcom2")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--burst", type=int, default=1000, help="requests that come at once in the end")
    parser.add_argument("--quick", action="store_true", help="24 requests, 8 at a time, one round, a burst of 60")
    parser.add_argument("--keep", action="store_true", help="keep other servers' results of an earlier run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.requests, arguments.concurrency, arguments.rounds, arguments.burst = 24, 8, 1, 60
    sizes = arguments.batch_size or ([1, 4] if arguments.engine == "transformers" else [16])
    earlier, found = kept(arguments), []
    for size in sizes:
        found.append(run_server(arguments, arguments.engine, size))
        new = {one["label"] for one in found}
        # Written after every server: what comes later may take long or fail.
        report([one for one in earlier if one["label"] not in new] + found, arguments)
    wrong = [text for one in found for round_ in one["rounds"] for text in round_["wrong"]]
    for text in wrong[:10]:
        print(text)
    return 1 if wrong or not all(one["trouble"]["answer_unchanged"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
