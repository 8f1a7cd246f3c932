"""Paths, bytes, file objects and URLs, the last against a local server that misbehaves on request."""

from __future__ import annotations

import http.server
import io
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_media import encode, sequence

from tokensieve.errors import VideoError
from tokensieve.video import FetchLimits, download, open_source, probe, read_clip
from tokensieve.video.download import _is_public, public_label

CLIP = encode(sequence(10))


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by the path of the request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def answer(self, body: bytes, kind: str = "video/mp4", code: int = 200, **headers: str) -> None:
        """Send an answer unless nobody listens any more."""
        try:
            self.send_answer(body, kind, code, headers)
        except ConnectionError:
            self.close_connection = True

    def send_answer(self, body: bytes, kind: str, code: int, headers: dict[str, str]) -> None:
        """Send all of an answer; the other side may hang up in the middle of it."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Serve a good clip or one of several kinds of trouble."""
        name, _, rest = self.path[1:].partition("/")
        if name == "clip.mp4" or name.startswith("a%20b"):
            self.answer(CLIP)
        elif name == "unnamed":
            self.answer(CLIP, "application/octet-stream")
        elif name == "page":
            self.answer(b"<html>Not found</html>", "text/html")
        elif name == "disguised":
            self.answer(b"<!DOCTYPE html><html></html>", "application/octet-stream")
        elif name == "packed":
            self.answer(CLIP, Content_Encoding="gzip")
        elif name == "stated-huge":
            self.answer(b"", Content_Length=str(1 << 40))
        elif name == "endless":
            self.close_connection = True
            self.answer(bytes(1 << 20), Content_Length_Unknown="1", Content_Length="")
        elif name == "broken-off":
            self.close_connection = True
            self.answer(CLIP[:500], Content_Length=str(len(CLIP)))
        elif name == "hop":
            left = int(rest)
            place = f"/hop/{left - 1}" if left > 1 else "/clip.mp4"
            self.answer(b"", code=302, Location=place)
        elif name == "to":
            self.answer(b"", code=302, Location=rest.replace("|", "/"))
        elif name == "slow":
            time.sleep(1.0)
            self.answer(CLIP)
        else:
            self.answer(b"no", "text/plain", 404)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_every_kind_of_source_gives_the_same_frames(tmp_path: Path, server: str, scratch: Path) -> None:
    path = tmp_path / "clip with spaces %d.mp4"
    path.write_bytes(CLIP)
    truth = read_clip(path).frames
    with path.open("rb") as file:
        file.seek(100)
        sources: list[Any] = [str(path), CLIP, bytearray(CLIP), memoryview(CLIP), file, io.BytesIO(CLIP)]
        for source in sources:
            np.testing.assert_array_equal(read_clip(source).frames, truth)
        assert not file.closed
    np.testing.assert_array_equal(read_clip(f"{server}/clip.mp4", allow_private=True).frames, truth)


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_clip("~/clip.mp4")) == 10


def test_stream_that_cannot_seek(scratch: Path) -> None:
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writer, CLIP), os.close(writer)))
    thread.start()
    with os.fdopen(reader, "rb") as pipe:
        assert len(read_clip(pipe)) == 10
    thread.join()
    reader, writer = os.pipe()
    os.write(writer, CLIP[:2000])
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe, pytest.raises(VideoError, match="max_bytes=1000"):
        read_clip(pipe, max_bytes=1000)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (io.StringIO("text"), "text, not bytes|binary mode"),
        (42, "cannot be read from a int"),
        (None, "cannot be read from a NoneType"),
        ("ftp://example.org/a.mp4", "scheme of ftp://example.org/a.mp4 is not supported"),
        ("rtsp://example.org/a", "not supported"),
        ("file:///etc/hostname", "not supported"),
        ("s3://bucket/key?token=secret", "scheme of s3://bucket/key is not supported"),
        ("concat:a.mp4|b.mp4", "does not exist"),
        ("http://", "no host"),
        ("http://user:word@example.org/a.mp4", "password"),
        ("http://exa mple.org:99999/a.mp4", "could not be fetched|the URL"),
    ],
)
def test_unusable_sources(source: Any, message: str) -> None:
    with pytest.raises(VideoError, match=message) as caught:
        read_clip(source)
    assert "secret" not in str(caught.value)
    assert "word@" not in str(caught.value)


