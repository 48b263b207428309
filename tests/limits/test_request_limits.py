"""A Hub on the loopback interface that drips, floods, and names places outside of the cache; reads that do not end."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, constants

from merge_gate._internal.errors import GateError, ResolveError, SourceError
from merge_gate.features.stream import hub_file
from merge_gate.features.stream.hub_file import HubFile
from merge_gate.files import base_watch
from merge_gate.files import hub as hub_module
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.resolve import resolve_adapter
from merge_gate.limits import request_limits
from merge_gate.limits.timeout import within
from merge_gate.records.config import AdapterSpec, BaseSpec
from tests.support.hub import LoopbackHub
from tests.support.tried import tried

TENSORS = b"\x02\0\0\0\0\0\0\0{}"
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": TENSORS + bytes(100_000)}
LORA, TOKEN = "acme/lora", "hf_loopback"
TIMEOUT_S = 1.0
PATIENCE_S = 30.0
"""More than a few limits, on a busy machine, and less than any of the library's own retries without end."""


@pytest.fixture
def hub(variables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        variables["HF_TOKEN"] = TOKEN
        hub.serve_this_process(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_file, "LONGEST_PAUSE_S", 0.0)
        monkeypatch.setattr(hub_module, "PAUSES_S", (0.01, 0.02))
        monkeypatch.setattr(request_limits, "REQUEST_TIMEOUT_S", TIMEOUT_S)
        hub.add_repo(LORA, ADAPTER, private=True, token=TOKEN)
        yield hub


def fetched() -> Path:
    spec = AdapterSpec(name="a", source=LORA, hub_id=LORA, base=BaseSpec(), checks=(), line=1, column=1)
    return Path(resolve_adapter(spec).directory)


def refused(call: Any, kind: type[GateError]) -> float:
    """The seconds until the call raised this error."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    took = time.monotonic() - began
    assert took < PATIENCE_S
    return took


def opened(hub: LoopbackHub, name: str = "adapter_model.safetensors") -> HubFile:
    return HubFile(LORA, hub.repos[LORA].refs["main"], name)


def read(file: HubFile) -> None:
    file.read_into(0, memoryview(bytearray(file.size_bytes)))


@pytest.mark.attempt("S00", "a Hub as it should be: a download and a stream", "passes; the token goes to the Hub alone")
@pytest.mark.attempt("S05", "the Hub redirects weights to another host", "the token stays")
@pytest.mark.attempt("S15", "a download that is redirected to another host", "the token stays")
def test_a_sound_hub_is_not_limited(hub: LoopbackHub) -> None:
    folder = fetched()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ADAPTER
    read(opened(hub))
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} == {None}
    assert {request.token for request in hub.requests if not request.path.startswith("/cdn/")} == {TOKEN}


@pytest.mark.attempt("S05b", "the API redirects to another host", "the token stays")
@pytest.mark.attempt("S05c", "a small file is redirected to another host", "the token stays")
def test_the_token_follows_no_redirect(hub: LoopbackHub) -> None:
    hub.file_headers = {"Location": f"{hub.cdn_url}/elsewhere"}
    refused(fetched, ResolveError)
    hub.fail(f"/api/models/{LORA}$", 302, times=1, Location=f"{hub.cdn_url}/api/models/{LORA}")
    refused(fetched, ResolveError)
    hosts = {request.token for request in hub.requests if request.host == urlsplit(hub.cdn_url).netloc}
    assert hosts == {None}


API, CONFIG = r"/api/models/acme/lora$", r"/resolve/.*json$"
ENDLESS = {
    "the answer of the API, endless": (API, "endless"),
    "the answer of the API, drip": (API, "drip"),
    "the list of files, endless": ("/tree/", "endless"),
    "adapter_config.json, endless": (CONFIG, "endless"),
    "adapter_config.json, drip": (CONFIG, "drip"),
    "adapter_config.json, drip-chunk": (CONFIG, "drip-chunk"),
    "downloaded weights, endless": ("/cdn/", "endless"),
    "downloaded weights, drip": ("/cdn/", "drip"),
    "downloaded weights, drip-chunk": ("/cdn/", "drip-chunk"),
}


@pytest.mark.parametrize("damage", tried("S02", "a download without end", "error in time", ENDLESS))
def test_a_download_without_end_is_an_error(damage: tuple[str, str], hub: LoopbackHub, tmp_path: Path) -> None:
    hub.damage(*damage)
    refused(fetched, ResolveError)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 300_000


@pytest.mark.attempt("S02k", "what huggingface_hub asks for its statistics has no end", "it is not asked")
def test_the_hub_is_asked_only_for_what_a_run_needs(hub: LoopbackHub) -> None:
    hub.dripping = "agent-harnesses"
    fetched()
    assert "/api/agent-harnesses" not in hub.paths()


@pytest.mark.attempt("S02j", "a list of files whose pages have no end", "error in time")
def test_pages_without_end_are_an_error(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "LISTING_TIMEOUT_S", TIMEOUT_S)
    hub.next_page = f"/api/models/{LORA}/tree/{hub.repos[LORA].refs['main']}?cursor=x"
    refused(fetched, ResolveError)


DRIPPING = {
    "the API": "/api/models",
    "a list of files": "/tree/",
    "a small file": "/resolve/.*json",
    "downloaded weights": "/cdn/",
}


@pytest.mark.parametrize("pattern", tried("S03", "headers that drip", "error in time", DRIPPING))
def test_headers_that_drip_are_an_error(pattern: str, hub: LoopbackHub) -> None:
    hub.dripping = pattern
    refused(fetched, ResolveError)


@pytest.mark.attempt("S03e", "headers of the resolver of a streamed base drip", "error in time")
@pytest.mark.attempt("S03f", "headers of a streamed base's weights drip", "error in time")
def test_headers_of_a_stream_that_drip_are_an_error(hub: LoopbackHub) -> None:
    file = opened(hub)
    hub.dripping = "/cdn/"
    refused(lambda: read(file), SourceError)
    hub.dripping = "/resolve/"
    refused(lambda: opened(hub), SourceError)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.attempt(f"S03{letter}", f"streamed weights: {kind}", "error in time"))
        for letter, kind in (("g", "drip"), ("h", "drip-chunk"), ("i", "byte"), ("j", "endless"))
    ],
)
def test_a_stream_that_is_too_slow_is_an_error(kind: str, hub: LoopbackHub) -> None:
    file = opened(hub)
    hub.damage("/cdn/", kind)
    refused(lambda: read(file), SourceError)


LOCATIONS = ("file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)", "unix:///run/x", "data:,x")


@pytest.mark.parametrize("location", tried("S04", "a redirect", "error at once", LOCATIONS))
def test_a_redirect_that_leaves_the_web_fails_at_once(location, hub) -> None:
    hub.file_headers = {"Location": location, "X-Linked-Size": "100", "X-Linked-ETag": '"' + "0" * 64 + '"'}
    for call, error in ((fetched, ResolveError), (lambda: read(opened(hub)), SourceError)):
        hub.requests.clear()
        refused(call, error)
        resolved = [path for path in hub.paths() if "/resolve/" in path]
        assert len(resolved) == len(set(resolved)), "nothing is tried again"


COMMITS = (
    "../../../../elsewhere", "/tmp/elsewhere", "..", "a/b", "main", "0" * 39, "0" * 41, "A" * 40, "0" * 64,
    "0" * 5_000, "",
)  # fmt: skip


@pytest.mark.parametrize(
    "commit", tried("S06", "the commit", "error, no file", {repr(commit[:44]): commit for commit in COMMITS})
)
def test_a_commit_that_is_none_is_refused(commit: str, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.overrides = {"sha": commit}
    refused(fetched, ResolveError)
    assert list(tmp_path.iterdir()) == []


HEADERS = (
    ("X-Repo-Commit", "../../../../elsewhere"),
    ("X-Repo-Commit", "/elsewhere"),
    ("ETag", '"../../../elsewhere"'),
    ("ETag", 'W/"../../../elsewhere"'),
    ("ETag", '".."'),
    ("ETag", '"' + "x" * 300 + '"'),
    ("X-Linked-ETag", "../../../elsewhere"),
)


@pytest.mark.parametrize(
    "header",
    tried("S06b", "a header", "error, no file", {f"{name}: {value}"[:60]: (name, value) for name, value in HEADERS}),
)
def test_a_header_that_becomes_a_path_is_checked(header: tuple[str, str], hub: LoopbackHub, tmp_path: Path) -> None:
    hub.file_headers = dict([header])
    refused(fetched, ResolveError)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not list(tmp_path.rglob("*elsewhere*"))


@pytest.mark.attempt("S06bh", "the second answer of the API has another commit than the first", "the first counts")
def test_a_commit_is_asked_for_once(hub: LoopbackHub) -> None:
    assert fetched().name == hub.repos[LORA].refs["main"]
    assert hub.paths().count(f"/api/models/{LORA}") + hub.paths().count(f"/api/models/{LORA}/revision/main") == 1


NAMES = ("../x.json", "/etc/x.json", "a/../x", "./a", "a//b", "a\\b", "a\0b", "\ud800")


@pytest.mark.parametrize("name", tried("S07", "a repository lists", "error", {ascii(name): name for name in NAMES}))
def test_a_listed_name_that_leads_elsewhere_is_refused(name: str, hub: LoopbackHub) -> None:
    listed = [{"rfilename": each, "size": 1} for each in (*ADAPTER, name)]
    hub.overrides = {"siblings": listed}
    refused(fetched, ResolveError)


PAUSES = (
    {"Retry_After": "1000000000"}, {"Retry_After": "9" * 5_000}, {"Retry_After": "nan"}, {"Retry_After": "-5"},
    {"Retry_After": "²"}, {"RateLimit": '"api";r=0;t=1000000000'},
)  # fmt: skip


@pytest.mark.parametrize("headers", tried("S10", "429", "bounded", {str(each)[:60]: each for each in PAUSES}))
def test_a_pause_that_the_server_asks_for_is_bounded(headers, hub, monkeypatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.fail("/cdn/", 429, times=2, **headers)
    hub.fail("/tree/", 429, times=2, **headers)
    fetched()
    assert pauses
    assert max(pauses) <= TIMEOUT_S + 1 + 8


@pytest.mark.attempt("S14a", "refs/main in the cache leads out of it", "error offline")
@pytest.mark.attempt("S14b", "refs/main in the cache is an absolute path", "error offline")
@pytest.mark.attempt("S14c", "refs/main in the cache leads to a folder that is named like a commit", "error offline")
def test_a_ref_of_the_cache_that_leads_elsewhere_is_refused(hub, tmp_path, monkeypatch) -> None:
    folder = fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched() == folder
    for elsewhere in (tmp_path / "elsewhere", tmp_path / ("0a" * 20)):
        elsewhere.mkdir()
        for name, content in ADAPTER.items():
            (elsewhere / name).write_bytes(content)
        for ref in (f"../../../{elsewhere.name}", str(elsewhere)):
            (folder.parent.parent / "refs" / "main").write_text(ref)
            refused(fetched, ResolveError)


def test_a_file_beyond_what_http_can_have_is_an_error(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads by hf_xet have no limits, so they are not made."""
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 10)
    refused(fetched, ResolveError)


