"""The command as a process: exit codes, Ctrl-C, what is imported, the hub."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_media import error_line

COMMAND = (sys.executable, "-m", "tokensieve.cli")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=120,
        check=False,
    )


def test_help_and_lists_do_not_import_transformers(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tokensieve.cli import app\n"
        "for words in (['--help'], ['list', 'methods'], ['list', 'hosts'], ['list', 'signals']):\n"
        "    try:\n"
        "        app(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, end.code\n"
        "sys.exit('transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_version(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tokensieve 0.1.0\n", "")


def test_user_errors_exit_with_2(tmp_path: Path, video: Path) -> None:
    done = run("ask", video, "What?", "--method", "vidcon2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "vidcom2" in error_line(done.stderr)


def test_bugs_exit_with_1_and_hide_the_traceback(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tokensieve.cli import main, listing\n"
        "import tokensieve\n"
        "def broken(pattern):\n"
        "    raise ZeroDivisionError('one line\\nand another')\n"
        "tokensieve.list_methods = broken\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "list", "methods"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 1 and done.stdout == ""
    line = error_line(done.stderr)
    assert "ZeroDivisionError: one line and another" in line
    assert "this is a bug, run with --debug for the traceback" in line
    done = subprocess.run(
        [*command, "--debug"], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in broken" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for child processes")
@pytest.mark.parametrize("words", [("ask", "{video}", "What?"), ("view", "{video}", "-o", "report.html")])
def test_interrupt_leaves_nothing(tmp_path: Path, video: Path, model: Path, words: tuple[str, ...]) -> None:
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    process = subprocess.Popen(
        [*COMMAND, *(word.format(video=video) for word in words), "--model", str(model), "--max-new-tokens", "30000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=work,
        env=environment(TMPDIR=str(scratch)),
        # A parent that ignores SIGINT (a background job) would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    # The note about random weights comes right before generation, which takes a minute.
    assert "random weights" in process.stderr.readline()
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == ""
    assert errors == "error: Interrupted.\n"
    assert list(work.iterdir()) == []
    assert list(scratch.iterdir()) == []


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that refuses every repository in the way that its name says, as the real hub does."""
    codes = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "bare": (404, "EntryNotFound")}

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, code = next((value for key, value in codes.items() if key in self.path), (500, "Unknown"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_names_that_cannot_be_had(tmp_path: Path, hub: str) -> None:
    script = (
        "from tokensieve.load import model_type_of\n"
        "for name in ('owner/gated', 'owner/missing', 'owner/bare'):\n"
        "    try:\n"
        "        model_type_of(name)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    variables = environment(HF_ENDPOINT=hub, HF_HOME=str(tmp_path), no_proxy="127.0.0.1")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables, timeout=60, check=False
    )
    gated, missing, bare = done.stdout.splitlines()
    assert gated.startswith("HostError") and "is gated; accept its terms" in gated
    assert missing.startswith("HostError") and "no public hub model owner/missing" in missing
    assert bare.startswith("HostError") and "has no config.json" in bare


def test_hub_that_cannot_be_reached(tmp_path: Path, video: Path) -> None:
    words = ("ask", video, "What?", "--model", "owner/name")
    done = run(*words, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no folder owner/name, and the hub cannot be reached" in error_line(done.stderr)
