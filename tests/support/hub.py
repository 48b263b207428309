"""A Hub on the loopback interface, which speaks what huggingface_hub asks of the real one.

In: repositories as mappings of file names to bytes. Out: `LoopbackHub`, a context manager whose `url` goes into
HF_ENDPOINT, with a log of all `requests`. Knows nothing of merge_gate.

Modelled on the Hub's answers: X-Repo-Commit and ETag on files, X-Linked-ETag and a redirect for Git LFS files,
X-Error-Code on errors; 401 for a repository that does not exist or may not be seen, metadata but no files for a gated
one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LONGEST_STALL_S = 120.0
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx")


@dataclass
class Repo:
    """`commits` holds every state that the repository ever had; `refs` names some of them."""

    gated: bool = False
    private: bool = False
    token: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Failure:
    """The next `times` requests whose path matches `pattern` get this answer instead of theirs, or a damaged body.

    `stall`: the first half, and no more. `cut`: the first half, and the end of the connection. `short`: the first half,
    said to be all of it. `other`: as many bytes, of which the last is another. `silence`: not even a status line.
    `whole`: a requested range is ignored. `shifted`: the range is another one than requested. `excess`: more bytes than
    the range has. `packed`: said to be compressed. `byte`: one byte, and the end of the connection. `drip`: a byte at a
    time, and `drip-chunk`: the digits of a chunk's size so. `endless`: more bytes, without end.
    """

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    damage: str = ""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    host: str


class LoopbackHub:
    """`with LoopbackHub() as hub: hub.add_repo("acme/lora", {...}); run(HF_ENDPOINT=hub.url)`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.ranges: list[str] = []
        self.failures: list[Failure] = []
        self.damages: list[Failure] = []
        self.is_over = threading.Event()
        self.tokens: set[str] = set()
        self.on_request: Callable[[str], object] = lambda path: path
        self.unsaid: set[str] = set()
        """Keys that a repository's description lacks here, as on a mirror that knows less than the real Hub."""
        self.ignored: set[str] = set()
        """Files that an upload leaves out, as those that a .gitignore names."""
        self.dripping = ""
        """The requests whose path matches get their headers a character at a time, without end."""
        self.overrides: dict[str, Any] = {}
        """What a repository's description says instead."""
        self.file_headers: dict[str, str] = {}
        """Headers of files that this Hub sends instead of its own."""
        self.next_page = ""
        """The path and the query of the next page of every listing of files."""
        self.cdn_headers: dict[str, str] = {}
        """More headers of files in Git LFS."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn_url = f"http://localhost:{port}"
        """Another host, as on the real Hub: the client must not send its token."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve_this_process(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let huggingface_hub in this process ask this Hub, and keep files in `cache`."""
        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
        refs: tuple[str, ...] = ("main",),
    ) -> str:
        """The hash of a new commit with exactly these files, to which `refs` move. `token` opens a closed one."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated, repo.private, repo.token = gated, private, token
        listing = sorted((name, _sha1(content)) for name, content in files.items())
        commit = hashlib.sha1(json.dumps([repo_id, listing, len(repo.commits)]).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs.update(dict.fromkeys(refs, commit))
        if token:
            self.tokens.add(token)
        return commit

    def fail(self, pattern: str, status: int, *, times: int = 10**6, **headers: str) -> None:
        renamed = {key.replace("_", "-"): value for key, value in headers.items()}
        self.failures.append(Failure(pattern, times, status, renamed))

    def damage(self, pattern: str, kind: str, *, times: int = 10**6) -> None:
        self.damages.append(Failure(pattern, times, damage=kind))

    def paths(self, method: str | None = None) -> list[str]:
        return [request.path for request in self.requests if method in {None, request.method}]

    def next_of(self, listed: list[Failure], path: str) -> Failure | None:
        with self._lock:
            for one in listed:
                if one.times > 0 and re.search(one.pattern, path):
                    one.times -= 1
                    return one
        return None

    def next_damage(self, path: str) -> str:
        failure = self.next_of(self.damages, path)
        return failure.damage if failure else ""


def files_of(directory: Path, **config: str) -> dict[str, bytes]:
    """The files of a directory, for `add_repo`; an adapter's config gets other values."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    if config:
        known = json.loads(files["adapter_config.json"])
        files["adapter_config.json"] = json.dumps(known | config).encode()
    return files


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def _described(content: bytes, name: str, key: str, digest: str, hashed: str) -> dict[str, Any]:
    """A file, under the keys of a tree or of a repository's description."""
    entry: dict[str, Any] = {key: name, "size": len(content), digest: _sha1(content)}
    if _is_lfs(name):
        entry["lfs"] = {hashed: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class _RefusalError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        """The log is `requests`."""

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, self._token(), self.headers.get("Host") or ""))
        self.hub.on_request(path)
        if self.hub.dripping and re.search(self.hub.dripping, path):
            self._drip(b"HTTP/1.1 200 OK\r\nX-Padding: ", b"x")
            return
        if path.startswith("/api/") and (kind := self.hub.next_damage(path)):
            self._send_damaged(kind, 200, b"{}", {})
            return
        if failure := self.hub.next_of(self.hub.failures, path):
            self._send(failure.status, b"", failure.headers)
            return
        try:
            if self.command == "POST":
                self._route_post(path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            else:
                self._route(path)
        except _RefusalError as refusal:
            self._send(refusal.status, b"", refusal.headers)

    do_HEAD = do_GET = do_POST = _respond  # noqa: N815 - http.server's names

    def _route(self, path: str) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._send_info(match[1], unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._send_tree(match[1], unquote(match[2]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._send_content(self.hub.repos[match[1]].commits[match[2]][unquote(match[3])], self.hub.cdn_headers)
        else:
            raise _RefusalError(404, "", "Sorry, we can't find the page you are looking for.")

    def _route_post(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular"}
            files = [mode | {"path": name, "shouldIgnore": name in self.hub.ignored} for name in names]
            self._send_json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            raise _RefusalError(404, "", "Sorry, we can't find the page you are looking for.")

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        repo, head = self._find(repo_id, "main")
        if not repo.token or self._token() != repo.token:
            raise _RefusalError(401, "", "Invalid credentials")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in {None, head}:
                raise _RefusalError(412, "", "A commit has happened since. Please refresh and try again.")
            if line["key"] == "deletedFile":
                del files[value["path"]]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.add_repo(repo_id, files, token=repo.token)
        self._send_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme == "Bearer" else None

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str]:
        token = self._token()
        if token and token not in self.hub.tokens:
            raise _RefusalError(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token != repo.token):
            raise _RefusalError(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = repo.find(revision)
        if commit is None:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _send_info(self, repo_id: str, revision: str) -> None:
        repo, commit = self._find(repo_id, revision)
        files = repo.commits[commit].items()
        siblings = [self._said(_described(content, name, "rfilename", "blobId", "sha256")) for name, content in files]
        info = {"id": repo_id, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": siblings}
        self._send_json(self._said(info | {"tags": [], "downloads": 0, "likes": 0} | self.hub.overrides))

    def _said(self, described: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in described.items() if key not in self.hub.unsaid}

    def _send_tree(self, repo_id: str, revision: str) -> None:
        repo, commit = self._find(repo_id, revision)
        files = repo.commits[commit]
        folders = sorted({name.rpartition("/")[0] for name in files if "/" in name})
        tree = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        tree += [{"type": "file"} | _described(files[name], name, "path", "oid", "oid") for name in sorted(files)]
        self._send_json(
            tree, {"Link": f'<{self.hub.url}{self.hub.next_page}>; rel="next"'} if self.hub.next_page else {}
        )

    def _send_file(self, repo_id: str, revision: str, name: str) -> None:
        repo, commit = self._find(repo_id, revision)
        if repo.gated and self._token() != repo.token:
            raise _RefusalError(403 if self._token() else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if name not in repo.commits[commit]:
            raise _RefusalError(404, "EntryNotFound", "Entry not found")
        content = repo.commits[commit][name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(content)}"'}
        if "Location" in self.hub.file_headers:
            self._send(302, b"", headers | self.hub.file_headers)
            return
        if _is_lfs(name):
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Location": f"{self.hub.cdn_url}/cdn/{repo_id}/{commit}/{name}",
            }
        headers |= self.hub.file_headers
        if _is_lfs(name):
            self._send(302, b"", headers)
        else:
            self._send_content(content, headers)

    def _send_content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range") or ""
        self.hub.ranges += [asked] if asked else []
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        begin, end = 0, len(content)
        status, place = 200, {"Accept-Ranges": "bytes"}
        kind = self.hub.next_damage(urlsplit(self.path).path) if self.command == "GET" else ""
        if found and kind != "whole":
            begin, end = int(found[1]), min(int(found[2]) + 1, end) if found[2] else end
            status, place = 206, {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        if kind == "shifted":
            place = {"Content-Range": f"bytes {begin + 1}-{end}/{len(content)}"}
        if kind == "packed":
            place["Content-Encoding"] = "gzip"
        if kind == "excess":
            self._send(status, content[begin : end + 10], headers | place)
        elif kind and kind not in {"whole", "shifted", "packed"}:
            self._send_damaged(kind, status, content[begin:end], headers | place)
        else:
            self._send(status, content[begin:end], headers | place)

    def _send_json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._begin(status, headers | {"Content-Length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _drip(self, first: bytes, more: bytes) -> None:
        """Send `more` without end: large parts as fast as they are taken, and others slowly."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(first)
            while more and not self.hub.is_over.wait(0.02 if len(more) == 1 else 0):
                self.wfile.write(more)

    def _send_damaged(self, kind: str, status: int, content: bytes, headers: dict[str, str]) -> None:
        half, whole_length = content[: len(content) // 2], headers | {"Content-Length": str(len(content))}
        if kind == "short":
            self._send(status, half, headers)
        elif kind == "other":
            self._send(status, content[:-1] + bytes([content[-1] ^ 1]), headers)
        elif kind in {"endless", "drip-chunk"}:
            self._begin(status, headers | {"Transfer-Encoding": "chunked"})
            more = b"10000\r\n" + bytes(65_536) + b"\r\n"
            self._drip(content[:1] and b"1\r\n" + content[:1] + b"\r\n", more if kind == "endless" else b"0")
        elif kind in {"byte", "drip"}:
            self._begin(status, whole_length)
            self._drip(content[:1], content[:1] if kind == "drip" else b"")
        else:
            self.close_connection = True
            if kind != "silence":
                self._begin(status, whole_length)
                self.wfile.write(half)
                self.wfile.flush()
            if kind != "cut":
                self.hub.is_over.wait(LONGEST_STALL_S)


def _handler_of(hub: LoopbackHub) -> type[_Handler]:
    return type("Handler", (_Handler,), {"hub": hub})
