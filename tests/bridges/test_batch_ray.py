"""Batches on Ray: processes are killed at bad moments, and every clip is in the table exactly once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from bridge_media import write_video

from tokensieve.bridges.ray_batch import BatchSettings, Item, Journal, Workers, pipeline, run_batch

ray = pytest.importorskip("ray", reason="needs pip install 'tokensieve[batch]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'tokensieve[batch]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("TOKENSIEVE_RAY_TESTS"),
        reason="starts and kills Ray several times, which takes minutes where cores are few; run `make test-ray`",
    ),
]
DATA = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")
CLIPS = 24
LIMIT = 900
"""Seconds after which a run is taken for hanging. Every start of a worker imports torch, which took over a minute each
on a machine with ten runnable processes per pair of cores, and these tests need up to a dozen starts."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A run in this process that hangs fails, and Ray ends in any case."""

    def fail(number: int, frame: Any) -> None:
        raise TimeoutError(f"the test took longer than {2 * LIMIT} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(2 * LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        ray.shutdown()


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
    """A manifest of the real clips where they are at hand, else of made ones, and of a file that is no video."""
    manifest = tmp_path / "clips.txt"
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    names = [path for path in sorted((DATA / "videos").glob("*")) if path.suffix not in (".json", ".md")]
    if not names:
        names = [write_video(tmp_path / f"{number:02}.mp4", count=8, seed=number) for number in range(CLIPS)]
    manifest.write_text("".join(f"{path}\n" for path in (*names, broken)))
    return manifest


def start(clips: Path, output: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command with the bundled model."""
    words = [str(clips), "-q", "how many red objects are there?", "-o", str(output), "--frames", "8", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "tokensieve.cli", "batch", *words, "--no-progress"],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_records(journal: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until a running batch has written so many results; the number that it has."""
    deadline = time.monotonic() + LIMIT
    while True:
        lines = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        if lines >= count:
            return lines
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the end of a batch; what it said."""
    try:
        assert process.wait(LIMIT) == 0, log.read_text()
    finally:
        process.kill()
    return log.read_text()


def answered(output: Path) -> list[dict[str, Any]]:
    """Rows of a table without their times."""
    rows: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
    return [{name: value for name, value in row.items() if not name.startswith("seconds_")} for row in rows]


def test_a_killed_driver_and_a_killed_worker(clips: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "out.parquet", tmp_path / "log"
    journal = tmp_path / "out.parquet.journal"
    names = clips.read_text().splitlines()
    number = len(names) - 1

    first = start(clips, output, log)
    wait_for_records(journal, 3, first, log)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not output.exists()
    # A crash may also cut the last line off.
    journal.write_bytes(journal.read_bytes()[:-7])
    before = journal.read_bytes().count(b"\n") - 1
    assert 2 <= before < number

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
    text = finish(second, log)
    assert f"{before} of {number + 1} clips are finished already" in text
    assert f"1 of {number + 1} clips failed" in text and f"{number} answers in" in text

    rows = answered(output)
    assert [row["video"] for row in rows] == names[:-1]
    assert len({row["id"] for row in rows}) == number
    assert all(row["answer"] and row["new_tokens"] > 0 for row in rows)
    assert all(0 < row["tokens_visual"] < row["tokens_visual_before"] for row in rows)
    (failed,) = [json.loads(line) for line in (tmp_path / "out.failed.jsonl").read_text().splitlines()]
    assert failed["video"] == names[-1] and "broken.mp4" in failed["reason"]
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len(records) == len({record["id"] for record in records}) == number + 1


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of one node with a temporary folder of its own, ended afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Ray makes sockets in there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = ["start", "--head", "--block", "--num-cpus", "2", "--port", str(port), "--temp-dir", folder]
        words += ["--node-ip-address", "127.0.0.1", "--include-dashboard", "false", "--disable-usage-stats"]
        log = Path(folder) / "start.log"
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *words],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **pipeline._PATIENCE},
        )
        children: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + LIMIT
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            # `ray stop` would end the clusters of everybody on this machine.
            children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.terminate()
            psutil.wait_procs(children, timeout=30)
            for child in children:
                if child.is_running():
                    child.kill()
            head.kill()
            head.wait()


def test_a_cluster_gives_the_same_table(clips: Path, cluster: str, tmp_path: Path) -> None:
    names = clips.read_text().splitlines()
    clips.write_text("".join(f"{name}\n" for name in names[-9:]))
    tables = []
    for place, more in (("here", ()), ("there", ("--ray-address", cluster))):
        folder = tmp_path / place
        folder.mkdir()
        process = start(clips, folder / "out.parquet", folder / "log", *more)
        assert "8 answers in" in finish(process, folder / "log")
        tables.append(answered(folder / "out.parquet"))
    assert tables[0] == tables[1] and [row["video"] for row in tables[0]] == names[-9:-1]
