"""A container engine at a socket file that answers as Docker's does; what runs in its containers is a function.

In: that function, and answers that are to be wrong. Out: what the launcher asked for. A request to create a container
must be one of Docker's own specification. Real engines run in tests/e2e.
"""

from __future__ import annotations

import contextlib
import json
import re
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.action import engine_spec

STDOUT = 1
PATIENCE_S = 30.0

BREAK_OFF = (0, None)
"""The answer of an engine that goes away: the connection ends without one."""


@dataclass
class Container:
    """One container as the launcher made it, and what came to pass in it."""

    id: str
    name: str
    asked: dict[str, Any]
    started: threading.Event = field(default_factory=threading.Event)
    told_to_stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    handed: threading.Event = field(default_factory=threading.Event)
    line: bytes = b""
    said: bytes = b""
    status: int = 0
    out_of_memory: bool = False

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.asked.get("Labels") or {}
        return labels

    @property
    def environ(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.asked["Env"])

    def outside(self, inside: Path) -> Path:
        """The directory that is mounted there."""
        (source,) = [one["Source"] for one in self.asked["HostConfig"]["Mounts"] if one["Target"] == str(inside)]
        return Path(source)

    def say(self, text: str) -> None:
        self.said += text.encode()

    def read_line(self) -> bytes:
        """The line that was handed over by standard input."""
        assert self.handed.wait(PATIENCE_S), "nothing came"
        return self.line


class Engine:
    """What the engine knows, what it was asked, and which answers it gives in place of its own."""

    def __init__(self, run: Callable[[Container], int]) -> None:
        self.run = run
        self.address = ""
        self.version: dict[str, Any] = {"ApiVersion": "1.44", "Components": [{"Name": "Engine"}]}
        self.info: dict[str, Any] = {"SecurityOptions": ["name=seccomp"], "Runtimes": {"runc": {}}}
        self.images: dict[str, dict[str, Any]] = {"merge-gate:test": {"Id": "sha256:1", "RepoDigests": []}}
        self.can_pull: dict[str, dict[str, Any]] = {}
        self.pull_says: list[dict[str, Any]] = [{"status": "Pulling"}]
        self.containers: dict[str, Container] = {}
        self.made: list[Container] = []
        self.asked: list[str] = []
        self.wrong: dict[str, list[tuple[int, Any]]] = {}
        self.before: dict[str, Callable[[], None]] = {}

    @property
    def container(self) -> Container:
        """The only one that was made."""
        (made,) = self.made
        return made

    def answer(self, request: str) -> tuple[int, Any] | None:
        """Note a request (`POST /containers/create`), and tell what is to be answered in place of the truth."""
        self.asked.append(request)
        for known, step in self.before.items():
            if re.fullmatch(known, request):
                step()
        for known, answers in self.wrong.items():
            if answers and re.fullmatch(known, request):
                return answers.pop(0)
        return None

    def find(self, word: str) -> Container | None:
        return next((one for one in self.containers.values() if word in {one.id, one.name}), None)

    def start(self, container: Container) -> None:
        def live() -> None:
            try:
                container.status = self.run(container)
            finally:
                container.ended.set()

        container.started.set()
        threading.Thread(target=live, daemon=True).start()


@contextlib.contextmanager
def engine_at(path: Path, run: Callable[[Container], int]) -> Iterator[Engine]:
    """Serve an engine at a socket file until the block ends."""
    engine = Engine(run)
    engine.address = f"unix://{path}"
    kind = type("Server", (socketserver.ThreadingUnixStreamServer,), {"daemon_threads": True, "engine": engine})
    with kind(str(path), _Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield engine
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        self.engine: Engine = self.server.engine  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        path = re.sub(r"^/v[0-9.]+", "", unquote(url.path))
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = json.loads(self.rfile.read(length)) if length else {}
        wrong = self.engine.answer(f"{self.command} {path}")
        if wrong == BREAK_OFF:
            self.close_connection = True
        elif wrong is not None:
            self._json(*wrong)
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._route(path)

    def _route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        match (self.command, *parts):
            case ("GET", "_ping"):
                self._json(200, "OK")
            case ("GET", "version"):
                self._json(200, self.engine.version)
            case ("GET", "info"):
                self._json(200, self.engine.info)
            case ("GET", "images", *name, "json"):
                found = self.engine.images.get("/".join(name))
                self._json(*((200, found) if found else (404, {"message": "No such image"})))
            case ("POST", "images", "create"):
                self._pull()
            case ("GET", "containers", "json"):
                wanted = json.loads(self.query["filters"])["label"]
                listed = [
                    {"Id": one.id, "Labels": one.labels}
                    for one in self.engine.containers.values()
                    if {f"{name}={value}" for name, value in one.labels.items()} >= set(wanted)
                ]
                self._json(200, listed)
            case ("POST", "containers", "create") if wrong := engine_spec.problems(self.body):
                self._json(400, {"message": "; ".join(wrong)})
            case ("POST", "containers", "create"):
                number = str(len(self.engine.made) + 1) * 12
                made = Container(number, self.query["name"], self.body)
                self.engine.containers[number] = made
                self.engine.made.append(made)
                self._json(201, {"Id": number, "Warnings": []})
            case (_, "containers", word, *verb):
                found = self.engine.find(word)
                if found is None:
                    self._json(404, {"message": f"No such container: {word}"})
                else:
                    self._container(found, "/".join(verb))
            case _:
                self._json(404, {"message": f"page not found: {path}"})

    def _container(self, container: Container, verb: str) -> None:
        match (self.command, verb):
            case ("GET", "json"):
                state = {"OOMKilled": container.out_of_memory}
                self._json(200, {"Id": container.id, "Config": {"Tty": False}, "State": state})
            case ("POST", "attach"):
                self._head(101, Connection="Upgrade", Upgrade="tcp")
                container.line = self.rfile.readline()
                container.handed.set()
                self.close_connection = True
            case ("POST", "start"):
                self.engine.start(container)
                self._json(204, None)
            case ("GET", "logs"):
                container.ended.wait(PATIENCE_S)
                self._head(200, Connection="close")
                for piece in (container.said[:7], container.said[7:]):
                    self.wfile.write(struct.pack(">BxxxL", STDOUT, len(piece)) + piece)
                self.close_connection = True
            case ("POST", "wait"):
                container.ended.wait(PATIENCE_S)
                self._json(200, {"StatusCode": container.status})
            case ("POST", "stop"):
                container.told_to_stop.set()
                container.ended.wait(PATIENCE_S)
                self._json(204, None)
            case ("DELETE", ""):
                container.told_to_stop.set()
                del self.engine.containers[container.id]
                self._json(204, None)

    def _pull(self) -> None:
        name, tag = self.query["fromImage"], self.query["tag"]
        self._head(200, **{"Transfer-Encoding": "chunked"})
        for event in self.engine.pull_says:
            line = json.dumps(event).encode() + b"\r\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        for full in (f"{name}:{tag}", f"{name}@{tag}"):
            if full in self.engine.can_pull:
                self.engine.images[full] = self.engine.can_pull[full]
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _json(self, status: int, value: object) -> None:
        body = b"" if status == 204 else json.dumps(value).encode()
        self._head(status, **{"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)
