"""Batches on Ray: processes are killed at bad moments, and every clip is in the table exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from bridge_media import write_video

from tokensieve.bridges.ray_batch import BatchSettings, Item, Journal, Workers, pipeline, run_batch
from tokensieve.hosts import tiny

ray = pytest.importorskip("ray", reason="needs pip install 'tokensieve[batch]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'tokensieve[batch]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("TOKENSIEVE_RAY_TESTS"),
        reason="starts and kills Ray several times, which takes minutes where cores are few; run `make test-ray`",
    ),
]
CLIPS = 24


class Poisoned:
    """Stands for a decoding worker that one of the clips kills."""

    def __init__(self, settings: BatchSettings) -> None:
        """Nothing to load."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Pass items on, or die."""
        items = [json.loads(str(text)) for text in batch["item"]]
        if any(item["id"] == "poison" for item in items):
            os._exit(1)
        return {"records": [json.dumps(items)], "inputs": [b"x"]}


class Echo:
    """Stands for an answering worker."""

    def __init__(self, settings: BatchSettings, device: str) -> None:
        """Nothing to load."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer with the question."""
        items = [item for text in batch["records"] for item in json.loads(str(text))]
        return {"record": [json.dumps({**item, "status": "ok", "answer": item["question"]}) for item in items]}


def test_a_clip_that_kills_its_worker_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pipeline, "Decoder", Poisoned)
    monkeypatch.setattr(pipeline, "Answerer", Echo)
    names = ["a", "b", "poison", "c", "d", "e", "f", "g"]
    items = [Item(name, f"/{name}", f"What of {name}?") for name in names]
    counts: list[int] = []
    with Journal(tmp_path / "j", {}) as journal:
        run_batch(items, BatchSettings("none"), Workers(), journal, counts.append)
        found = {record["id"]: record for record in journal.results(items)}
    assert len(found) == len(names)
    poison = found.pop("poison")
    assert poison["status"] == "failed" and poison["reason"] == pipeline.LOST
    assert all(record["answer"] == f"What of {name}?" for name, record in found.items())
    assert counts == list(range(1, len(names)))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of short clips and a file that is none."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(CLIPS):
        write_video(folder / f"{number:02}.mp4", count=4, seed=number)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def start(clips: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [str(clips), "-q", "What moves?", "-o", str(output), "--frames", "4", "--max-new-tokens", "150"]
    words += ["--model", str(tiny.cached("llava_onevision"))]
    return subprocess.Popen(
        [sys.executable, "-m", "tokensieve.cli", "batch", *words, "--no-progress"],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_records(journal: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until a running batch has written so many results; the number that it has."""
    deadline = time.monotonic() + 400
    while True:
        lines = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        if lines >= count:
            return lines
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_killed_driver_and_a_killed_worker(clips: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "out.parquet", tmp_path / "log"
    journal = tmp_path / "out.parquet.journal"

    first = start(clips, output, log)
    wait_for_records(journal, 3, first, log)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not output.exists()
    # A crash may also cut the last line off.
    journal.write_bytes(journal.read_bytes()[:-7])
    before = journal.read_bytes().count(b"\n") - 1
    assert 2 <= before < CLIPS

    second = start(clips, output, log)
    wait_for_records(journal, before + 2, second, log)
    workers = [
        process
        for process in psutil.Process(second.pid).children(recursive=True)
        if "MapWorker" in " ".join(process.cmdline()) and "Answerer" in " ".join(process.cmdline())
    ]
    assert workers, "no answering worker was found"
    for worker in workers:
        worker.kill()
    assert second.wait(400) == 0, log.read_text()
    text = log.read_text()
    assert f"{before} of {CLIPS + 1} clips are finished already" in text
    assert f"1 of {CLIPS + 1} clips failed" in text and f"{CLIPS} answers in" in text

    rows = parquet.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == [f"{number:02}.mp4" for number in range(CLIPS)]
    assert all(row["answer"] and row["new_tokens"] > 0 and row["tokens_visual"] < 100 for row in rows)
    (failed,) = [json.loads(line) for line in (tmp_path / "out.failed.jsonl").read_text().splitlines()]
    assert failed["id"] == "broken.mp4" and "broken.mp4" in failed["reason"]
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len(records) == len({record["id"] for record in records}) == CLIPS + 1
