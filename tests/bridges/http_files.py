"""A web server for the files of a folder, with some misbehaviour on request."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve the files of a folder on this machine; ``/trickle`` never ends, ``/hop/N`` redirects N times."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            if self.path.startswith("/hop/"):
                left = int(self.path.rpartition("/")[2])
                self.send_response(302)
                self.send_header("Location", f"/hop/{left - 1}" if left > 1 else "/shapes.mp4")
                self.end_headers()
            elif self.path == "/trickle":
                self.send_response(200)
                self.send_header("Content-Type", "video/mp4")
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"\0")
                        time.sleep(0.02)
                except OSError:
                    self.close_connection = True
            else:
                super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
