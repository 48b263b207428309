"""A Hub on the loopback interface with bases of any size that are on no disk: their bytes are computed.

    python benchmarks/hub_server.py PORT [--rate MB_PER_S] [--latency MS] SIZE …

In: sizes of make_base.py. Serves `bench/SIZE` at one commit: config.json, an index, and shards whose headers are true
and whose values repeat one pool of normal numbers in bfloat16. It answers as the real Hub does for what a client needs:
the description of a repository, metadata of files, a redirect to another host for weights, and ranges. `--rate` limits
all connections together. Digests of the shards are computed once, and kept in a file in the temporary directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from make_base import SIZES, config, linear_shapes

POOL_BYTES = 1 << 26
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 1 << 20
COMMIT = hashlib.sha1(b"bench").hexdigest()
INDEX = "model.safetensors.index.json"


def _pool() -> bytes:
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(POOL_BYTES // 2, generator=generator) * 0.02).bfloat16()
    return numbers.view(torch.uint8).numpy().tobytes()


POOL = memoryview(_pool() * 2)


@dataclass(frozen=True)
class Shard:
    """A file: its header, and so many bytes of the pool."""

    header: bytes
    data_bytes: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes

    def pieces(self, start: int, end: int):
        """The bytes from `start` to `end`, as views."""
        if start < len(self.header):
            yield memoryview(self.header)[start:end]
            start = len(self.header)
        while start < end:
            place = (start - len(self.header)) % POOL_BYTES
            piece = POOL[place : place + min(PIECE_BYTES, end - start)]
            yield piece
            start += len(piece)


def tensors_of(size: dict[str, int]):
    hidden, vocab = size["hidden"], size["vocab"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(size["layers"]):
        for name, shape in linear_shapes(size).items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _shard(tensors: list[tuple[str, tuple[int, ...]]]) -> Shard:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return Shard(len(text).to_bytes(8, "little") + text, end)


def repository(name: str) -> tuple[dict[str, bytes], dict[str, Shard]]:
    """The small files and the shards of a base."""
    groups, held = [[]], 0
    for tensor, shape in tensors_of(SIZES[name]):
        size = 2 * torch.Size(shape).numel()
        if groups[-1] and held + size > SHARD_BYTES:
            groups, held = [*groups, []], 0
        groups[-1].append((tensor, shape))
        held += size
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    shards = {file: _shard(group) for file, group in zip(files, groups, strict=True)}
    placed = {tensor: file for file, group in zip(files, groups, strict=True) for tensor, _ in group}
    index = {"metadata": {"total_size": sum(one.data_bytes for one in shards.values())}, "weight_map": placed}
    small = {"config.json": json.dumps(config(SIZES[name])).encode(), INDEX: json.dumps(index).encode()}
    return small, shards


def sha256(shard: Shard) -> str:
    digest = hashlib.sha256()
    for piece in shard.pieces(0, shard.size):
        digest.update(piece)
    return digest.hexdigest()


def digests_of(shards: dict[str, Shard]) -> dict[str, str]:
    key = hashlib.sha256(b"".join(one.header for one in shards.values())).hexdigest()[:16]
    kept = Path(tempfile.gettempdir(), f"merge-gate-bench-{key}.json")
    if not kept.exists():
        with ProcessPoolExecutor() as pool:
            kept.write_text(json.dumps(dict(zip(shards, pool.map(sha256, shards.values()), strict=True))))
    return json.loads(kept.read_text())


class Rate:
    """So many bytes a second over all connections."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._lock, self._free_at = bytes_per_s, threading.Lock(), 0.0

    def wait_for(self, count: int) -> None:
        if not self._bytes_per_s:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + count / self._bytes_per_s
            wait_s = self._free_at - time.perf_counter()
        time.sleep(max(0.0, wait_s))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, tuple[dict[str, bytes], dict[str, Shard], dict[str, str]]]
    rate: Rate
    latency_s: float

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        time.sleep(self.latency_s)
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/models/bench/([^/]+)(?:/revision/[^/]+)?", path):
            self.describe(match[1])
        elif match := re.fullmatch(r"/api/models/bench/([^/]+)/tree/[^/]+", path):
            self.answer(200, json.dumps(self.entries(match[1])).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/bench/([^/]+)/resolve/[^/]+/(.+)", path):
            self.resolve(match[1], match[2])
        elif match := re.fullmatch(r"/cdn/([^/]+)/(.+)", path):
            self.weights(self.repositories[match[1]][1][match[2]])
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def entries(self, name: str) -> list[dict]:
        small, shards, digests = self.repositories[name]
        return [
            {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}
            for file, content in small.items()
        ] + [
            {"type": "file", "path": file, "size": one.size, "oid": digests[file][:40]}
            | {"lfs": {"oid": digests[file], "size": one.size, "pointerSize": 134}}
            for file, one in shards.items()
        ]

    def describe(self, name: str) -> None:
        siblings = [
            {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
            | ({"lfs": {"sha256": one["lfs"]["oid"], "size": one["size"], "pointerSize": 134}} if "lfs" in one else {})
            for one in self.entries(name)
        ]
        info = {"id": f"bench/{name}", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
        self.answer(200, json.dumps(info | {"tags": []}).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, file: str) -> None:
        small, shards, digests = self.repositories[name]
        if file in small:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(small[file])}"', "Accept-Ranges": "bytes"}
            self.answer(200, small[file], headers)
        elif file in shards:
            port = self.server.server_address[1]
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{digests[file][:40]}"',
                "X-Linked-Size": str(shards[file].size),
                "X-Linked-ETag": f'"{digests[file]}"',
                "Location": f"http://localhost:{port}/cdn/{name}/{file}",
            }
            self.answer(302, b"", headers)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def weights(self, shard: Shard) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else shard.size
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{shard.size}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            for piece in shard.pieces(start, end):
                self.rate.wait_for(len(piece))
                self.wfile.write(piece)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("sizes", nargs="+", choices=SIZES)
    parser.add_argument("--rate", type=float, default=0.0, help="megabytes a second; 0: no limit")
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds before each answer")
    asked = parser.parse_args()
    Handler.repositories = {}
    for name in asked.sizes:
        small, shards = repository(name)
        Handler.repositories[name] = small, shards, digests_of(shards)
    Handler.rate, Handler.latency_s = Rate(asked.rate * 1e6), asked.latency / 1e3
    print("ready", flush=True)
    Server(("127.0.0.1", asked.port), Handler).serve_forever(poll_interval=0.5)


if __name__ == "__main__":
    main()
