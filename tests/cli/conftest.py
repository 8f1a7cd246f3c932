"""Running the command line in this process, small videos, and folders of models that are wrong in one way."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from cli_media import error_line, write_video
from typer.testing import CliRunner, Result

from tokensieve.cli import app
from tokensieve.hosts import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or REPOSITORY.parent / "shared" / "data")
ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "ffeeddccbbaa99887766554433221100",
}

# Older releases mix the two streams unless told not to; newer ones keep them apart.
SEPARATE: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}

Cli = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli() -> Cli:
    """``cli("ask", ...)`` runs one command line; an exception that escapes it fails the test."""

    def run(*words: Any) -> Result:
        result = CliRunner(**SEPARATE).invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Run a command line that must fail with exit code 2, no output and one line; returns that line."""

    def run(*words: Any) -> str:
        result = cli(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        return error_line(result.stderr)

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that tests share and do not change."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def video(folder: Path) -> Path:
    """Eight frames in four seconds."""
    return write_video(folder / "shapes.mp4")


@pytest.fixture(scope="session")
def encrypted(folder: Path) -> Path:
    """A video with its samples encrypted."""
    return write_video(folder / "protected.mp4", options=ENCRYPTION)


@pytest.fixture(scope="session")
def sound(folder: Path) -> Path:
    """A file with an audio stream only."""
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("aac", rate=8000)
        stream.layout = "mono"
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.sample_rate = 8000
        output.mux(stream.encode(block))
        output.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def frameless(video: Path, folder: Path) -> Path:
    """A video whose stream is there but whose coded pictures are all zeros."""
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big")
    data[start : start - 8 + size] = bytes(size - 8)
    path = folder / "frameless.mp4"
    path.write_bytes(data)
    return path


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Folder of the real clips."""
    if not (DATA / "videos" / "MANIFEST.json").is_file():
        pytest.skip(f"the real clips are not at {DATA}; set TOKENSIEVE_DATA_DIR")
    return DATA / "videos"


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the tiny LLaVA-OneVision."""
    return tiny.cached("llava_onevision")


@pytest.fixture
def copied_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def config_only(tmp_path: Path) -> Callable[..., Path]:
    """``config_only(model_type="bert")`` writes a folder with nothing but a config.json."""

    def write(**fields: Any) -> Path:
        folder = tmp_path / "configured"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return write