def test_requests_of_other_code_are_not_limited(hub: LoopbackHub) -> None:
    """The process may be a trainer's, which goes on with its own downloads and uploads."""
    fetched()
    commit = hub.add_repo("acme/other", ADAPTER)
    hub.on_request = lambda path: time.sleep(2 * TIMEOUT_S) if path.endswith("acme/other") else None
    assert HfApi().model_info("acme/other").sha == commit
    with pytest.raises(ResolveError):
        HfApi(library_name="merge-gate", library_version="1").model_info("acme/other")


def test_the_result_is_that_of_the_read() -> None:
    assert within(60.0, lambda: 7) == 7
    assert within(60.0, lambda: None) is None


def test_so_is_its_exception() -> None:
    with pytest.raises(KeyError, match="gone"):
        within(60.0, lambda: {}["gone"])


def test_a_read_that_hangs_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, never.wait)
    never.set()


def test_a_mount_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, never = [], threading.Event()

    def hang(directory: str) -> None:
        asked.append(directory)
        never.wait()

    monkeypatch.setattr(base_watch, "base_identity", hang)
    monkeypatch.setattr(base_watch, "ANSWER_TIMEOUT_S", 0.01)
    watch = BaseWatch()
    for entry in range(3):
        watch.loaded("/mnt/base", (), [entry])
    assert watch.void() == {"/mnt/base": [0, 1, 2]}
    assert not watch.is_unchanged(0)
    assert watch.is_silent("/mnt/base")
    assert asked == ["/mnt/base"]
    never.set()
