"""A proxy before a Prefect server that can be told to answer 500, or nothing."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Proxy:
    """`mode` is `pass`, `500` (each request gets that answer) or `hang` (what comes is read, and never answered)."""

    port: int
    mode: str = "pass"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"


@contextlib.contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """Pass connections on to a port of this machine until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(listener.getsockname()[1])

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed: the end
            while True:
                client, _ = listener.accept()
                threading.Thread(target=_serve, args=(proxy, client, port), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(proxy: Proxy, client: socket.socket, port: int) -> None:
    with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as server:
        threading.Thread(target=_answers, args=(proxy, client, server), daemon=True).start()
        while data := client.recv(65536):
            if proxy.mode == "500":
                client.sendall(ERROR)
                return
            if proxy.mode == "pass":
                server.sendall(data)


def _answers(proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := server.recv(65536):
            if proxy.mode == "pass":
                client.sendall(data)
        client.shutdown(socket.SHUT_RDWR)