def test_download(server: str, scratch: Path) -> None:
    for name in ("clip.mp4", "unnamed", "a b/\N{LATIN SMALL LETTER E WITH ACUTE}.mp4?x=1 2", "hop/5"):
        with open_source(f"{server}/{name}", FetchLimits(allow_private=True)) as opened:
            assert opened.size == len(CLIP)
            assert Path(str(opened.target)).read_bytes() == CLIP
            assert "?" not in opened.label
        assert list(scratch.iterdir()) == []
    assert probe(f"{server}/clip.mp4", allow_private=True).num_frames == 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("page", {}, "sent text/html, which is no video"),
        ("disguised", {}, "sent text, not a video"),
        ("packed", {}, "gzip"),
        ("missing", {}, "answered 404"),
        ("clip.mp4", {"max_bytes": 1000}, "larger than max_bytes=1000"),
        ("stated-huge", {}, "larger than max_bytes"),
        ("endless", {"max_bytes": 100_000}, "larger than max_bytes=100000"),
        ("broken-off", {}, "broke off after 500|could not be fetched"),
        ("hop/6", {}, "redirects more than 5 times"),
        ("hop/2", {"max_redirects": 1}, "redirects more than 1 times"),
        ("to/file:||/etc/hostname", {}, "302|refused"),
        ("to/ftp:||example.org/x", {}, "ftp address, which is refused"),
        ("slow", {"timeout": 0.2}, "timed out"),
    ],
)
def test_bad_answers(server: str, scratch: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VideoError, match=message) as caught:
        read_clip(f"{server}/{name}", allow_private=True, **options)
    assert str(caught.value).endswith(".")
    assert list(scratch.iterdir()) == []


def test_private_addresses_are_refused_by_default(server: str, scratch: Path) -> None:
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433"):
        with pytest.raises(VideoError, match="not a public address"):
            read_clip(f"http://{host}:{port}/clip.mp4")
    assert list(scratch.iterdir()) == []


def test_redirects_are_checked_too(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public host that redirects to a private one: the second hop is refused."""
    port = int(server.rpartition(":")[2])
    real = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host == "public.example" else host, *arguments, **options)

    judged: list[str] = []

    def public(text: str) -> bool:
        judged.append(text)
        return len(judged) == 1

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(download, "_is_public", public)
    with pytest.raises(VideoError, match=r"127\.0\.0\.1, which is not a public"):
        read_clip(f"http://public.example:{port}/hop/1")
    assert len(judged) == 2


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.5.4", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert _is_public(address) is public


def test_unreachable_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(VideoError, match="could not be fetched"):
            read_clip(f"http://127.0.0.1:{port}/x.mp4", allow_private=True, timeout=2)


def test_labels_hide_secrets() -> None:
    assert public_label("https://me:pw@host.org:8443/a/b.mp4?key=1#t") == "https://host.org:8443/a/b.mp4"


def test_names_are_not_taken_for_patterns_or_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("frame%03d.mp4", "pipe:0", "-i.mp4", "a|b.mp4", "x\ny.mp4"):
        Path(name).write_bytes(CLIP)
        assert len(read_clip(name)) == 10


def test_interrupted_use_removes_the_copy(server: str, scratch: Path) -> None:
    def stop() -> None:
        with open_source(f"{server}/clip.mp4", FetchLimits(allow_private=True)) as opened:
            assert Path(str(opened.target)).is_file()
            raise KeyboardInterrupt

    runner: Callable[[], None] = stop
    with pytest.raises(KeyboardInterrupt):
        runner()
    assert list(scratch.iterdir()) == []
