"""A GitHub on the loopback interface that knows what recipes/comment.yml asks: pulls, artifacts of a run, comments.

In: pull requests and artifacts. Out: `comments`, and every request. It speaks TLS, since gh speaks nothing else.
"""

import contextlib
import io
import json
import re
import ssl
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

BOT = "github-actions[bot]"


@dataclass
class GitHub:
    """One repository. `artifacts` are those of the one run; `comments` those of the one pull request."""

    pulls: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    comments: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    redirect: str = ""
    """Another host's address, to which every request is sent on."""
    tokens: list[str | None] = field(default_factory=list)

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> Any:
        """JSON, bytes, or None where there is no such thing."""
        if path.endswith("/pulls"):
            return [one for one in self.pulls if [one["head"]["label"]] == query["head"]]
        if path.endswith("/artifacts"):
            listed = [{"name": name, "size_in_bytes": 1, "expired": False, "id": number,
                       "archive_download_url": f"{self.url}/zip/{name}"}
                      for number, name in enumerate(self.artifacts)]  # fmt: skip
            return {"total_count": len(listed), "artifacts": listed}
        if found := re.search(r"/zip/(.+)$", path):
            return self.artifacts[found[1]]
        if path.endswith("/comments"):
            if method == "POST":
                self.comments.append({"id": len(self.comments) + 1, "user": {"login": BOT}, "body": body["body"]})
            return self.comments
        if found := re.search(r"/comments/(\d+)$", path):
            self.comments[int(found[1]) - 1]["body"] = body["body"]
            return {}
        return None


def archive(**files: str) -> bytes:
    """A zip. A text that begins with `->` is a symbolic link."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as opened:
        for name, text in files.items():
            info = zipfile.ZipInfo(name.replace("__", "."))
            info.external_attr = (0o120777 if text.startswith("->") else 0o100644) << 16
            opened.writestr(info, text.removeprefix("->"))
    return held.getvalue()


@contextlib.contextmanager
def serving(github: GitHub, directory: Path) -> Iterator[Path]:
    """Serve it until the block ends; the value is the certificate to trust, and `github.url` the address."""
    key, certificate = directory / "key.pem", directory / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            split = urlsplit(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            github.requests.append(f"{self.command} {split.path}")
            github.tokens.append(self.headers.get("Authorization"))
            if github.redirect:
                self.send_response(302)
                self.send_header("Location", github.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            found = github.answer(self.command, split.path, parse_qs(split.query), body)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(200 if found is not None else 404)
            self.send_header("Content-Type", "application/zip" if isinstance(found, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = handle_any  # noqa: N815 (http.server's names)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        github.url = f"https://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield certificate
        server.shutdown()
