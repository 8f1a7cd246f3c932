"""Bad requests to the server: one sentence each, no traceback, nothing left behind."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge_media import ask, data_url, image_part, text_part, video_part
from http_files import serve_folder

from tokensieve.errors import TokensieveError

Refused = Callable[..., str]


def limits(**options: Any) -> Any:
    from tokensieve.bridges.openai_server import MediaLimits

    return MediaLimits(**options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: Field required"),
        ([], "dictionary|valid"),
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role: "),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\.0\.content: "),
        (ask({"type": "input_audio", "input_audio": {}}), r"messages\.0\.content\.0: .*input_audio"),
        (ask({"type": "video_url", "video_url": "x"}), r"messages\.0\.content\.0\.video_url"),
        (ask(temperature=-1), "temperature: "),
        (ask(temperature="hot"), "temperature: "),
        (ask(max_tokens=0), "max_tokens: "),
        (ask(max_tokens=10**9), "max_tokens may be at most 2048"),
        (ask(n=2), "n is not supported"),
        (ask(tools=[{"type": "function"}]), "tools is not supported"),
        (ask(logprobs=True), "logprobs is not supported"),
        (ask(stop=["a"] * 5), "stop takes up to 4"),
        (ask(stop=[""]), "stop takes up to 4"),
        (ask(frames=1000), "frames may be at most 128"),
        (ask(fps=0), "fps: "),
        (ask(method="holitom"), "'holitom' is not offered here; use one of vidcom2"),
        (ask(method="vidcom2:temperature=9"), "not offered here"),
        (ask(retention=0.9), "retention of 0.9 is not offered here; use 0.01 to 0.25"),
        (ask(retention=0.001), "not offered here"),
        (ask(question="x" * 300_000), "at most 262144 characters"),
        (ask(retention=7), r"must lie in \(0, 1\]"),
        (
            {**ask(), "messages": ask()["messages"] + [{"role": "user", "content": "x" * 200_000}]},
            "ask for fewer|tokens",
        ),
    ],
)
def test_bodies_that_make_no_sense(refused: Refused, body: Any, message: str) -> None:
    import re

    assert re.search(message, refused(body)), refused(body)


def test_unknown_model(post: Callable[..., Any]) -> None:
    response = post(ask(model="gpt"))
    assert response.status_code == 404 and "no model 'gpt' here; use 'tiny'" in response.text


def test_bodies_that_are_no_json(serving: Callable[..., Any]) -> None:
    bodies = [b"", b"garbage", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}', b'"' + b"x" * 300_000]

    async def work(client: Any) -> Any:
        return [await client.post("/v1/chat/completions", content=body) for body in bodies]

    for response in serving(work):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"].endswith(".")


def test_bodies_that_are_too_large(serving: Callable[..., Any]) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    async def work(client: Any) -> Any:
        stated = await client.post("/v1/chat/completions", content=b" " * 20_000)
        return stated, await client.post("/v1/chat/completions", content=chunks())

    for response in serving(work, max_body=10_000):
        assert response.status_code == 413 and "larger than the 10000 bytes" in response.text


def test_a_body_that_never_ends(serving: Callable[..., Any]) -> None:
    import asyncio

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    async def work(client: Any) -> Any:
        return await client.post("/v1/chat/completions", content=slow())

    response = serving(work, body_timeout=0.1)
    assert response.status_code == 408 and "within 0.1 s" in response.text


def test_the_key_guards_models_and_chat(serving: Callable[..., Any]) -> None:
    async def work(client: Any) -> Any:
        sent = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer secret"}]
        chats = [await client.post("/v1/chat/completions", json=ask(), headers=one) for one in sent]
        models = [await client.get("/v1/models", headers=one) for one in sent]
        return chats, models, await client.get("/health")

    chats, models, health = serving(work, api_key="secret")
    for answers in (chats, models):
        assert [answer.status_code for answer in answers] == [401, 401, 401, 200]
        assert answers[0].json()["error"]["type"] == "authentication_error"
        assert "secret" not in answers[0].text
    assert health.status_code == 200


def test_broken_clips(refused: Refused, video: Path, picture: Path, tmp_path: Path, scratch: Path) -> None:
    data = video.read_bytes()
    start = data.index(b"mdat") + 4
    hollow = bytearray(data)
    hollow[start:-500] = bytes(len(data) - 500 - start)
    broken = {
        "empty": b"",
        "text": b"not a video at all",
        "cut": data[:200],
        "hollow": bytes(hollow),
        "playlist": b"#EXTM3U\nfile:///etc/hostname\n",
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        message = refused(ask(video_part(data_url(path))))
        assert "data: address" in message and "<BytesIO" not in message, message
        message = refused(ask(video_part(path.as_uri())), media=limits(root=tmp_path))
        assert message.startswith(name) or name in message, message
    assert "is a video; send it as video_url" in refused(ask(image_part(data_url(video))))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:video/mp4,plain", "not in base64"),
        ("data:video/mp4;base64,@@@@", "no valid base64"),
        ("data:video/mp4;base64," + base64.b64encode(bytes(5000)).decode(), "more than the 1000 bytes"),
        ("data:", "not in base64"),
        ("http://example.org/a.mp4", "http://example.org/a.mp4 is not accepted here; use one that begins with https"),
        ("ftp://example.org/a.mp4?token=secret", "ftp://example.org/a.mp4 is not accepted"),
        ("/etc/hostname", "'/etc/hostname' is not accepted"),
        ("https://127.0.0.1/a.mp4", "not a public address; this server fetches from public addresses only"),
        ("https://[::1]/a.mp4", "not a public address"),
        ("https://169.254.169.254/latest/meta-data", "not a public address"),
        ("https://user:secret@example.org/a.mp4", "password"),
        ("file:///etc/hostname", "file: addresses are not accepted here"),
    ],
)
def test_addresses_that_are_refused(refused: Refused, url: str, message: str) -> None:
    found = refused(ask(video_part(url)), media=limits(max_bytes=1000))
    assert message in found and "secret" not in found


def test_files_outside_of_the_root(refused: Refused, video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.mp4").symlink_to(video)
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    urls = [
        video.as_uri(),
        f"file://{root}/../../{video.name}",
        f"file://{root}/%2e%2e/{video.name}",
        f"file://{root}/link.mp4",
        f"file://{root}/folder.mp4",
        f"file://{root}/pipe.mp4",
        f"file://{root}/missing.mp4",
        f"file://{root}/a%00b.mp4",
        f"file://elsewhere{root}/link.mp4",
        "file:relative.mp4",
        "file:///" + "x" * 5000,
    ]
    messages = {refused(ask(video_part(url)), media=limits(root=root)) for url in urls}
    assert messages == {"The file: address names no file under this server's media folder; check the path."}


def test_clips_beyond_the_limits(refused: Refused, video: Path, picture: Path) -> None:
    part = video_part(data_url(video))
    assert "lasts 4 s, longer than the 2 s" in refused(ask(part), media=limits(max_seconds=2))
    assert "96x64 pixels, more than the 1000" in refused(ask(part), media=limits(max_pixels=1000))
    assert "at most 1 clips here, not 2" in refused(ask(part, part), media=limits(max_clips=1))
    url = video.as_uri()
    assert "more than the 100 allowed" in refused(ask(video_part(url)), media=limits(root=video.parent, max_bytes=100))


def test_downloads_beyond_the_limits(refused: Refused, video: Path, scratch: Path) -> None:
    with serve_folder(video.parent) as address:
        options = {"allow_http": True, "allow_private": True}
        cases = [
            ("/hop/3", {"max_redirects": 2}, "redirects more than 2 times"),
            ("/shapes.mp4", {"max_bytes": 100}, "larger than this server accepts"),
            ("/trickle", {"max_fetch_seconds": 0.1}, "took longer than 0.1 s"),
            ("/missing.mp4", {}, "answered 404"),
            ("/shapes.mp4", {"allow_private": False}, "public addresses only"),
        ]
        for path, more, message in cases:
            found = refused(ask(video_part(address + path)), media=limits(**{**options, **more}))
            assert message in found, found
    assert list(scratch.iterdir()) == []


def test_large_frames_are_scaled_down_while_decoding(post: Callable[..., Any], video: Path) -> None:
    response = post(ask(video_part(data_url(video))), media=limits(max_memory=4 * 3 * 24 * 16))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": 0}, r"must lie in \(0, 1\]"),
        ({"retention": 0.5, "max_retention": 0.2}, "lies outside of 0.01 to 0.2"),
        ({"method": "vidcon2"}, "did you mean vidcom2"),
        ({"allowed_methods": ("fastv:retention=0.1",)}, "states a retention of its own"),
        ({"allowed_methods": ("fastv:layer=40",)}, "layer 40"),
        ({"api_key": ""}, "API key is empty"),
        ({"queue": -1}, "0 or more"),
        ({"decoders": 0}, "decoders must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense(serving: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    async def nothing(client: Any) -> None:
        raise AssertionError("the server started")

    with pytest.raises(TokensieveError, match=message):
        serving(nothing, **options)


def test_media_limits_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(TokensieveError, match="is no folder"):
        limits(root=tmp_path / "missing")
    with pytest.raises(TokensieveError, match="max_seconds must be above 0"):
        limits(max_seconds=float("nan"))


def test_nothing_of_the_request_is_echoed_at_length(refused: Refused) -> None:
    assert len(refused(ask(video_part("gopher:" + "x" * 10_000)))) < 300
    assert len(json.dumps(refused(ask(text_part("a"), method="m" * 50_000)))) < 2000
    assert "not offered here" in refused(ask(method="\ud800"))
    assert "cannot take" in refused(ask(question="\ud800"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "vidcon2"], "did you mean vidcom2"),
        (["--retention", "0.5", "--max-retention", "0.25"], "lies outside of 0.01 to 0.25"),
        (["--api-key-file", "missing"], "The API key file missing cannot be read"),
        (["--media-root", "missing"], "media root missing is no folder"),
        (["--method", "fastv:layer=40"], "layer 40"),
        (["missing/folder/here"], "missing/folder/here does not exist"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(
    words: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokensieve.cli import app
    from tokensieve.hosts import tiny

    monkeypatch.chdir(tmp_path)
    model = [] if not words[0].startswith("--") else [str(tiny.cached("llava_onevision"))]
    with pytest.raises(SystemExit) as end:
        app(["serve", *model, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: Any) -> None:
    import socket

    from tokensieve.cli import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as end:
            app(["serve", "--no-progress", "--port", str(taken.getsockname()[1])])
    assert end.value.code == 2
    assert "cannot be listened on" in capsys.readouterr().err
