"""One tiny model, small clips, and a way to talk to a server inside of this process."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge_media import write_video
from PIL import Image

from tokensieve.hosts import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or REPOSITORY.parent / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that tests share and do not change."""
    return tmp_path_factory.mktemp("bridges")


@pytest.fixture(scope="session")
def video(folder: Path) -> Path:
    """Eight frames in four seconds."""
    return write_video(folder / "shapes.mp4")


@pytest.fixture(scope="session")
def other_video(folder: Path) -> Path:
    """Another eight frames."""
    return write_video(folder / "others.mp4", seed=5)


@pytest.fixture(scope="session")
def picture(folder: Path) -> Path:
    """A red picture."""
    path = folder / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    """The tiny LLaVA-OneVision and its processor."""
    return tiny.load("llava_onevision")


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Folder of the real clips."""
    if not (DATA / "videos" / "MANIFEST.json").is_file():
        pytest.skip(f"the real clips are not at {DATA}; set TOKENSIEVE_DATA_DIR")
    return DATA / "videos"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none stays."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def serving(loaded: tuple[Any, Any]) -> Callable[..., Any]:
    """``serving(work, method=..., backend=...)`` runs ``await work(client)`` against a server in this process."""
    httpx = pytest.importorskip("httpx", reason="needs httpx to talk to the server")
    pytest.importorskip("fastapi", reason="needs pip install 'tokensieve[serve]'")
    from tokensieve.bridges.openai_server import ServerSettings, TransformersBackend, create_app

    def run(work: Callable[[Any], Coroutine[Any, Any, Any]], backend: Any = None, **options: Any) -> Any:
        settings = ServerSettings(**{"model_name": "tiny", "frames": 4, **options})
        app = create_app(TransformersBackend(*loaded) if backend is None else backend, settings)

        async def main() -> Any:
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=30) as client:
                    client.app = app
                    return await work(client)

        return asyncio.run(main())

    return run


@pytest.fixture
def post(serving: Callable[..., Any]) -> Callable[..., Any]:
    """``post(body, **settings)`` sends one request and returns the response."""

    def send(body: Any, **options: Any) -> Any:
        async def work(client: Any) -> Any:
            return await client.post("/v1/chat/completions", content=json.dumps(body))

        return serving(work, **options)

    return send


@pytest.fixture
def refused(post: Callable[..., Any]) -> Callable[..., str]:
    """Send a request that must be answered with status 400 and one sentence; returns the sentence."""

    def send(body: Any, **options: Any) -> str:
        response = post(body, **options)
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert message.endswith(".") and "\n" not in message and "Traceback" not in message, message
        assert response.json()["error"]["type"] == "invalid_request_error"
        return str(message)

    return send
