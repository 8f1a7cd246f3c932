"""``tokensieve bench`` as a user runs it: files, errors, processes, and a kill."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
from bench_items import FAMILIES, frames_of, write_rows
from typer.testing import CliRunner

from tokensieve.bench.config import BenchConfig, default_workers, load_items, model_identity, resolved
from tokensieve.cli import app
from tokensieve.cli.bench import bench
from tokensieve.errors import HostError
from tokensieve.hosts import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small videos with two questions each."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for clip in range(4):
        name = f"{clip}.mp4"
        with av.open(str(folder / name), "w") as output:
            stream: Any = output.add_stream("libx264", rate=4)
            stream.width, stream.height, stream.pix_fmt = 40, 40, "yuv420p"
            for picture in frames_of(clip):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
        for number in range(2):
            row = {
                "id": f"{clip}/{number}",
                "video": name,
                "family": FAMILIES[number],
                "question": f"What is {number}?",
            }
            rows.append({**row, "options": ["red", "green"], "answer": "AB"[(clip + number) % 2]})
    return write_rows(folder / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def model() -> str:
    """Folder of a small model."""
    return str(tiny.cached("llava_onevision"))


def words(dataset: Path, model: str, folder: Path, *more: str) -> list[str]:
    given = ["bench", "--model", model, "--data", str(dataset), "--methods", "vidcom2,fastv:layer=2"]
    return [*given, "-r", "0.5,0.2", "-n", "6", "-o", str(folder), "--no-progress", *more]


def table(folder: Path) -> list[dict[str, Any]]:
    """Rows of the results without times."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in ("milliseconds", "on_front")} for row in rows]


def test_from_files_to_files(dataset: Path, model: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, words(dataset, model, tmp_path, "--workers", "1"), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for text in ("vidcom2 @ 0.5", "fastv:layer=2 @ 0.2", "random @ 0.2", "8 questions about 4 clips"):
        assert text in result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "journal.jsonl",
        "results.json",
        "results.csv",
        "results.html",
    }
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    assert facts["prompt"] == "letters" and facts["frames"] == 6
    again = CliRunner().invoke(app, words(dataset, model, tmp_path, "--workers", "1", "--json"), env={"COLUMNS": "120"})
    assert again.exit_code == 0 and table(tmp_path)[0]["setting"] == "full model"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["-r", "half"], "--retention takes numbers"),
        (["-r", "1.5"], "Retention must lie in (0, 1]"),
        (["--families", "size"], "no family 'size'"),
        (["--prompt", "essay"], "no prompt style 'essay'"),
        (["--methods", "vidcon"], "no method 'vidcon'"),
        (["--clips", "0"], "clips must be 1 or more"),
        (["--workers", "0"], "workers must be 1 or more"),
        (["-n", "0"], "frames must be 1 or more"),
    ],
)
def test_errors_are_one_sentence(dataset: Path, model: str, tmp_path: Path, more: list[str], text: str) -> None:
    result = CliRunner().invoke(app, words(dataset, model, tmp_path, *more), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert text in result.output and result.output.count("error: ") == 1


def test_another_seed_does_not_go_on_in_the_same_folder(dataset: Path, model: str, tmp_path: Path) -> None:
    """The journal's head is written before the model runs, so that a folder belongs to its arguments from the start."""
    first = ["--workers", "1", "--methods", "uniform", "--clips", "1", "-r", "0.5"]
    assert CliRunner().invoke(app, words(dataset, model, tmp_path, *first)).exit_code == 0
    result = CliRunner().invoke(app, words(dataset, model, tmp_path, *first, "--frames", "4"), env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "another frames (6 instead of 4)" in result.output


@pytest.mark.slow
def test_a_kill_loses_nothing_but_the_work_under_way(dataset: Path, model: str, tmp_path: Path) -> None:
    """Two processes, killed without warning: no process stays, and the next run ends with the table of a quiet one."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert CliRunner().invoke(app, words(dataset, model, quiet, "--workers", "1")).exit_code == 0
    command = [sys.executable, "-m", "tokensieve.cli", *words(dataset, model, killed, "--workers", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    journal = killed / "journal.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b'"unit"') >= 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = journal.read_bytes().count(b'"unit"')
    assert 3 <= before < 4 * 7
    until = time.monotonic() + 300
    while time.monotonic() < until and _alive(process.pid):
        time.sleep(0.1)
    assert not _alive(process.pid)
    result = CliRunner().invoke(app, words(dataset, model, killed, "--workers", "2"))
    assert result.exit_code == 0, result.output
    assert journal.read_bytes().count(b'"unit"') == 4 * 7
    assert table(killed) == table(quiet)


def _alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_world_gives_questions() -> None:
    items = load_items(BenchConfig(clips=3, families=("counting", "motion")))
    assert {one.family for one in items} <= {"counting", "motion"} and len({one.clip for one in items}) <= 3
    frames, rate = items[0].read_frames()  # type: ignore[misc]
    assert frames.dtype.name == "uint8" and frames.shape[0] == 16 and rate > 0


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("owner/name") == "owner/name"


def test_without_a_model_the_bundled_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as it was trained, in float32 on a CPU; what the user says comes first."""
    monkeypatch.setattr(importlib.import_module("tokensieve.world.bundled"), "WEIGHTS", tmp_path)
    with pytest.raises(HostError, match="weights of video-llm are missing"):
        resolved(BenchConfig())
    (tmp_path / "video-llm").mkdir()
    (tmp_path / "video-llm" / "model.safetensors").write_bytes(b"")
    found = resolved(BenchConfig(device="cpu"))
    assert (found.model, found.prompt, found.dtype) == (str(tmp_path / "video-llm"), "open", "float32")
    said = resolved(BenchConfig(device="cpu", prompt="letters", dtype="bfloat16"))
    assert (said.prompt, said.dtype) == ("letters", "bfloat16")
    other = BenchConfig(model="owner/name")
    assert resolved(other) is other


def test_the_command_states_the_defaults_of_the_library() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}
    config = BenchConfig()
    assert tuple(float(part) for part in defaults["retention"].split(",")) == config.retentions
    assert (defaults["methods"],) == config.methods
    for name in ("clips", "questions", "split", "frames", "prompt", "seed", "batch", "dtype", "device"):
        assert defaults[name] == getattr(config, name), name


def test_small_models_get_a_process_per_core(model: str) -> None:
    assert default_workers("owner/name", "cpu") == 1 and default_workers(model, "cuda:0") == 1
    assert 1 <= default_workers(model, "cpu") <= 8
