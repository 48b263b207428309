"""Limits the requests that the gate makes with huggingface_hub's HTTP client: their time, size, and targets.

In: the client (of httpx or httpx2), and the sizes that the Hub lists. Out: the same client. Requests of other code in
the process stay as they are. It uses only the standard library.
"""

from __future__ import annotations

import contextvars
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from merge_gate._internal.errors import ResolveError
from merge_gate._internal.text import COMMIT, is_inside
from merge_gate.limits.timeout import within

REQUEST_TIMEOUT_S = 60.0
"""For the headers of any answer, and for the whole answer of an API."""

LEAST_BYTES_PER_S = 64 << 10
"""How fast the bytes of a file must arrive, over each REQUEST_TIMEOUT_S."""

LISTING_TIMEOUT_S = 600.0
"""For all requests of one call that lists files, which come in pages."""

AGENT = "merge-gate"
MOST_API_BYTES = 64 << 20
_SPARE_BYTES = 1 << 10
"""A small file may be larger while it is compressed."""

_TOO_MANY = 429

MOST_BYTES = "merge_gate_most_bytes"
"""The extension of a request that limits the body of its answer. It stays with the request when it is redirected."""


class ConnectError(ConnectionError):
    """Replaces the client's own error, after which huggingface_hub would go on with a new client without limits."""


def limit_requests(client: Any, sizes: Mapping[str, int] | None = None) -> None:
    """Limit the requests of this client whose User-Agent is the gate's. A client that is limited already stays so.

    `sizes` are the most bytes of files, by the paths of their addresses. The thread that asks for a file's headers is
    the one that downloads it, as in huggingface_hub.

    An answer beyond a limit raises a `ResolveError` from the request, or from the reading of its body. The library does
    not repeat it.
    """
    if not isinstance(client.send, _LimitedSend):
        client.send = _LimitedSend(client)
    client.send.begin(sizes or {})


class _LimitedSend:
    def __init__(self, client: Any) -> None:
        self._send = client.send
        self._sizes: dict[str, int] = {}
        self._thread = threading.local()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _check_target],
            "response": [*hooks["response"], _limit_answer],
        }

    def begin(self, sizes: Mapping[str, int]) -> None:
        self._sizes.update(sizes)
        self._thread.listing_ends = time.monotonic() + LISTING_TIMEOUT_S

    def __call__(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        if not request.headers.get("User-Agent", "").startswith(f"{AGENT}/"):
            return self._send(request, stream=stream, **options)
        most, ends = self._limits(request, is_file=stream)
        request.extensions = {**request.extensions, MOST_BYTES: most}
        if time.monotonic() > ends:
            raise _refused(request, "does not come to an end")
        context = contextvars.copy_context()
        try:
            return within(REQUEST_TIMEOUT_S, lambda: context.run(self._send, request, stream=stream, **options))
        except TimeoutError as error:
            raise _refused(request, "does not answer in time") from error
        except Exception as error:
            if type(error).__name__ != ConnectError.__name__:
                raise
            raise ConnectError(str(error)) from error

    def _limits(self, request: Any, *, is_file: bool) -> tuple[int, float]:
        """The most bytes of the answer, and the time after which no such request may begin."""
        if MOST_BYTES in request.extensions:
            return request.extensions[MOST_BYTES], float("inf")
        listed = self._sizes.get(request.url.path)
        if listed is not None:
            most = listed + _SPARE_BYTES
            self._thread.file = most, time.monotonic() + 2 * (REQUEST_TIMEOUT_S + most / LEAST_BYTES_PER_S)
        if is_file:
            return getattr(self._thread, "file", (MOST_API_BYTES, float("inf")))
        return MOST_API_BYTES, getattr(self._thread, "listing_ends", float("inf"))


def _refused(request: Any, what: str) -> ResolveError:
    return ResolveError(f"{request.url.host} {what}", hint="run again later; check HF_ENDPOINT and any proxy")


def _check_target(request: Any) -> None:
    if MOST_BYTES in request.extensions and request.url.scheme not in {"http", "https"}:
        raise ResolveError("the server redirects to an address without http", hint="check HF_ENDPOINT and any proxy")


def _limit_answer(answer: Any) -> None:
    """Limit the body of an answer, and the headers from which huggingface_hub makes a path or a pause."""
    most = answer.request.extensions.get(MOST_BYTES)
    if most is None:
        return
    headers = answer.headers
    if answer.request.method == "HEAD":
        tags = [headers.get(name, "x").removeprefix("W/").strip('"') for name in ("ETag", "X-Linked-ETag")]
        is_safe = COMMIT.fullmatch(headers.get("X-Repo-Commit", "0" * 40)) and all(map(is_inside, tags))
        if not is_safe or "/" in "".join(tags):
            raise _refused(answer.request, "answers with a commit or an ETag that is no digest")
    reset = re.search(r"\bt\s*=\s*(\d+)", headers.pop("RateLimit", "")) if answer.status_code == _TOO_MANY else None
    pause_s = reset[1] if reset else headers.pop("Retry-After", "")
    if pause_s.isascii() and pause_s.isdecimal():
        headers["Retry-After"] = f"{min(float(pause_s), REQUEST_TIMEOUT_S):.0f}"
    raw, whole = answer.iter_raw, answer.iter_bytes

    def iter_raw(chunk_size: int | None = None) -> Iterator[bytes]:
        with _least_rate(answer) as received:
            yield from _counted(answer, raw(chunk_size), most, received)

    answer.iter_raw = iter_raw
    answer.iter_bytes = lambda chunk_size=None: _counted(answer, whole(chunk_size), most, [0])  # decompressed


def _counted(answer: Any, parts: Iterator[bytes], most: int, received: list[int]) -> Iterator[bytes]:
    """The parts of a body, and their bytes in all in `received`."""
    for part in parts:
        received[0] += len(part)
        if received[0] > most:
            raise _refused(answer.request, f"sends more than the {most:,} bytes that this file can have")
        yield part


@contextmanager
def _least_rate(answer: Any) -> Iterator[list[int]]:
    """Close the connection if too few bytes arrive, even if they are of no whole chunk and no one can count them."""
    received = [0]
    is_over, is_slow = threading.Event(), threading.Event()

    def watch() -> None:
        before = 0
        while not is_over.wait(REQUEST_TIMEOUT_S):
            if received[0] - before < LEAST_BYTES_PER_S * REQUEST_TIMEOUT_S:
                is_slow.set()
                with suppress(Exception):  # it is closed already, or the client has another transport
                    answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                return
            before = received[0]

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield received
    except Exception:
        if not is_slow.is_set():
            raise
    finally:
        is_over.set()
    if is_slow.is_set():
        raise _refused(answer.request, f"sends less than {LEAST_BYTES_PER_S >> 10} KiB/s for {REQUEST_TIMEOUT_S:g} s")
