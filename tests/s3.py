"""A local S3 server that fails when told to."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Callable[[str, str], str | None]


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any, **named: Any) -> None:
        pass


class S3Server:
    """An S3 server on a free port of this machine.

    `fault(method, path)` says what a request gets instead of its answer: "500", "drop" (the connection is closed at
    once), "lost" (it is done, but the connection is closed without an answer), "half" (the answer's body breaks off in
    its middle), or None.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda method, path: None
        self._writing = threading.Lock()  # moto looks and writes in two steps; S3 does in one
        self._real = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def new_bucket(self, name: str) -> str:
        boto3.client("s3").create_bucket(Bucket=name)
        return name

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        fault = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault == "500":
            start("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b""]
        if fault == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        with self._writing if environ["REQUEST_METHOD"] == "PUT" else contextlib.nullcontext():
            answer: Iterable[bytes] = self._real(environ, start)
        if fault == "lost":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        return _half(b"".join(answer), environ) if fault == "half" else answer


def _half(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
