"""A package index of this machine that serves the cached wheels, and can stop in the middle of a file."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 20


@dataclass
class Index:
    """Stops for good after `share` of a file, and then sets `stopped`; a share of 1 serves files whole."""

    port: int = 0
    share: float = 1.0
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """What makes pip ask this index and nothing else."""
        return {
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.port}/simple/",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
        }


@contextlib.contextmanager
def index_of(wheels: Path) -> Iterator[Index]:
    """Serve a folder's wheels until the block ends."""
    index = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/simple/"):
                name = self.path.split("/")[2].replace("-", "_")
                links = "".join(f'<a href="/files/{w.name}">{w.name}</a>' for w in wheels.glob(f"{name}-*.whl"))
                self._send_headers("text/html", len(links))
                self.wfile.write(links.encode())
                return
            file = wheels / Path(self.path).name
            size = file.stat().st_size
            self._send_headers("application/zip", size)
            with file.open("rb") as source, contextlib.suppress(OSError):  # pip was killed
                while data := source.read(CHUNK):
                    if source.tell() > index.share * size:
                        index.stopped.set()
                        ended.wait()
                        return
                    self.wfile.write(data)

        def _send_headers(self, kind: str, size: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    ended = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield index
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
