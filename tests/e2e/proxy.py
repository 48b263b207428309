"""A way to the engine that a test can slow down, break, or wrap in TLS."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def proxy(
    engine: str, address: Path | int, hook: Callable[[bytes], None], tls: ssl.SSLContext | None = None
) -> Iterator[None]:
    """Serve the engine (a DOCKER_HOST of a socket file) at another socket file or TCP port, until the block ends.

    `hook` sees each piece that a client sends; where it raises `ConnectionError`, the connection breaks.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(engine[len("unix://") :])
                client = tls.wrap_socket(self.request, server_side=True) if tls else self.request
                back = threading.Thread(target=pump, args=(upstream, client, lambda _data: None), daemon=True)
                back.start()
                pump(client, upstream, hook)
                back.join()
                client.close()

    kinds: dict[bool, type[socketserver.BaseServer]] = {
        True: type("Tcp", (socketserver.ThreadingTCPServer,), {"allow_reuse_address": True, "daemon_threads": True}),
        False: type("Unix", (socketserver.ThreadingUnixStreamServer,), {"daemon_threads": True}),
    }
    is_tcp = isinstance(address, int)
    with kinds[is_tcp](("127.0.0.1", address) if is_tcp else str(address), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def pump(source: socket.socket, target: socket.socket, hook: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            hook(data)
            target.sendall(data)
    for end in (target, source):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_WR)
