"""The load benchmark in miniature, against a server in this process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("httpx", reason="needs httpx to talk to the server")
pytest.importorskip("fastapi", reason="needs pip install 'tokensieve[serve]'")

from benchmarks import serve_load, served


@pytest.mark.slow
def test_rounds_and_bad_clients(serving: Callable[..., Any], tmp_path: Path) -> None:
    from tokensieve.bridges.openai_server import MediaLimits

    arguments = argparse.Namespace(requests=9, concurrency=3, method="uniform", burst=12)
    clips = served.write_clips(tmp_path)
    assert len(clips) == served.CLIPS

    async def work(client: Any) -> Any:
        rounds = []
        for method in ("none", "uniform"):
            started = serve_load.Round("here", method, 1)
            rounds.append(await serve_load.load(client, psutil.Process(), arguments, started, clips))
        return rounds, await serve_load.misbehave(client, arguments, clips)

    options = {"method": "uniform", "allowed_methods": ("none",), "queue": 6, "max_body": 1 << 20}
    (full, half), trouble = serving(work, **options, media=MediaLimits(root=tmp_path))
    for one in (full, half):
        assert (one.right, one.wrong, len(one.first), len(one.memory)) == (9, [], 9, 4)
        assert one.seconds > 0 and one.to_dict()["requests_per_second"] > 0
    assert full.visual[0] == full.visual[1] == half.visual[0] == 4 * half.visual[1]
    row = half.row(9)
    assert len(row) == len(serve_load.COLUMNS)
    assert (row[0], row[1], row[3], row[10]) == ("here", "uniform", "25 of 100 (25.0 %)", "9 of 9")
    assert half.processor > 0 and half.together == [1] * 9

    outcomes = trouble["outcomes"]
    assert outcomes["garbage"] == {"400": 1} and outcomes["body of 2 MiB where 1 MiB is allowed"] == {"413": 1}
    assert outcomes["disconnect after the first event"] == {"left after 200": 1}
    burst = outcomes["12 at once"]
    assert set(burst) == {"200", "429"} and sum(burst.values()) == 12
    assert trouble["answer_unchanged"]
    assert trouble["counted"]["busy"] == burst["429"] and trouble["counted"]["failed"] == 0


def test_answers_that_are_lost_or_wrong_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    # Three answers to requests that come alone, then those of the round, the last of which is lost.
    told = iter(["right"] * 3 + ["right", "wrong"])

    async def ask(client: Any, request: Any) -> Any:
        text = next(told, None)
        if text is None:
            raise RuntimeError("500 failed")
        return text, {"visual_before": 4, "visual": 1, "batch": 2}, 0.5, 1.0

    monkeypatch.setattr(serve_load, "ask", ask)
    monkeypatch.setattr(serve_load, "QUESTIONS", ("What?",))
    arguments = argparse.Namespace(requests=3, concurrency=1)
    found = asyncio.run(
        serve_load.load(None, psutil.Process(), arguments, serve_load.Round("here", "none", 1), ["a", "b", "c"])
    )
    assert (found.right, found.together) == (1, [2, 2])
    assert found.wrong == ["1: 'wrong' instead of 'right'", "2: RuntimeError 500 failed"]
