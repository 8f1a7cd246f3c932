"""``tokensieve serve`` on the engine, as its own process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bridge_media import ask, data_url, video_part, write_video
from engine_pair import TEXT

import tokensieve
from tokensieve.hosts import tiny
from tokensieve.load import load_model
from tokensieve.prompt import build_prompt
from tokensieve.video import read_clip

FRAMES, RETENTION, LIMIT = 4, 0.5, 180
METHOD = "divprune"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough that transformers numbers the text behind it as the engine does."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", FRAMES, (112, 168))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The command with the tiny Qwen2.5-VL; it must end at an interrupt."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = ["serve", str(tiny.cached("qwen2_5_vl", text=TEXT)), "--port", str(port)]
    words += ["--method", METHOD, "--retention", str(RETENTION), "--frames", str(FRAMES), "--dtype", "float32"]
    for option in ("enforce_eager=true", "max_model_len=2048"):
        words += ["--engine-option", option]
    log = tmp_path_factory.mktemp("server") / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "tokensieve.cli", *words],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT) as client:
            deadline = time.monotonic() + LIMIT
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield client
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()


def send(client: httpx.Client, clip: Path, **fields: Any) -> httpx.Response:
    """One request about the clip."""
    return client.post("/v1/chat/completions", json=ask(video_part(data_url(clip)), **fields))


def test_the_answer_is_that_of_transformers(server: httpx.Client, clip: Path) -> None:
    assert server.get("/health").json()["backend"] == "vllm"
    response = send(server, clip)
    assert response.status_code == 200, response.text
    found = response.json()

    model, processor = load_model(str(tiny.cached("qwen2_5_vl", text=TEXT)), dtype="float32")
    inputs = build_prompt(processor, read_clip(clip, FRAMES), "What moves?").on(model)
    with tokensieve.compress(model, METHOD, retention=RETENTION) as run, torch.no_grad():
        produced = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["choices"][0]["message"]["content"] == text
    account, trace = found["tokensieve"], run.history[0]
    assert account["prompt"] == trace.after[0] and account["visual"] == account["visual_before"] // 2
    assert found["usage"]["prompt_tokens"] == account["prompt"]


def test_many_at_once_answer_alike(server: httpx.Client, clip: Path) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: send(server, clip).json(), range(24)))
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    metrics = server.get("/metrics").text
    assert "tokensieve" in metrics


def test_a_stream_can_be_left(server: httpx.Client, clip: Path) -> None:
    body = ask(video_part(data_url(clip)), stream=True, max_tokens=1500)
    with server.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    assert send(server, clip).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"retention": 0.25}, "--engine transformers"),
        ({"method": "uniform"}, "not offered"),
        ({"max_tokens": 2040}, "shorter answer"),
    ),
)
def test_what_the_engine_cannot_do_is_refused(
    server: httpx.Client, clip: Path, fields: dict[str, Any], words: str
) -> None:
    response = send(server, clip, **fields)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text


def test_a_broken_clip_is_a_bad_request(server: httpx.Client, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    assert send(server, broken).status_code == 400
    assert server.get("/health").status_code == 200
