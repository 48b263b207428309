"""Ways to a server that a test can slow down, break, wrap in TLS, or lead through a company's proxy."""

import base64
import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tests.support.e2e.act import free_port
from tests.support.hub import LoopbackHub, files_of

HUB_NAME = "hub.company.invalid"
PASSWORD = "onlyTheProxyMayKnow77"
CREDENTIALS = "Basic " + base64.b64encode(f"gate:{PASSWORD}".encode()).decode()
"""What the company's proxy gets from a client whose address of it has the password."""

Place = Path | int
"""A socket file, or a TCP port of this machine."""


@contextlib.contextmanager
def proxy(
    upstream: Place,
    address: Place,
    hook: Callable[[bytes], None] = lambda _data: None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[None]:
    """Serve what is at `upstream` at another place, until the block ends.

    `hook` sees each piece that a client sends; where it raises `ConnectionError`, the connection breaks.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                client = tls.wrap_socket(self.request, server_side=True) if tls else self.request
                join(client, upstream, hook)
                client.close()

    kinds: dict[type, type[socketserver.BaseServer]] = {
        int: type("Tcp", (socketserver.ThreadingTCPServer,), {"allow_reuse_address": True, "daemon_threads": True}),
        str: type("Unix", (socketserver.ThreadingUnixStreamServer,), {"daemon_threads": True}),
    }
    where = ("127.0.0.1", address) if isinstance(address, int) else str(address)
    with kinds[int if isinstance(address, int) else str](where, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def join(client: socket.socket, upstream: Place, hook: Callable[[bytes], None]) -> None:
    """Carry bytes both ways until one end has no more."""
    with connected(upstream) as server:
        back = threading.Thread(target=pump, args=(server, client, lambda _data: None), daemon=True)
        back.start()
        pump(client, server, hook)
        back.join()


def connected(place: Place) -> socket.socket:
    if isinstance(place, int):
        return socket.create_connection(("127.0.0.1", place))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(place))
    return connection


def pump(source: socket.socket, target: socket.socket, hook: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            hook(data)
            target.sendall(data)
    for end in (target, source):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_WR)


class CompanyProxy(socketserver.ThreadingTCPServer):
    """The only way out of a network: `CONNECT` to one name and its subdomains, which lie at a port of this machine.

    `asked` holds what each client asked for, with its authorization. Open to containers, so not on 127.0.0.1 only.
    """

    daemon_threads = True

    def __init__(self, name: str, upstream: int) -> None:
        super().__init__(("", 0), _Connect)
        self.name, self.upstream = name, upstream
        self.asked: list[tuple[str, str]] = []

    @property
    def port(self) -> int:
        return self.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Connect(socketserver.StreamRequestHandler):
    server: CompanyProxy

    def handle(self) -> None:
        method, target, _version = self.rfile.readline().decode().split()
        headers = dict(line.decode().rstrip().split(": ", 1) for line in iter(self.rfile.readline, b"\r\n"))
        self.server.asked.append((target, headers.get("Proxy-Authorization", "")))
        host = target.removesuffix(":443")
        if method != "CONNECT" or not f".{host}".endswith(f".{self.server.name}"):
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        join(self.connection, self.server.upstream, lambda _data: None)


@contextlib.contextmanager
def company(
    certificates: Path, folders: Mapping[str, Path], token: str | None = None
) -> Iterator[tuple[LoopbackHub, CompanyProxy]]:
    """A Hub that speaks HTTPS and is reached through a proxy only. With a token, its repositories are private."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server-key.pem")
    port = free_port()
    with LoopbackHub() as hub, proxy(int(urlsplit(hub.url).port or 0), port, tls=context):
        hub.cdn_url = f"https://cdn.{HUB_NAME}"
        for name, folder in folders.items():
            hub.add_repo(name, files_of(folder), private=token is not None, token=token)
        with CompanyProxy(HUB_NAME, port) as way_out:
            yield hub, way_out
